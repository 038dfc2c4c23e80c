// Attention forward on the CPU: out = softmax(scale q k^T + mask) v, blocked so that no score leaves the L2 cache.
//
// Dao et al. 2022 (arXiv:2205.14135), algorithm 1. A thread takes a contiguous range of (batch, head, query block) with an
// equal share of the visible scores, packs each key/value head it meets once (keys transposed into panels), and for every
// block of keys runs  S = Q K^T,  P = exp(scale S - max),  O = O exp(old max - max) + P V  with the register tiles of
// tile.h. Floor: 4 Sq Sk D flops per head (half when causal) at the matmul rate. With bfloat16 products (tile_bf16.h) the
// operands stay as they are and P is rounded to bfloat16, after it was summed; S, O and the softmax are float32.
#include "attention.h"
#include "softmax_row.h"

FF_DECLARE_IMPL(attention_forward)
FF_DECLARE_IMPL(attention_forward_workspace)

namespace ff {
namespace FF_ISA {

// Queries per block: 8 row strips of AVX2's and bfloat16's tiles, 4 of AVX-512's, 2 of AMX's.
constexpr int64_t kQueries = FF_BF16_DOT ? 64 : 48;
constexpr int64_t kKeys = 128;  // per block: a score tile of 24 or 32 KB

// Sizes in elements of one thread's buffers, in the order they lie in the workspace.
template <class T> struct ForwardPlan {
  using A = acc_t<T>;
  using E = operand_t<T>;
  int64_t k_t, v, q, scores, out, line, padding, keep, total;
  explicit ForwardPlan(const ff_attention_args* a) {
    constexpr int NR = tile_shape<E>::kNR, KR = tile_shape<E>::kKR;
    const int64_t depth = round_up(a->head_dim, KR);
    k_t = room<E, A>(round_up(a->seqlen_k, NR) * depth);
    v = room<E, A>(round_up(a->seqlen_k, KR) * round_up(a->head_dim_v, NR));
    q = room<E, A>(kQueries * depth);
    scores = kQueries * kKeys;
    out = kQueries * round_up(a->head_dim_v, NR);
    line = Additions<T>::line_size(a), padding = Additions<T>::padding_size(a);
    keep = a->dropout_p > 0 ? kKeys : 0;
    total = 64;
    for (int64_t n : {k_t, v, q, scores, out, line, padding, keep}) total += round_up(n, 64);
  }
};

// Asks for the part-th of `parts` equal parts of the n elements that the next panel has: keys and values of a long sequence
// lie in the outer caches, and every strip that passes a panel has time to bring some of the next.
template <class E> FF_INLINE void prefetch_share(const E* next, int64_t n, int64_t part, int64_t parts) {
  const char* base = (const char*)next;
  const int64_t lines = n * int64_t(sizeof(E)) / 64;
  for (int64_t l = lines * part / parts; l < lines * (part + 1) / parts; l++) __builtin_prefetch(base + l * 64);
}

// One thread's buffers, and what they hold at the moment.
template <class T> struct Forward {
  using A = acc_t<T>;
  using E = operand_t<T>;
  static constexpr int MR = tile_shape<E>::kMR, NR = tile_shape<E>::kNR, KR = tile_shape<E>::kKR, W = vec<A>::W;
  static constexpr int kStep = std::max(KR, W);  // of the keys that a strip of scores begins and ends at
  static constexpr int64_t ldp = kKeys * sizeof(A) / sizeof(E);
  static_assert(kQueries % MR == 0 && kKeys % NR == 0 && kKeys % 64 == 0, "whole tiles, whole steps of dropout_scales");
  const ff_attention_args* a;
  Additions<T> additions;
  E *k_t, *v, *q, *p;  // p, the probabilities, takes the place of the scores
  A *s, *o;
  float* keep;
  const int64_t depth, keys_capacity;  // the K of both products for a whole head
  int64_t packed_batch = -1, packed_head = -1;
  Row<A> state[kQueries];

  Forward(const ff_attention_args* args, int thread)
      : a(args), additions{args}, depth(round_up(a->head_dim, KR)), keys_capacity(round_up(a->seqlen_k, KR)) {
    const ForwardPlan<T> plan(a);
    A* here = (A*)round_up(int64_t((A*)a->workspace + thread * plan.total), 64);
    auto take = [&](int64_t n) {
      A* taken = here;
      here += round_up(n, 64);
      return taken;
    };
    k_t = (E*)take(plan.k_t), v = (E*)take(plan.v), q = (E*)take(plan.q);
    s = take(plan.scores), p = (E*)s, o = take(plan.out);
    additions.line = take(plan.line), additions.padding = take(plan.padding);
    keep = (float*)take(plan.keep);
  }

  void start_head(const Sequence& sequence, int64_t h) {
    additions.start(sequence, h);
    const int64_t kv = h / (a->num_heads / a->num_kv_heads), b = sequence.index;
    if (packed_batch == b && packed_head == kv) return;
    packed_batch = b, packed_head = kv;
    pack_transposed(at<const T>(a, a->k, a->k_stride, sequence, kv, sequence.first_k), a->k_stride[2], sequence.seqlen_k,
                    a->head_dim, k_t);
    pack_panels(at<const T>(a, a->v, a->v_stride, sequence, kv, sequence.first_k), a->v_stride[2], sequence.seqlen_k,
                a->head_dim_v, v, keys_capacity, A(1));
  }

  void query_block(const Sequence& sequence, int64_t h, int64_t first) {
    const int64_t ldo = round_up(a->head_dim_v, NR);
    const int64_t rows = std::min(kQueries, sequence.seqlen_q - first), strips = round_up(rows, MR);
    const Scale scale(a->scale);
    pack_rows(at<const T>(a, a->q, a->q_stride, sequence, h, sequence.first_q + first), a->q_stride[2], rows, a->head_dim,
              q, depth, A(scale.sign));
    std::fill(q + rows * depth, q + strips * depth, E{});
    std::fill(o, o + strips * ldo, A(0));
    std::fill(state, state + kQueries, Row<A>{});

    const int64_t row = sequence.row(a, h) + first;
    const bool added = additions.any(a);
    const int64_t last_key = sequence.visible(a, first + rows - 1).end;
    const int64_t first_key = sequence.visible(a, first).begin / kKeys * kKeys;
    for (int64_t j = first_key; j < last_key; j += kKeys) {
      const int64_t keys = std::min(kKeys, last_key - j);
      // Keys of this block, from 0, that a row sees; of a strip, that any of its rows sees, in whole vectors.
      auto seen = [&](int64_t r) {
        const Range all = sequence.visible(a, first + r);
        const int64_t begin = std::min(keys, std::max<int64_t>(0, all.begin - j));
        return Range{begin, std::max(begin, std::min(keys, all.end - j))};
      };
      Range strip[kQueries / MR];
      for (int64_t m = 0; m < strips; m += MR) {
        const int64_t begin = seen(m).begin / kStep * kStep, end = seen(std::min(m + MR, rows) - 1).end;
        strip[m / MR] = {begin, end > begin ? end : begin};
      }
      for (int64_t n = 0; n < keys; n += NR)  // panels outermost: 4 KB of keys stay in L1 for all strips
        for (int64_t m = 0; m < strips; m += MR)
          if (strip[m / MR].end > n && strip[m / MR].begin < n + NR) {
            prefetch_share(k_t + (j + n + NR) * depth, NR * depth, m / MR, strips / MR);
            Product<E>::template strip<false>(depth, q + m * depth, depth, k_t + (j + n) * depth, s + m * kKeys + n, kKeys,
                                              false);
          }
      for (int64_t m = 0; m < strips; m += MR) {
        const int64_t begin = strip[m / MR].begin, end = round_up(strip[m / MR].end, kStep);
        if (begin == strip[m / MR].end) continue;
        const int64_t last_row = std::min(m + MR, rows);
        for (int64_t r = m; r < last_row; r++) {
          A* scores = s + r * kKeys;
          const Range visible = seen(r);
          if (added) additions.add(scores + begin, A(scale.size), first + r, j + begin, std::max(begin, visible.end) - begin, nullptr);
          std::fill(scores + begin, scores + std::max(visible.begin, begin), -std::numeric_limits<A>::infinity());
          std::fill(scores + visible.end, scores + end, -std::numeric_limits<A>::infinity());
          const A factor = state[r].add(scores, added ? A(1) : A(scale.size), begin, end,
                                        a->key_padding_mask && !added ? additions.padding + j : nullptr);
          if (j > first_key && factor != 1)
            for (int64_t c = 0; c < ldo; c += W) store(o + r * ldo + c, load(o + r * ldo + c) * factor);
          if (a->dropout_p > 0) {
            dropout_scales(keep, keys, uint64_t(row + r), a->seed, a->dropout_p, j);
            for (int64_t c = begin; c < strip[m / MR].end; c++) scores[c] *= keep[c];
          }
          if constexpr (!std::is_same<E, A>::value) round_row(scores, begin, end);
        }
        for (int64_t r = last_row; r < m + MR; r++) std::fill(p + r * ldp + begin, p + r * ldp + end, E{});
      }
      for (int64_t n = 0; n < ldo; n += NR)
        for (int64_t m = 0; m < strips; m += MR) {
          const Range terms = strip[m / MR];
          if (terms.begin < terms.end) {
            prefetch_share(v + (n + NR) * keys_capacity + j * NR, keys * NR, m / MR, strips / MR);
            Product<E>::template strip<false>(round_up(terms.end, KR) - terms.begin, p + m * ldp + terms.begin, ldp,
                                              v + n * keys_capacity + (j + terms.begin) * NR, o + m * ldo + n, ldo, true);
          }
        }
    }
    write(sequence, h, first, rows, a->lse ? (A*)a->lse + row : nullptr);
  }

  void write(const Sequence& sequence, int64_t h, int64_t first, int64_t rows, A* lse) {
    T* out = at<T>(a, a->out, a->out_stride, sequence, h, sequence.first_q + first);
    for (int64_t r = 0; r < rows; r++)
      state[r].write(o + r * round_up(a->head_dim_v, NR), a->head_dim_v, out + r * a->out_stride[2], lse ? lse + r : nullptr);
  }
};

static int forward_threads(const ff_attention_args* a) {
  const int64_t blocks = a->num_heads * ((a->cu_seqlens_q ? a->total_q : a->batch * a->seqlen_q) / kQueries + a->batch);
  return int(std::min<int64_t>(num_threads(work_of_scores(a)), std::max<int64_t>(1, blocks)));
}

template <class T> static void forward(const ff_attention_args* a) {
  const Shares shares{a, kQueries, a->num_heads};
  const int64_t total = shares.total();
  auto run = [&](int thread, int count) {
    [[maybe_unused]] const typename Product<operand_t<T>>::Session session;
    Forward<T> worker(a, thread);
    const int64_t begin = total * thread / count, end = total * (thread + 1) / count;
    shares.heads_in(begin, end, [&](const Sequence& s, int64_t h, int64_t start) {
      for (int64_t i = 0; i < s.seqlen_q && start < end; i += kQueries) {
        const int64_t weight = shares.block(s, i);
        if (start >= begin) {  // a block belongs to the thread its start falls to
          worker.start_head(s, h);
          worker.query_block(s, h, i);
        }
        start += weight;
      }
    });
  };
  const int threads = forward_threads(a);
  if (threads == 1) return run(0, 1);
#pragma omp parallel num_threads(threads)
  run(omp_get_thread_num(), omp_get_num_threads());
}

int attention_forward(const ff_attention_args* a, [[maybe_unused]] void* stream) {
  FF_LEAVE_OTHER_DTYPES(attention_forward(a, stream));
  return for_attention_dtype(a, [&](auto t) -> int {
    if (a->batch > 0 && a->seqlen_q > 0) forward<decltype(t)>(a);
    return FF_OK;
  });
}

size_t attention_forward_workspace(const ff_attention_args* a) {
  FF_LEAVE_OTHER_DTYPES(attention_forward_workspace(a));
  size_t bytes = 0;
  for_attention_dtype(a, [&](auto t) -> int {
    bytes = size_t(forward_threads(a)) * size_t(ForwardPlan<decltype(t)>(a).total) * sizeof(acc_t<decltype(t)>);
    return FF_OK;
  });
  return bytes;
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
// A few rows of scores per key/value head do not repay the packing of every key and value for the tile products. Backward
// has to find the very sums it recomputes, so where it may follow, which asks for the lse, they are computed by tiles.
static bool few_queries(const ff_attention_args* a) {
  constexpr int64_t kFewRows = 8;  // up to which reading keys and values as they lie is faster
  return !a->lse && a->seqlen_q * (a->num_heads / a->num_kv_heads) <= kFewRows && !a->cu_seqlens_q && !a->top_left &&
         a->dropout_p == 0;
}

extern "C" int ff_cpu_attention_forward(const ff_attention_args* a, void* stream) {
  if (int status = ff::check_attention(a)) return status;
  FF_REQUIRE(a->workspace, "workspace: must not be NULL");
  return few_queries(a) ? FF_DISPATCH(attention_of_few_queries)(a, stream) : FF_DISPATCH_BF16(attention_forward)(a, stream);
}

extern "C" size_t ff_cpu_attention_forward_workspace(const ff_attention_args* a) {
  return few_queries(a) ? FF_DISPATCH(attention_of_few_queries_workspace)(a)
                        : FF_DISPATCH_BF16(attention_forward_workspace)(a);
}
#endif
