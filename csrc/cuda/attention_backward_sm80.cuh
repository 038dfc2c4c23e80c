// Attention backward with Ampere's tensor cores: what its kernels share. With p = exp(score - lse), kept = the dropout
// mask over 1 - dropout_p, delta = sum(dout * out) - dlse per query:
//
//   dz = p (kept (dout v^T) - delta)      dbias = dz      ddistance_bias = dz summed per distance
//   ds = dz * derivative of the cap       dq = scale ds k,  dk = scale ds^T q,  dv = (p kept)^T dout
//
// Two kernels, each with the same result in every run: attention_backward_q owns queries and walks over keys,
// attention_backward_kv owns keys and walks over the queries of the heads that share them. No sum crosses blocks, so
// nothing is added atomically; the price is that scores and dout v^T are computed twice: 7 products of tiles instead of
// 5. Both keep p and ds in registers, where the accumulator of one product is the left operand of the next. A third
// kernel first turns dout, out, lse and dlse into one pair of floats per query.
#pragma once
#include "attention_sm80.cuh"

namespace ff {

// Per query lse in units of log2 (+inf where p must come out 0: no key seen, or behind the last query) and delta, in
// the workspace. Each head of each sequence has whole tiles of kPadding queries, so tiles are read without a
// comparison.
using Statistics = float2;
constexpr int kPadding = 128;

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Backward {
  Attention a;
  Statistics* statistics;
  int64_t head_stride;  // of statistics, between heads
  float* partial;       // (batch, num_heads, blocks, 2 max_distance + 1) summed gradients of the distance bias
};

// Where the statistics of a sequence's head begin; even, so that two of them can be copied as 16 bytes.
FF_DEVICE Statistics* statistics_of(const Backward& b, const Sequence& s, int batch, int head) {
  const int64_t first = b.a.cu_seqlens_q ? s.first_q / 2 * 2 + int64_t(batch) * (kPadding + 2)
                                         : int64_t(batch) * b.a.num_heads * b.head_stride;
  return b.statistics + first + head * b.head_stride;
}

// Elements between the statistics of two heads, and of all.
inline int64_t statistics_stride(const ff_attention_args* a) {
  return a->cu_seqlens_q ? padded(a->total_q + a->batch * (kPadding + 2), 2) : padded(a->seqlen_q, kPadding);
}
inline int64_t statistics_count(const ff_attention_args* a) {
  return statistics_stride(a) * a->num_heads * (a->cu_seqlens_q ? 1 : a->batch);
}

// Scores and dout v^T of a fragment -> p, with dropout's zeros and scale, and dz; both in place. statistics(i) are
// those of value i's query. derivative is filled, with a cap.
template <class T, bool Plain, bool Transposed, int N, class F>
FF_DEVICE void differentiate(const Attention& a, const Sequence& s, int batch, int head, Place<Transposed> at,
                             bool edge, float (&p)[N], float (&dz)[N], float (&derivative)[N], F statistics) {
  if constexpr (!Plain) {
    add_to_scores<T>(a, s, batch, head, at, edge, p, derivative);
  } else if (edge) {
    hide_outside(a, s, at, p);
  }
#pragma unroll
  for (int i = 0; i < N; i++) p[i] = exp2f(Plain ? p[i] * a.scale_log2 - statistics(i).x : p[i] - statistics(i).x);
  if constexpr (!Plain) {
    if (a.dropout.on) {
      const Kept<N> kept = keep_values<N>(a, first_row(a, s, batch, head), at);
#pragma unroll
      for (int i = 0; i < N; i++) {
        const float scale = kept[i] ? a.dropout.scale : 0.f;
        dz[i] = p[i] * (scale * dz[i] - statistics(i).y);
        p[i] *= scale;
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; i++) dz[i] = p[i] * (dz[i] - statistics(i).y);
}

// ---- one file per kernel --------------------------------------------------------------------------------------------
int attention_backward_q_sm80(const ff_attention_args* args, const Backward& b, void* stream);
int attention_backward_kv_sm80(const ff_attention_args* args, const Backward& b, void* stream);
// Blocks of queries that a head has in attention_backward_q: rows of Backward::partial.
int64_t attention_backward_q_blocks(const ff_attention_args* args);

inline bool bias_gradient_is_summed(const ff_attention_args* a) {
  return (a->dbias_stride[0] == 0 && a->batch > 1) || (a->dbias_stride[1] == 0 && a->num_heads > 1) ||
         (a->dbias_stride[2] == 0 && a->seqlen_q > 1);
}

}  // namespace ff
