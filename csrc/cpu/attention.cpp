// Attention forward on the CPU: out = softmax(scale q k^T + mask) v, blocked so that no score leaves the L2 cache.
//
// Dao et al. 2022 (arXiv:2205.14135), algorithm 1. A thread takes a contiguous range of (batch, head, query block) with an
// equal share of the visible scores, packs each key/value head it meets once (keys transposed into panels), and for every
// block of keys runs  S = Q K^T,  P = exp(scale S - max),  O = O exp(old max - max) + P V  with the register tiles of
// tile.h. Floor: 4 Sq Sk D flops per head (half when causal) at the matmul rate.
#include "attention.h"

FF_DECLARE_IMPL(attention_forward)

namespace ff {
namespace FF_ISA {

constexpr int64_t kQueries = 48;  // per block: 8 (AVX2) or 4 (AVX-512) row strips
constexpr int64_t kKeys = 128;    // per block: a 24 KB score tile

// Sizes in elements of one thread's buffers, in the order they lie in the workspace.
template <class A> struct ForwardPlan {
  int64_t k_t, v, q, scores, out, bias, total;
  explicit ForwardPlan(const ff_attention_args* a) {
    constexpr int NR = tile_shape<A>::kNR;
    k_t = round_up(a->seqlen_k, NR) * a->head_dim;
    v = a->seqlen_k * round_up(a->head_dim_v, NR);
    q = kQueries * a->head_dim;
    scores = kQueries * kKeys;
    out = kQueries * round_up(a->head_dim_v, NR);
    bias = a->key_padding_mask ? a->seqlen_k : 0;
    total = round_up(k_t, 64) + round_up(v, 64) + round_up(q, 64) + scores + out + round_up(bias, 64) + 64;
  }
};

template <class A> struct Softmax {
  A max[kQueries], sum[kQueries];
};

// Turns `n` scores of one row into exp(scale s - max) in place, updating the running maximum (of scale s) and sum; returns
// the factor by which the row's earlier output has to shrink. The tail up to `padded` is cleared.
template <class A>
FF_INLINE A softmax_row(A* s, A scale, int64_t n, int64_t padded, const A* bias, A& running_max, A& running_sum) {
  constexpr int W = vec<A>::W;
  constexpr A kInf = std::numeric_limits<A>::infinity();
  for (int64_t i = n; i < padded; i++) s[i] = -kInf;  // whole vectors from here on
  vec_t<A> m = splat(-kInf);
  if (bias)
    for (int64_t i = 0; i < n; i += W) {
      vec_t<A> b = i + W <= n ? load(bias + i) : load_partial(bias + i, int(n - i));
      vec_t<A> v = load(s + i) + b;  // 0 or -inf: the same before and after the scale
      store(s + i, v);
      m = vmax(m, v);
    }
  else
    for (int64_t i = 0; i < n; i += W) m = vmax(m, load(s + i));
  A top = std::max(running_max, scale * hmax(m));
  A shift = top == -kInf ? A(0) : top;  // a row that has seen no key yet: all terms exp(-inf) = 0
  vec_t<A> total{};
  for (int64_t i = 0; i < padded; i += W) {
    vec_t<A> p = vexp_below(load(s + i), scale, shift);
    store(s + i, p);
    total += p;
  }
  A factor = running_max == -kInf ? A(0) : std::exp(running_max - shift);
  running_sum = running_sum * factor + hsum(total);
  running_max = top;
  return factor;
}

template <class T> static void query_block(const ff_attention_args* a, int64_t b, int64_t h, int64_t first, const acc_t<T>* k_t,
                                           const acc_t<T>* v, acc_t<T>* q, acc_t<T>* s, acc_t<T>* o,
                                           const acc_t<T>* bias) {
  using A = acc_t<T>;
  constexpr int MR = tile_shape<A>::kMR, NR = tile_shape<A>::kNR, W = vec<A>::W;
  const int64_t D = a->head_dim, Dv = a->head_dim_v, Sk = a->seqlen_k, ldo = round_up(Dv, NR);
  const int64_t rows = std::min(kQueries, a->seqlen_q - first), strips = round_up(rows, MR);
  const Scale scale(a->scale);
  pack_rows(at<T>(a->q, a->q_stride, b, h) + first * a->q_stride[2], a->q_stride[2], rows, D, q, D,
            A(scale.sign));
  std::fill(q + rows * D, q + strips * D, A(0));
  std::fill(o, o + strips * ldo, A(0));
  Softmax<A> softmax;
  std::fill(softmax.max, softmax.max + kQueries, -std::numeric_limits<A>::infinity());
  std::fill(softmax.sum, softmax.sum + kQueries, A(0));

  const int64_t last_key = visible_keys(a, first + rows - 1);
  for (int64_t j = 0; j < last_key; j += kKeys) {
    const int64_t keys = std::min(kKeys, last_key - j);
    for (int64_t n = 0; n < keys; n += NR)  // panels outermost: 4 KB of keys stay in L1 for all strips
      for (int64_t m = 0; m < strips; m += MR)
        if (visible_keys(a, first + std::min(m + MR, rows) - 1) > j + n)
          tile<A, MR, false>(D, q + m * D, D, k_t + (j + n) * D, s + m * kKeys + n, kKeys, false);
    for (int64_t m = 0; m < strips; m += MR) {
      const int64_t strip_rows = std::min<int64_t>(MR, rows - m);
      const int64_t strip_keys = std::min(keys, visible_keys(a, first + m + strip_rows - 1) - j);
      if (strip_keys <= 0) continue;
      const int64_t padded = round_up(strip_keys, W);
      for (int64_t r = m; r < m + strip_rows; r++) {
        const int64_t n = std::max<int64_t>(0, std::min(keys, visible_keys(a, first + r) - j));
        A factor = softmax_row(s + r * kKeys, A(scale.size), n, padded, bias ? bias + j : nullptr, softmax.max[r],
                               softmax.sum[r]);
        if (j > 0 && factor != 1)
          for (int64_t c = 0; c < ldo; c += W) store(o + r * ldo + c, load(o + r * ldo + c) * factor);
      }
      for (int64_t r = m + strip_rows; r < m + MR; r++) std::fill(s + r * kKeys, s + r * kKeys + padded, A(0));
    }
    for (int64_t n = 0; n < ldo; n += NR)
      for (int64_t m = 0; m < strips; m += MR) {
        const int64_t strip_keys = std::min(keys, visible_keys(a, first + std::min(m + MR, rows) - 1) - j);
        if (strip_keys > 0)
          tile<A, MR, false>(strip_keys, s + m * kKeys, kKeys, v + n * Sk + j * NR, o + m * ldo + n, ldo, true);
      }
  }

  T* out = at<T>(a->out, a->out_stride, b, h) + first * a->out_stride[2];
  A* lse = (A*)a->lse + (b * a->num_heads + h) * a->seqlen_q + first;
  for (int64_t r = 0; r < rows; r++) {
    const A sum = softmax.sum[r], inverse = sum > 0 ? 1 / sum : A(0);
    T* to = out + r * a->out_stride[2];
    const A* from = o + r * ldo;
    int64_t c = 0;
    for (; c + W <= Dv; c += W) store(to + c, load(from + c) * inverse);
    if (c < Dv) store_partial(to + c, load(from + c) * inverse, int(Dv - c));
    lse[r] = sum > 0 ? A(double(softmax.max[r]) + std::log(double(sum))) : -std::numeric_limits<A>::infinity();
    if (std::isnan(sum)) {  // a NaN among the inputs stays visible
      for (int64_t i = 0; i < Dv; i++) to[i] = from_float<T>(sum);
      lse[r] = sum;
    }
  }
}

static int forward_threads(const ff_attention_args* a) {
  return num_threads(a->batch * a->num_heads * a->seqlen_q * (a->seqlen_k + 1) / (a->causal ? 2 : 1));
}

template <class T> static void forward(const ff_attention_args* a) {
  using A = acc_t<T>;
  constexpr int NR = tile_shape<A>::kNR;
  const int64_t blocks = (a->seqlen_q + kQueries - 1) / kQueries, heads = a->batch * a->num_heads;
  const int64_t groups = a->num_heads / a->num_kv_heads;
  // Work of a query block: its visible keys, plus a constant for what every block costs.
  std::vector<int64_t> before(size_t(blocks) + 1, 0);
  for (int64_t i = 0; i < blocks; i++)
    before[i + 1] = before[i] + 16 + visible_keys(a, std::min((i + 1) * kQueries, a->seqlen_q) - 1);
  const int64_t total = before[blocks] * heads;
  const ForwardPlan<A> plan(a);
  const int threads = forward_threads(a);

  auto run = [&](int thread, int count) {
    A* memory = (A*)a->workspace + int64_t(thread) * plan.total;
    A* k_t = (A*)round_up(int64_t(memory), 64);
    A *v = k_t + round_up(plan.k_t, 64), *q = v + round_up(plan.v, 64), *s = q + round_up(plan.q, 64);
    A *o = s + plan.scores, *bias = o + plan.out;
    const int64_t begin = total * thread / count, end = total * (thread + 1) / count;
    int64_t packed = -1, packed_batch = -1;
    for (int64_t head = begin / before[blocks]; head < heads && head * before[blocks] < end; head++) {
      const int64_t b = head / a->num_heads, h = head % a->num_heads, kv = h / groups;
      for (int64_t i = 0; i < blocks; i++) {
        const int64_t start = head * before[blocks] + before[i];
        if (start < begin || start >= end) continue;  // a block belongs to the thread its start falls to
        if (packed != b * a->num_kv_heads + kv) {
          packed = b * a->num_kv_heads + kv;
          pack_transposed(at<T>(a->k, a->k_stride, b, kv), a->k_stride[2], a->seqlen_k, a->head_dim, k_t);
          pack_panels(at<T>(a->v, a->v_stride, b, kv), a->v_stride[2], a->seqlen_k, a->head_dim_v, v, a->seqlen_k, A(1));
        }
        if (a->key_padding_mask && packed_batch != b) padding_bias(a, packed_batch = b, bias);
        query_block<T>(a, b, h, i * kQueries, k_t, v, q, s, o, a->key_padding_mask ? bias : nullptr);
      }
    }
  };
  static_assert(kQueries % tile_shape<A>::kMR == 0 && kKeys % NR == 0, "whole tiles");
  if (threads == 1) return run(0, 1);
#pragma omp parallel num_threads(threads)
  run(omp_get_thread_num(), omp_get_num_threads());
}

int attention_forward(const ff_attention_args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) -> int {
    if (a->batch * a->num_heads * a->seqlen_q > 0) forward<decltype(t)>(a);
    return FF_OK;
  });
}

size_t attention_forward_workspace(const ff_attention_args* a) {
  const int64_t threads = forward_threads(a);
  return a->dtype == FF_FLOAT64 ? threads * ForwardPlan<double>(a).total * 8 : threads * ForwardPlan<float>(a).total * 4;
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
FF_DECLARE_IMPL(attention_forward_workspace)

static int check(const ff_attention_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->batch >= 0 && a->num_heads >= 1 && a->num_kv_heads >= 1 && a->num_heads % a->num_kv_heads == 0,
             "num_heads: %lld is not a multiple of num_kv_heads %lld", (long long)a->num_heads, (long long)a->num_kv_heads);
  FF_REQUIRE(a->seqlen_q >= 0 && a->seqlen_k >= 0, "seqlen_q, seqlen_k: must not be negative");
  FF_REQUIRE(a->head_dim >= 1 && a->head_dim <= 256 && a->head_dim_v >= 1 && a->head_dim_v <= 256,
             "head_dim: %lld, %lld are not in [1, 256]", (long long)a->head_dim, (long long)a->head_dim_v);
  FF_REQUIRE(a->workspace, "workspace: must not be NULL");
  return FF_OK;
}

extern "C" int ff_cpu_attention_forward(const ff_attention_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->batch * a->seqlen_q == 0 || (a->q && a->out && a->lse), "q, out, lse: must not be NULL");
  FF_REQUIRE(a->batch * a->seqlen_k == 0 || (a->k && a->v), "k, v: must not be NULL");
  return FF_DISPATCH(attention_forward)(a, stream);
}

extern "C" size_t ff_cpu_attention_forward_workspace(const ff_attention_args* a) {
  return FF_DISPATCH(attention_forward_workspace)(a);
}
#endif
