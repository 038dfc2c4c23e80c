// Attention backward for Hopper: what its kernels share. dq, dk, dv of attention_forward_sm90.cu, from its lse.
//
// Algorithm 2 of FlashAttention-2 (Dao 2023, arXiv:2307.08691) in the form of FlashAttention-3 (Shah et al. 2024,
// arXiv:2407.08608, section 3 and appendix B.2):
//   p = exp(score - lse), dp = keep * (dout v^T), ds = p (dp - delta) cap', delta = rowsum(dout * out) - dlse
//   dv = (p * keep)^T dout,  dk = scale ds^T q,  dq = scale ds k
// Three kernels. The first turns dout, out, lse and dlse into a pair of floats per query and clears the accumulator of
// dq; the second owns keys and has all five products; the third rounds dq.
#pragma once
#include "attention_sm90.cuh"

namespace ff {
namespace attention_sm90 {

constexpr int kKeys = 128;       // of a block of the second kernel
constexpr int kPiece = 64 * 64;  // floats of dq that one of its warpgroups has after a step, in the order of fragments
// Queries of a step: then each of the two warpgroups has one piece of dq, of 64 queries or of 64 columns (of 96 columns
// the second has 32).
template <int D> constexpr int kTileQueries = D == 64 ? 128 : 64;

struct BackwardParams {
  Attention a;
  Operand q, k, v, dout;
  bool ordered;
  int blocks;               // of keys, per head
  int64_t tiles_per_head;   // of queries
  float *statistics, *dq;   // (Hq, tiles, 2, kTileQueries), (Hq, tiles, 2, kPiece)
  int *turns, *tickets;     // (Hq, tiles, 2), 1
};

// The tile of a head's queries where a sequence's first lies. Packed sequences of any lengths fit in
// total_q / kQueries + batch tiles.
template <int kQueries> FF_DEVICE int64_t first_tile(const BackwardParams& p, const Sequence& s, int batch, int head) {
  const int64_t before = p.a.cu_seqlens_q ? s.first_q / kQueries + batch
                                          : int64_t(batch) * ((p.a.seqlen_q + kQueries - 1) / kQueries);
  return head * p.tiles_per_head + before;
}

// Calls f(T{}, integral_constant<int, D>{}) for the dtype and the bucket of the head dimension.
template <class F> int for_backward_kernels(const ff_attention_args* a, F f) {
  const int64_t dim = std::max(a->head_dim, a->head_dim_v);
  const auto with_dim = [&](auto t) {
    if (dim <= 64) return f(t, std::integral_constant<int, 64>{});
    if (dim <= 96) return f(t, std::integral_constant<int, 96>{});
    return f(t, std::integral_constant<int, 128>{});
  };
  return a->dtype == FF_BFLOAT16 ? with_dim(__nv_bfloat16{}) : with_dim(__half{});
}

// attention_backward_kv_sm90.cu
int attention_backward_kv(const ff_attention_args* args, const BackwardParams& p, void* stream);

}  // namespace attention_sm90
}  // namespace ff
