// Attention backward on the CPU: dq, dk and dv from the saved log-sum-exp, recomputing the probabilities block by block.
//
//   P = exp(scale q k^T - lse)      dV += P^T dO        dP = dO V^T
//   dS = P (dP - delta), delta = sum(dO O) - dlse      dK += scale dS^T Q      dQ += scale dS K
// (Dao et al. 2022, appendix B.4.) Five tile products per pair of blocks, all operands packed once per head. A thread
// works on whole key/value heads; when there are too few of them, a head is cut into interleaved key blocks ("parts"),
// each with its own dQ, added up in part order afterwards: no atomics, so results repeat bit for bit.
#include "attention.h"

FF_DECLARE_IMPL(attention_backward)
FF_DECLARE_IMPL(attention_backward_workspace)

namespace ff {
namespace FF_ISA {

constexpr int64_t kRows = 48;  // queries per block
constexpr int64_t kCols = 96;  // keys per block: whole tiles both as columns (kNR) and as rows of the products for dK, dV (kMR)

struct BackwardSplit {
  int threads, parts;
};
static BackwardSplit split(const ff_attention_args* a) {
  int threads = num_threads(a->batch * a->num_heads * a->seqlen_q * (a->seqlen_k + 1) / (a->causal ? 1 : 2));
  const int64_t heads = a->batch * a->num_kv_heads, blocks = (a->seqlen_k + kCols - 1) / kCols;
  if (heads >= 4 * threads || heads % threads == 0) return {threads, 1};
  return {threads, int(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)))};
}

// Sizes in elements of one thread's buffers, in the order they lie in its share of the workspace.
template <class A> struct BackwardPlan {
  int64_t D, Dv, ldq, ldv, rows, keys;  // padded: ldq, ldv to whole panels, rows and keys to whole tiles
  int64_t k_t, v_t, k, dk, dv, q, q_panels, dout, dout_panels, dq, statistics, tiles, bias, total;
  int64_t shared_dq;  // all parts together, one (B, Hq, Sq, ldq) each; after the threads' buffers
  explicit BackwardPlan(const ff_attention_args* a, int parts) {
    constexpr int NR = tile_shape<A>::kNR;
    D = a->head_dim, Dv = a->head_dim_v;
    ldq = round_up(D, NR), ldv = round_up(Dv, NR);
    rows = round_up(a->seqlen_q, kRows), keys = round_up(a->seqlen_k, kCols);
    k_t = keys * D, v_t = keys * Dv, k = keys * ldq;
    dk = keys * ldq, dv = keys * ldv;
    q = rows * D, q_panels = rows * ldq, dout = rows * Dv, dout_panels = rows * ldv;
    dq = parts == 1 ? rows * ldq : 0;
    statistics = 2 * rows;
    tiles = 2 * kRows * kCols;
    bias = a->key_padding_mask ? keys : 0;
    total = 0;
    for (int64_t n : {k_t, v_t, k, dk, dv, q, q_panels, dout, dout_panels, dq, statistics, tiles, bias})
      total += round_up(n, 64);
    total += 64;
    shared_dq = parts == 1 ? 0 : parts * a->batch * a->num_heads * rows * ldq;
  }
};

// p -> exp(scale s - lse), ds -> p (dp - delta) for the visible part of one row; the rest of the tile row is cleared.
// lse stays in base e: turned to base 2 it would be rounded a second time, and that error is one of p.
template <class A>
FF_INLINE void gradient_row(A* s, A* dp, A scale, int64_t visible, int64_t padded, const A* bias, A lse, A delta) {
  constexpr int W = vec<A>::W;
  int64_t i = 0;
  for (; i < visible; i += W) {
    vec_t<A> z = load(s + i);
    if (bias) z += load(bias + i);
    vec_t<A> p = vexp_below(z, scale, lse);
    store(s + i, p);
    store(dp + i, p * (load(dp + i) - delta));
  }
  for (i = visible; i < padded; i++) s[i] = dp[i] = 0;
}

template <class T> struct Backward {
  using A = acc_t<T>;
  static constexpr int MR = tile_shape<A>::kMR, NR = tile_shape<A>::kNR, W = vec<A>::W;
  static_assert(kRows % MR == 0 && kCols % MR == 0 && kCols % NR == 0, "whole tiles");
  const ff_attention_args* a;
  BackwardPlan<A> plan;
  int parts;
  A *k_t, *v_t, *k, *dk, *dv, *q, *q_panels, *dout, *dout_panels, *own_dq, *lse, *delta, *s, *dp, *bias;

  Backward(const ff_attention_args* args, int parts, int thread) : a(args), plan(args, parts), parts(parts) {
    A* p = (A*)round_up(int64_t((A*)a->workspace + thread * plan.total), 64);
    auto take = [&](int64_t n) {
      A* here = p;
      p += round_up(n, 64);
      return here;
    };
    k_t = take(plan.k_t), v_t = take(plan.v_t), k = take(plan.k), dk = take(plan.dk), dv = take(plan.dv);
    q = take(plan.q), q_panels = take(plan.q_panels), dout = take(plan.dout), dout_panels = take(plan.dout_panels);
    own_dq = take(plan.dq), lse = take(plan.statistics), delta = lse + plan.rows;
    s = take(plan.tiles), dp = s + kRows * kCols, bias = take(plan.bias);
  }

  // One key/value head (one part of its key blocks), all query heads that read it.
  void head(int64_t b, int64_t kv, int part, A* shared_dq) {
    const int64_t Sk = a->seqlen_k, groups = a->num_heads / a->num_kv_heads;
    const T* kp = at<T>(a->k, a->k_stride, b, kv);
    const T* vp = at<T>(a->v, a->v_stride, b, kv);
    pack_transposed(kp, a->k_stride[2], Sk, plan.D, k_t);
    pack_transposed(vp, a->v_stride[2], Sk, plan.Dv, v_t);
    pack_panels(kp, a->k_stride[2], Sk, plan.D, k, plan.keys, A(1));
    std::fill(dk, dk + plan.dk, A(0));
    std::fill(dv, dv + plan.dv, A(0));
    if (a->key_padding_mask) {
      padding_bias(a, b, bias);
      std::fill(bias + Sk, bias + plan.keys, -std::numeric_limits<A>::infinity());
    }
    for (int64_t h = kv * groups; h < (kv + 1) * groups; h++) {
      A* dq = parts == 1 ? own_dq
                         : shared_dq + ((int64_t(part) * a->batch + b) * a->num_heads + h) * plan.rows * plan.ldq;
      std::fill(dq, dq + plan.rows * plan.ldq, A(0));
      pack_queries(b, h);
      for (int64_t j = part * kCols; j < Sk; j += parts * kCols) key_block(j, dq);
      if (parts == 1) write(dq, plan.ldq, a->seqlen_q, plan.D, at<T>(a->dq, a->dq_stride, b, h), a->dq_stride[2], A(a->scale));
    }
    const A size = A(Scale(a->scale).size);  // its sign is in the packed q
    for (int64_t j = part * kCols; j < Sk; j += parts * kCols) {
      const int64_t n = std::min(kCols, Sk - j);
      write(dk + j * plan.ldq, plan.ldq, n, plan.D, at<T>(a->dk, a->dk_stride, b, kv) + j * a->dk_stride[2],
            a->dk_stride[2], size);
      write(dv + j * plan.ldv, plan.ldv, n, plan.Dv, at<T>(a->dv, a->dv_stride, b, kv) + j * a->dv_stride[2],
            a->dv_stride[2], A(1));
    }
  }

  void pack_queries(int64_t b, int64_t h) {
    const int64_t Sq = a->seqlen_q;
    const T* qp = at<T>(a->q, a->q_stride, b, h);
    const T* dop = at<T>(a->dout, a->dout_stride, b, h);
    const T* op = at<T>((const void*)a->out, a->out_stride, b, h);
    const A sign = A(Scale(a->scale).sign);
    pack_rows(qp, a->q_stride[2], Sq, plan.D, q, plan.D, sign);
    std::fill(q + Sq * plan.D, q + plan.rows * plan.D, A(0));
    pack_panels(qp, a->q_stride[2], Sq, plan.D, q_panels, plan.rows, sign);
    pack_rows(dop, a->dout_stride[2], Sq, plan.Dv, dout, plan.Dv, A(1));
    std::fill(dout + Sq * plan.Dv, dout + plan.rows * plan.Dv, A(0));
    pack_panels(dop, a->dout_stride[2], Sq, plan.Dv, dout_panels, plan.rows, A(1));
    const int64_t row = (b * a->num_heads + h) * Sq;
    for (int64_t i = 0; i < Sq; i++) {
      const A l = ((const A*)a->lse)[row + i];
      lse[i] = std::isinf(l) && l < 0 ? A(0) : l;  // a row without keys: every score is -inf anyway
      double sum = 0;
      const T* o = op + i * a->out_stride[2];
      vec_t<A> acc{};
      int64_t c = 0;
      for (; c + W <= plan.Dv; c += W) acc += load(o + c) * load(dout + i * plan.Dv + c);
      sum = double(hsum(acc));
      for (; c < plan.Dv; c++) sum += double(to_float(o[c])) * double(dout[i * plan.Dv + c]);
      delta[i] = A(sum) - (a->dlse ? ((const A*)a->dlse)[row + i] : A(0));
    }
  }

  void key_block(int64_t j, A* dq) {
    const int64_t keys = std::min(kCols, a->seqlen_k - j);
    // The first query that sees this block, rounded down to a whole block.
    int64_t first = a->causal ? std::max<int64_t>(0, j - (a->seqlen_k - a->seqlen_q)) / kRows * kRows : 0;
    for (int64_t i = first; i < a->seqlen_q; i += kRows) {
      const int64_t rows = std::min(kRows, a->seqlen_q - i), strips = round_up(rows, MR);
      const int64_t seen = std::min(keys, visible_keys(a, i + rows - 1) - j);  // by the last query: the most
      if (seen <= 0) continue;
      const int64_t padded = round_up(seen, NR);
      // On the causal diagonal about half of each product is known to vanish.
      auto visible = [&](int64_t r) { return std::max<int64_t>(0, std::min(keys, visible_keys(a, i + r) - j)); };
      Extent scores[kRows / MR], gradients[kRows / MR], of_keys[kCols / MR], to_q[kRows / MR];
      for (int64_t m = 0; m < strips; m += MR) {
        const int64_t n = visible(std::min(m + MR, rows) - 1);
        scores[m / MR] = {n, 0, plan.D}, gradients[m / MR] = {n, 0, plan.Dv}, to_q[m / MR] = {plan.ldq, 0, n};
      }
      for (int64_t m = 0; m < seen; m += MR) {
        const int64_t first = a->causal ? std::max<int64_t>(0, j + m - (a->seqlen_k - a->seqlen_q) - i) : 0;
        of_keys[m / MR] = {std::max(plan.ldq, plan.ldv), first, rows};
      }
      matmul<A, false>(strips, padded, scores, q + i * plan.D, plan.D, k_t + j * plan.D, NR * plan.D, s, kCols, false);
      matmul<A, false>(strips, padded, gradients, dout + i * plan.Dv, plan.Dv, v_t + j * plan.Dv, NR * plan.Dv, dp, kCols,
                       false);
      const int64_t wide = std::min<int64_t>(kCols, round_up(padded, MR));
      for (int64_t r = 0; r < rows; r++) {
        gradient_row(s + r * kCols, dp + r * kCols, A(Scale(a->scale).size), visible(r), wide, a->key_padding_mask ? bias + j : nullptr, lse[i + r],
                     delta[i + r]);
      }
      for (int64_t r = rows; r < strips; r++) std::fill(dp + r * kCols, dp + r * kCols + wide, A(0));
      matmul<A, true>(seen, plan.ldv, of_keys, s, kCols, dout_panels + i * NR, plan.rows * NR, dv + j * plan.ldv, plan.ldv,
                      true);
      matmul<A, true>(seen, plan.ldq, of_keys, dp, kCols, q_panels + i * NR, plan.rows * NR, dk + j * plan.ldq, plan.ldq,
                      true);
      matmul<A, false>(strips, plan.ldq, to_q, dp, kCols, k + j * NR, plan.keys * NR, dq + i * plan.ldq, plan.ldq, true);
    }
  }

  static void write(const A* from, int64_t ld, int64_t rows, int64_t cols, T* to, int64_t stride, A scale) {
    for (int64_t r = 0; r < rows; r++) {
      int64_t c = 0;
      for (; c + W <= cols; c += W) store(to + r * stride + c, load(from + r * ld + c) * scale);
      if (c < cols) store_partial(to + r * stride + c, load(from + r * ld + c) * scale, int(cols - c));
    }
  }
};

template <class T> static void backward(const ff_attention_args* a) {
  using A = acc_t<T>;
  const BackwardSplit how = split(a);
  const BackwardPlan<A> plan(a, how.parts);
  const int64_t tasks = a->batch * a->num_kv_heads * how.parts;
  A* shared_dq = (A*)round_up(int64_t((A*)a->workspace + how.threads * plan.total), 64);
  auto run = [&](int thread, int count) {
    Backward<T> worker(a, how.parts, thread);
    for (int64_t t = tasks * thread / count; t < tasks * (thread + 1) / count; t++) {
      const int64_t head = t / how.parts;
      worker.head(head / a->num_kv_heads, head % a->num_kv_heads, int(t % how.parts), shared_dq);
    }
  };
  if (how.threads == 1) run(0, 1);
  else {
#pragma omp parallel num_threads(how.threads)
    run(omp_get_thread_num(), omp_get_num_threads());
  }
  if (how.parts == 1) return;
  const int64_t size = a->batch * a->num_heads * plan.rows * plan.ldq;
  parallel_for(a->batch * a->num_heads * a->seqlen_q, plan.D * how.parts, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t head = r / a->seqlen_q, i = r % a->seqlen_q;
      A* row = shared_dq + (head * plan.rows + i) * plan.ldq;
      for (int p = 1; p < how.parts; p++)
        for (int64_t c = 0; c < plan.D; c++) row[c] += row[p * size + c];
      T* to = at<T>(a->dq, a->dq_stride, head / a->num_heads, head % a->num_heads) + i * a->dq_stride[2];
      Backward<T>::write(row, plan.ldq, 1, plan.D, to, a->dq_stride[2], A(a->scale));
    }
  });
}

// Gradients of tensors that no query or no key ever touched.
template <class T> static void clear(const ff_attention_args* a) {
  auto zero = [](void* base, const int64_t (&stride)[3], int64_t B, int64_t H, int64_t S, int64_t D) {
    for (int64_t b = 0; b < B; b++)
      for (int64_t h = 0; h < H; h++)
        for (int64_t i = 0; i < S; i++) memset((void*)(at<T>(base, stride, b, h) + i * stride[2]), 0, size_t(D) * sizeof(T));
  };
  zero(a->dq, a->dq_stride, a->batch, a->num_heads, a->seqlen_q, a->head_dim);
  zero(a->dk, a->dk_stride, a->batch, a->num_kv_heads, a->seqlen_k, a->head_dim);
  zero(a->dv, a->dv_stride, a->batch, a->num_kv_heads, a->seqlen_k, a->head_dim_v);
}

int attention_backward(const ff_attention_args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) -> int {
    using T = decltype(t);
    if (a->batch * a->seqlen_q * a->seqlen_k == 0) clear<T>(a);
    else backward<T>(a);
    return FF_OK;
  });
}

size_t attention_backward_workspace(const ff_attention_args* a) {
  const BackwardSplit how = split(a);
  auto bytes = [&](auto acc) {
    using A = decltype(acc);
    const BackwardPlan<A> plan(a, how.parts);
    return size_t(how.threads * plan.total + plan.shared_dq + 64) * sizeof(A);
  };
  return a->dtype == FF_FLOAT64 ? bytes(double{}) : bytes(float{});
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
extern "C" int ff_cpu_attention_backward(const ff_attention_args* a, void* stream) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->batch >= 0 && a->num_heads >= 1 && a->num_kv_heads >= 1 && a->num_heads % a->num_kv_heads == 0,
             "num_heads: %lld is not a multiple of num_kv_heads %lld", (long long)a->num_heads, (long long)a->num_kv_heads);
  FF_REQUIRE(a->head_dim >= 1 && a->head_dim <= 256 && a->head_dim_v >= 1 && a->head_dim_v <= 256,
             "head_dim: %lld, %lld are not in [1, 256]", (long long)a->head_dim, (long long)a->head_dim_v);
  FF_REQUIRE(a->workspace, "workspace: must not be NULL");
  return FF_DISPATCH(attention_backward)(a, stream);
}

extern "C" size_t ff_cpu_attention_backward_workspace(const ff_attention_args* a) {
  return FF_DISPATCH(attention_backward_workspace)(a);
}
#endif
