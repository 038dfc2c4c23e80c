// What the attention kernels of every GPU generation share: the kernel's argument, which keys a block of queries sees,
// what is added to a score, the derivative of the cap, and the dropout mask.
//
// fastformer.h has the formula. Two choices keep it cheap. Causal masks, sliding windows and the end alignment are one
// interval of distances j - p(i), so visibility is two comparisons, and only in blocks that touch an edge of it. And
// scores are kept in units of log2: the softmax is then one exp2 per element, and the scale costs nothing.
//
// Scores come as fragments of tensor-core accumulators: value 4 n + 2 h + e of a thread lies 8 n + e columns and 8 h
// rows from its first one (mma_m16n8k16 of sm80.h, wgmma_m64k16 of sm90.h). Place<Transposed> says what that first one
// is: rows are queries and columns keys, or, transposed, the other way round.
#pragma once
#include <algorithm>

#include "common.cuh"
#include "philox.cuh"
#include "row.cuh"

namespace ff {

// One family of kernels per generation; sm_90's covers part of what sm_80's does.
int attention_forward_sm80(const ff_attention_args* a, void* stream);
int attention_backward_sm80(const ff_attention_args* a, void* stream);
size_t attention_backward_workspace_sm80(const ff_attention_args* a);
bool attention_supported_sm90(const ff_attention_args* a, bool backward);
int attention_forward_sm90(const ff_attention_args* a, void* stream);
int attention_backward_sm90(const ff_attention_args* a, void* stream);
size_t attention_backward_workspace_sm90(const ff_attention_args* a);

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr int kFar = 1 << 30;          // a distance beyond all others
constexpr int kMaxSeqlen = 1 << 29;    // so that positions and distances, kFar included, are ints

struct Range {
  int begin, end;
};

// The first and the last distance j - p(i) at which query i sees key j.
inline Range seen_distances(bool causal, bool windowed, int64_t left, int64_t right) {
  Range r{-kFar, causal ? 0 : kFar};
  if (windowed && left >= 0) r.begin = -int(std::min<int64_t>(left, kFar));
  if (windowed && right >= 0) r.end = std::min(r.end, int(std::min<int64_t>(right, kFar)));
  return r;
}

// ff_attention_args as the kernels read it; one kernel parameter.
struct Attention {
  const void *q, *k, *v, *dout;
  void *out, *dq, *dk, *dv;
  float* lse;
  const float* dlse;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int64_t dout_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];
  int batch, num_heads, heads_per_kv, seqlen_q, seqlen_k, head_dim, head_dim_v;
  int first_distance, last_distance;  // query i sees key j if j - p(i) is in [first, last]
  bool top_left;
  float scale, scale_log2;
  float softcap, softcap_log2, inverse_softcap;  // softcap 0 = none
  bool bias_is_float;
  const uint8_t *key_padding_mask, *mask;
  const void* bias;
  const float *distance_bias, *alibi_slopes;
  int64_t key_padding_mask_stride, alibi_stride, mask_stride[3], bias_stride[3];
  int max_distance;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  int64_t total_q;
  Dropout dropout;
  float *dbias, *ddistance_bias;
  int64_t dbias_stride[3];
};

inline Attention make_attention(const ff_attention_args* a) {
  Attention k{};
  k.q = a->q, k.k = a->k, k.v = a->v, k.dout = a->dout;
  k.out = a->out, k.dq = a->dq, k.dk = a->dk, k.dv = a->dv;
  k.lse = static_cast<float*>(a->lse), k.dlse = static_cast<const float*>(a->dlse);
  for (int i = 0; i < 3; i++) {
    k.q_stride[i] = a->q_stride[i], k.k_stride[i] = a->k_stride[i], k.v_stride[i] = a->v_stride[i];
    k.out_stride[i] = a->out_stride[i], k.dout_stride[i] = a->dout_stride[i];
    k.dq_stride[i] = a->dq_stride[i], k.dk_stride[i] = a->dk_stride[i], k.dv_stride[i] = a->dv_stride[i];
    k.mask_stride[i] = a->mask_stride[i], k.bias_stride[i] = a->bias_stride[i];
    k.dbias_stride[i] = a->dbias_stride[i];
  }
  k.batch = int(a->batch), k.num_heads = int(a->num_heads), k.heads_per_kv = int(a->num_heads / a->num_kv_heads);
  k.seqlen_q = int(a->seqlen_q), k.seqlen_k = int(a->seqlen_k);
  k.head_dim = int(a->head_dim), k.head_dim_v = int(a->head_dim_v);
  const Range distances = seen_distances(a->causal, a->windowed, a->window_left, a->window_right);
  k.first_distance = distances.begin, k.last_distance = distances.end;
  k.top_left = a->top_left;
  k.scale = float(a->scale), k.scale_log2 = float(a->scale * 1.4426950408889634);
  k.softcap = float(a->softcap), k.softcap_log2 = float(a->softcap * 1.4426950408889634);
  k.inverse_softcap = a->softcap > 0 ? float(1 / a->softcap) : 0.f;
  k.bias_is_float = a->bias_dtype == FF_FLOAT32;
  k.key_padding_mask = a->key_padding_mask, k.key_padding_mask_stride = a->key_padding_mask_stride;
  k.mask = a->mask, k.bias = a->bias;
  k.distance_bias = static_cast<const float*>(a->distance_bias), k.max_distance = int(a->max_distance);
  k.alibi_slopes = a->alibi_slopes, k.alibi_stride = a->alibi_stride;
  k.cu_seqlens_q = a->cu_seqlens_q, k.cu_seqlens_k = a->cu_seqlens_k, k.total_q = a->total_q;
  k.dropout = make_dropout(a->dropout_p, a->seed);
  k.dbias = static_cast<float*>(a->dbias), k.ddistance_bias = static_cast<float*>(a->ddistance_bias);
  return k;
}

// Whether scores are scale q k^T and nothing else; causal, windowed, packed and grouped calls are plain too. A positive
// scale lets a kernel take the maximum before it scales.
inline bool is_plain(const Attention& a) {
  return !a.key_padding_mask && !a.mask && !a.bias && !a.distance_bias && !a.alibi_slopes && !(a.softcap > 0) &&
         !a.dropout.on && a.scale > 0;
}

// ---- one sequence ---------------------------------------------------------------------------------------------------
// Of the tensors' position dimension: where the sequence starts (packed) and how long it is.
struct Sequence {
  int seqlen_q, seqlen_k;
  int offset;  // p(i) - i
  int64_t first_q, first_k;
};

FF_DEVICE Sequence find_sequence(const Attention& a, int batch) {
  Sequence s{a.seqlen_q, a.seqlen_k, 0, 0, 0};
  if (a.cu_seqlens_q) {
    s.first_q = a.cu_seqlens_q[batch], s.first_k = a.cu_seqlens_k[batch];
    s.seqlen_q = a.cu_seqlens_q[batch + 1] - int(s.first_q), s.seqlen_k = a.cu_seqlens_k[batch + 1] - int(s.first_k);
  }
  s.offset = a.top_left ? 0 : s.seqlen_k - s.seqlen_q;
  return s;
}

// Where position 0 of the sequence begins in a tensor (batch, head, position, dim) with these strides; `first` is the
// sequence's first_q or first_k.
template <class T>
FF_DEVICE T* sequence_start(const Attention& a, T* tensor, const int64_t (&stride)[3], int batch, int head,
                            int64_t first) {
  return tensor + (a.cu_seqlens_q ? first * stride[2] : batch * stride[0]) + head * stride[1];
}

// The row of query 0, which numbers lse, dlse and the rows of the dropout mask.
FF_DEVICE int64_t first_row(const Attention& a, const Sequence& s, int batch, int head) {
  return a.cu_seqlens_q ? head * a.total_q + s.first_q : (int64_t(batch) * a.num_heads + head) * a.seqlen_q;
}

// The keys that any of the queries [begin, end) sees, as far as distance says; may be empty (begin >= end).
FF_DEVICE Range keys_of(const Attention& a, const Sequence& s, int begin, int end) {
  return {max(0, begin + s.offset + a.first_distance), min(s.seqlen_k, end + s.offset + a.last_distance)};
}
// The queries that see any of the keys [begin, end).
FF_DEVICE Range queries_of(const Attention& a, const Sequence& s, int begin, int end) {
  return {max(0, begin - s.offset - a.last_distance), min(s.seqlen_q, end - s.offset - a.first_distance)};
}
// Whether some query of [query, query + queries) does not see some key of [key, key + keys).
FF_DEVICE bool touches_edge(const Attention& a, const Sequence& s, int query, int queries, int key, int keys) {
  const int nearest = key - (query + s.offset);  // distances: from nearest - queries + 1 to nearest + keys - 1
  return key + keys > s.seqlen_k || nearest + keys - 1 > a.last_distance || nearest - queries + 1 < a.first_distance;
}

// ---- elements of a score fragment -----------------------------------------------------------------------------------
template <bool Transposed> struct Place {
  int query, key;  // of value 0
  FF_DEVICE int query_of(int i) const { return query + (Transposed ? 8 * (i / 4) + i % 2 : 8 * (i / 2 % 2)); }
  FF_DEVICE int key_of(int i) const { return key + (Transposed ? 8 * (i / 2 % 2) : 8 * (i / 4) + i % 2); }
};

// The sum, or maximum, over the 4 threads that hold a row of a fragment.
FF_DEVICE float sum_of_quad(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
FF_DEVICE float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Hides, as -inf, what lies outside of the interval of distances or behind the last key.
template <bool Transposed, int N>
FF_DEVICE void hide_outside(const Attention& a, const Sequence& s, Place<Transposed> at, float (&score)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int key = at.key_of(i), distance = key - (at.query_of(i) + s.offset);
    if (key >= s.seqlen_k || distance < a.first_distance || distance > a.last_distance) score[i] = -INFINITY;
  }
}

// tanh by exp2: tanh.approx is off by 2^-11, which a cap multiplies.
FF_DEVICE float tanh_exp2(float x) { return 1.f - __fdividef(2.f, exp2f(x * (2 * kLog2e)) + 1.f); }

// q k^T of one head's block -> the whole score, in units of log2, -inf where hidden. `edge`: the block touches_edge, or
// has queries past the last one. With a cap, derivative becomes d capped / d (scale q k^T); it is not touched without.
template <class T, bool Transposed, int N>
FF_DEVICE void add_to_scores(const Attention& a, const Sequence& s, int batch, int head, Place<Transposed> at,
                             bool edge, float (&score)[N], float (&derivative)[N]) {
  if (a.softcap > 0) {
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float t = tanh_exp2(score[i] * a.scale * a.inverse_softcap);
      derivative[i] = 1.f - t * t;
      score[i] = t * a.softcap_log2;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) score[i] *= a.scale_log2;
  }
  if (a.bias) {
    const int64_t start = batch * a.bias_stride[0] + head * a.bias_stride[1];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int query = at.query_of(i), key = at.key_of(i);
      if (query >= s.seqlen_q || key >= s.seqlen_k) continue;
      const int64_t element = start + query * a.bias_stride[2] + key;
      const float bias = a.bias_is_float ? __ldg(static_cast<const float*>(a.bias) + element)
                                         : to_float(static_cast<const T*>(a.bias)[element]);
      score[i] += bias * kLog2e;
    }
  }
  if (a.distance_bias) {
    const float* by_distance = a.distance_bias + head * (2 * int64_t(a.max_distance) + 1) + a.max_distance;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int distance = at.key_of(i) - (at.query_of(i) + s.offset);
      score[i] += __ldg(by_distance + max(-a.max_distance, min(distance, a.max_distance))) * kLog2e;
    }
  }
  if (a.alibi_slopes) {
    const float slope = a.alibi_slopes[batch * a.alibi_stride + head] * kLog2e;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int distance = at.key_of(i) - (at.query_of(i) + s.offset);
      score[i] -= slope * float(distance < 0 ? -distance : distance);
    }
  }
  if (a.key_padding_mask) {
    const uint8_t* padding = a.key_padding_mask + batch * a.key_padding_mask_stride;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int key = at.key_of(i);
      if (key < s.seqlen_k && __ldg(padding + key)) score[i] = -INFINITY;
    }
  }
  if (a.mask) {
    const int64_t start = batch * a.mask_stride[0] + head * a.mask_stride[1];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int query = at.query_of(i), key = at.key_of(i);
      if (query < s.seqlen_q && key < s.seqlen_k && !__ldg(a.mask + start + query * a.mask_stride[2] + key))
        score[i] = -INFINITY;
    }
  }
  if (edge) hide_outside(a, s, at, score);
}

// Of each value of a fragment, whether dropout keeps it.
template <int N> struct Kept {
  uint32_t bits[(N + 31) / 32];
  FF_DEVICE bool operator[](int i) const { return bits[i / 32] >> i % 32 & 1; }
};
// `row` is first_row. The fragment's first key is a multiple of 32
// (transposed: of 16) plus what the thread's place in the fragment adds. The numbering of fastformer.h lets one
// evaluation of Philox serve 4 values (transposed: 2).
template <int N, bool Transposed>
FF_DEVICE Kept<N> keep_values(const Attention& a, int64_t row, Place<Transposed> at) {
  Kept<N> kept{};
  uint32_t words[4];
  const auto set = [&](int i, uint32_t bits) { kept.bits[i / 32] |= uint32_t(bits >= a.dropout.threshold) << i % 32; };
  if constexpr (Transposed) {
    const bool upper = at.key % 32 >= 16;
#pragma unroll
    for (int i = 0; i < N; i += i % 4 == 0 ? 1 : 3) {  // 0, 1, 4, 5, 8, ...: one for each query
      philox(uint32_t(at.key / 32 * 8 + at.key % 8), uint64_t(row + at.query_of(i)), a.dropout.seed, words);
      set(i, upper ? words[2] : words[0]);
      set(i + 2, upper ? words[3] : words[1]);
    }
  } else {
    static_assert(N % 16 == 0, "whole groups of 32 keys");
#pragma unroll
    for (int group = 0; group < N; group += 16) {
#pragma unroll
      for (int i = group; i < group + 4; i++) {
        const int key = at.key_of(i);
        philox(uint32_t(key / 32 * 8 + key % 8), uint64_t(row + at.query_of(i)), a.dropout.seed, words);
#pragma unroll
        for (int w = 0; w < 4; w++) set(i + 4 * w, words[w]);
      }
    }
  }
  return kept;
}

}  // namespace ff
