// Attention forward with Ampere's tensor cores: out = dropout(softmax(scores)) v and lse, never holding the scores.
//
// FlashAttention-2 (Dao 2023, arXiv:2307.08691), algorithm 1. A block owns 128 queries of a head (64 for head
// dimensions over 128), 32 per warp where registers allow, so that a fragment of keys or values read from shared memory
// serves two products; it walks over the keys that causal mask and window leave, with a running maximum and sum per
// query. While the scores are computed the values arrive, and while the values are used the next keys: two buffers, no
// third.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c attention_forward_sm80.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c attention_forward_sm80.cu
#include "attention_sm80.cuh"

namespace ff {
namespace attention_sm80 {

// The largest tiles that stay in registers.
template <int D, bool Plain> struct Forward {
  static constexpr int kTiles = D <= 64 || (Plain && D <= 128) ? 2 : 1;  // of 16 queries per warp
  static constexpr int kWarps = kTiles == 2 || D > 128 ? 4 : 8, kThreads = 32 * kWarps;
  static constexpr int kQueries = 16 * kTiles * kWarps;
  static constexpr int kKeys = !Plain || D == 128 ? 32 : D == 96 ? 48 : 64;
  static constexpr int kShared = (kQueries + 2 * kKeys) * D * 2;
  static_assert(kShared <= kSharedLimit, "fits every GPU");
};

template <class T, int D, bool Plain>
__global__ void __launch_bounds__(Forward<D, Plain>::kThreads) attention_forward(const __grid_constant__ Attention a) {
  using Tile = Forward<D, Plain>;
  constexpr int M = Tile::kTiles, N = Tile::kKeys / 2;
  FF_DYNAMIC_SHARED(T, shared);
  T *q_tile = shared, *k_tile = q_tile + Tile::kQueries * D, *v_tile = k_tile + Tile::kKeys * D;
  const int lane = threadIdx.x % 32, own_row = int(threadIdx.x / 32) * 16 * M;

  // The last queries first: under a causal mask they take longest.
  const int blocks = (a.seqlen_q + Tile::kQueries - 1) / Tile::kQueries;
  const int query = (blocks - 1 - int(blockIdx.x % blocks)) * Tile::kQueries;
  const int head = int(blockIdx.x / blocks) % a.num_heads, batch = int(blockIdx.x / blocks) / a.num_heads;
  const Sequence s = find_sequence(a, batch);
  if (query >= s.seqlen_q) return;
  const Range seen = keys_of(a, s, query, min(query + Tile::kQueries, s.seqlen_q));
  const bool any = seen.begin < seen.end;
  const int first_key = any ? seen.begin / Tile::kKeys * Tile::kKeys : seen.end, kv_head = head / a.heads_per_kv;
  const int64_t row = first_row(a, s, batch, head);
  const T* q = sequence_start(a, static_cast<const T*>(a.q), a.q_stride, batch, head, s.first_q);
  const T* k = sequence_start(a, static_cast<const T*>(a.k), a.k_stride, batch, kv_head, s.first_k);
  const T* v = sequence_start(a, static_cast<const T*>(a.v), a.v_stride, batch, kv_head, s.first_k);

  float out[M][D / 2] = {}, sum[M][2] = {}, top[M][2];
#pragma unroll
  for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY;

  if (any) {
    load_tile<Tile::kQueries, D, Tile::kThreads>(q_tile, q, a.q_stride[2], query, s.seqlen_q, a.head_dim);
    load_tile<Tile::kKeys, D, Tile::kThreads>(k_tile, k, a.k_stride[2], first_key, s.seqlen_k, a.head_dim);
    cp_async_commit();
  }
  for (int key = first_key; key < seen.end; key += Tile::kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, and nobody reads the last values any more
    load_tile<Tile::kKeys, D, Tile::kThreads>(v_tile, v, a.v_stride[2], key, s.seqlen_k, a.head_dim_v);
    cp_async_commit();
    float p[M][N];
    multiply_transposed<T, D>(p, SharedRows<T, D, M>{q_tile, own_row}, k_tile);
    cp_async_wait<0>();
    __syncthreads();  // the values are there, and nobody reads the keys any more
    if (key + Tile::kKeys < seen.end)
      load_tile<Tile::kKeys, D, Tile::kThreads>(k_tile, k, a.k_stride[2], key + Tile::kKeys, s.seqlen_k, a.head_dim);
    cp_async_commit();

    const bool edge = touches_edge(a, s, query, Tile::kQueries, key, Tile::kKeys);
    const float scale = Plain ? a.scale_log2 : 1.f;
#pragma unroll
    for (int m = 0; m < M; m++) {
      const Place<false> at{query + own_row + m * 16 + lane / 4, key + lane % 4 * 2};
      if constexpr (!Plain) {
        float unused[N];
        add_to_scores<T>(a, s, batch, head, at, edge, p[m], unused);
      } else if (edge) {
        hide_outside(a, s, at, p[m]);
      }
      float factor[2], shift[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float most = top[m][h];
#pragma unroll
        for (int i = 2 * h; i < N; i += i % 2 ? 3 : 1) most = fmaxf(most, p[m][i]);
        most = max_of_quad(most);
        shift[h] = most == -INFINITY ? 0.f : most * scale;
        factor[h] = exp2f(top[m][h] * scale - shift[h]);
        top[m][h] = most;
        sum[m][h] *= factor[h];
      }
#pragma unroll
      for (int i = 0; i < N; i++) {
        p[m][i] = exp2f(p[m][i] * scale - shift[i / 2 % 2]);
        sum[m][i / 2 % 2] += p[m][i];
      }
#pragma unroll
      for (int i = 0; i < D / 2; i++) out[m][i] *= factor[i / 2 % 2];
      if constexpr (!Plain) {
        if (a.dropout.on) {
          const Kept<N> kept = keep_values<N>(a, row, at);
#pragma unroll
          for (int i = 0; i < N; i++) p[m][i] = kept[i] ? p[m][i] : 0.f;
        }
      }
    }
    multiply_add<T, D>(out, p, v_tile);
  }
  cp_async_wait<0>();

#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float total = sum_of_quad(sum[m][h]);  // NaN passes through
      const float inverse = total == 0.f ? 0.f : (Plain ? 1.f : a.dropout.scale) / total;
#pragma unroll
      for (int i = 2 * h; i < D / 2; i += i % 2 ? 3 : 1) out[m][i] *= inverse;
      const int i = query + own_row + m * 16 + lane / 4 + 8 * h;
      if (lane % 4 == 0 && i < s.seqlen_q)
        a.lse[row + i] = total == 0.f ? -INFINITY : (top[m][h] * (Plain ? a.scale_log2 : 1.f) + log2f(total)) * kLn2;
    }
  }
  T* to = sequence_start(a, static_cast<T*>(a.out), a.out_stride, batch, head, s.first_q);
  store_rows<T, D>(out, q_tile, own_row, to, a.out_stride[2], query, s.seqlen_q, a.head_dim_v);
}

}  // namespace attention_sm80

int attention_forward_sm80(const ff_attention_args* args, void* stream) {
  using namespace attention_sm80;
  const Attention a = make_attention(args);
  return for_attention_kernels(args, is_plain(a), [&](auto t, auto d, auto plain) {
    using Tile = Forward<d.value, plain.value>;
    const int64_t blocks = (args->seqlen_q + Tile::kQueries - 1) / Tile::kQueries * args->num_heads * args->batch;
    if (blocks == 0) return int(FF_OK);
    if (blocks > INT32_MAX) return fail(FF_UNSUPPORTED, "batch, num_heads, seqlen_q: too many queries");
    return launch("attention_forward", attention_forward<decltype(t), d.value, plain.value>, dim3(unsigned(blocks)),
                  dim3(Tile::kThreads), Tile::kShared, stream, a);
  });
}

}  // namespace ff
