// dk and dv of attention: the kernel that owns keys (attention_backward_sm80.cuh says how the parts fit together).
//
// A block owns 128 keys of a key/value head, 16 per warp (64 above dimension 128), and walks over the queries that see
// them, of every query head that reads this head. Products are transposed: with keys as rows, p^T and ds^T come out of
// the tensor cores as the left operands of dv += p^T dout and dk += ds^T q. Above dimension 128 the two sums do not fit
// in registers together and a kernel each computes them.
#include "attention_backward_sm80.cuh"

namespace ff {
namespace attention_sm80 {

enum class Wanted { both, dk, dv };

template <int D, bool Plain> struct BackwardKV {
  static constexpr int kWarps = D > 128 ? 4 : 8, kThreads = 32 * kWarps;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kQueries = Plain && D <= 64 ? 64 : 32;
  static constexpr int kStages = D > 128 ? 1 : 2;
  static constexpr int kStageElements = 2 * kQueries * D + kQueries * 4;  // q, dout, statistics
  static constexpr int kShared = (2 * kKeys * D + kStages * kStageElements) * 2;
  static_assert(kShared <= kSharedLimit && kPadding % kQueries == 0, "fits every GPU");
};

template <class T, int D, bool Plain, Wanted W>
__global__ void __launch_bounds__(BackwardKV<D, Plain>::kThreads)
    attention_backward_kv(const __grid_constant__ Backward b) {
  using Tile = BackwardKV<D, Plain>;
  constexpr int N = Tile::kQueries / 2, kThreads = Tile::kThreads;
  const Attention& a = b.a;
  FF_DYNAMIC_SHARED(T, shared);
  T *k_tile = shared, *v_tile = k_tile + Tile::kKeys * D, *stages = v_tile + Tile::kKeys * D;
  const int lane = threadIdx.x % 32, own_row = int(threadIdx.x / 32) * 16;

  const int blocks = (a.seqlen_k + Tile::kKeys - 1) / Tile::kKeys, kv_heads = a.num_heads / a.heads_per_kv;
  const int key = int(blockIdx.x % blocks) * Tile::kKeys;
  const int kv_head = int(blockIdx.x / blocks) % kv_heads, batch = int(blockIdx.x / blocks) / kv_heads;
  const Sequence s = find_sequence(a, batch);
  if (key >= s.seqlen_k) return;
  const Range seen = queries_of(a, s, key, min(key + Tile::kKeys, s.seqlen_k));
  const int first_query = seen.begin / Tile::kQueries * Tile::kQueries;
  const bool any = seen.begin < seen.end;

  const auto load = [&](int stage, int head, int query) {
    T* to = stages + stage * Tile::kStageElements;
    const T* q = sequence_start(a, static_cast<const T*>(a.q), a.q_stride, batch, head, s.first_q);
    const T* dout = sequence_start(a, static_cast<const T*>(a.dout), a.dout_stride, batch, head, s.first_q);
    load_tile<Tile::kQueries, D, kThreads>(to, q, a.q_stride[2], query, s.seqlen_q, a.head_dim);
    load_tile<Tile::kQueries, D, kThreads>(to + Tile::kQueries * D, dout, a.dout_stride[2], query, s.seqlen_q,
                                           a.head_dim_v);
    if (threadIdx.x < Tile::kQueries / 2)
      cp_async16(to + 2 * Tile::kQueries * D + threadIdx.x * 8,
                 statistics_of(b, s, batch, head) + query + threadIdx.x * 2);
  };

  float dk[1][D / 2] = {}, dv[1][D / 2] = {};
  const int first_head = kv_head * a.heads_per_kv, end_head = any ? first_head + a.heads_per_kv : first_head;
  if (any) {
    const T* k = sequence_start(a, static_cast<const T*>(a.k), a.k_stride, batch, kv_head, s.first_k);
    const T* v = sequence_start(a, static_cast<const T*>(a.v), a.v_stride, batch, kv_head, s.first_k);
    load_tile<Tile::kKeys, D, kThreads>(k_tile, k, a.k_stride[2], key, s.seqlen_k, a.head_dim);
    load_tile<Tile::kKeys, D, kThreads>(v_tile, v, a.v_stride[2], key, s.seqlen_k, a.head_dim_v);
    load(0, first_head, first_query);
    cp_async_commit();
  }
  int stage = 0;
  for (int head = first_head, query = first_query; head < end_head;) {
    int next_head = head, next_query = query + Tile::kQueries;
    if (next_query >= seen.end) next_head = head + 1, next_query = first_query;
    if (Tile::kStages == 2) {
      if (next_head < end_head) load(stage ^ 1, next_head, next_query);
      cp_async_commit();
    }
    cp_async_wait<Tile::kStages - 1>();
    __syncthreads();  // this step's tiles are there

    const T *q_tile = stages + stage * Tile::kStageElements, *dout_tile = q_tile + Tile::kQueries * D;
    const Statistics* statistics = reinterpret_cast<const Statistics*>(dout_tile + Tile::kQueries * D) + lane % 4 * 2;
    const Place<true> at{query + lane % 4 * 2, key + own_row + lane / 4};
    const bool edge = touches_edge(a, s, query, Tile::kQueries, key, Tile::kKeys);
    float p[1][N], dz[1][N], derivative[N];
    multiply_transposed<T, D>(p, SharedRows<T, D, 1>{k_tile, own_row}, q_tile);
    if constexpr (W != Wanted::dv) {
      multiply_transposed<T, D>(dz, SharedRows<T, D, 1>{v_tile, own_row}, dout_tile);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) dz[0][i] = 0.f;
    }
    differentiate<T, Plain>(a, s, batch, head, at, edge, p[0], dz[0], derivative,
                            [&](int i) { return statistics[i / 4 * 8 + i % 2]; });
    if constexpr (W != Wanted::dk) multiply_add<T, D>(dv, p, dout_tile);
    if constexpr (W != Wanted::dv) {
      if (!Plain && a.softcap > 0) {
#pragma unroll
        for (int i = 0; i < N; i++) dz[0][i] *= derivative[i];
      }
      multiply_add<T, D>(dk, dz, q_tile);
    }
    __syncthreads();  // nobody reads this step's tiles any more
    if (Tile::kStages == 1) {
      if (next_head < end_head) load(0, next_head, next_query);
      cp_async_commit();
    }
    stage = (stage + 1) % Tile::kStages;
    head = next_head, query = next_query;
  }
  cp_async_wait<0>();

  if constexpr (W != Wanted::dv) {
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[0][i] *= a.scale;
    T* to = sequence_start(a, static_cast<T*>(a.dk), a.dk_stride, batch, kv_head, s.first_k);
    store_rows<T, D>(dk, k_tile, own_row, to, a.dk_stride[2], key, s.seqlen_k, a.head_dim);
  }
  if constexpr (W != Wanted::dk) {
    T* to = sequence_start(a, static_cast<T*>(a.dv), a.dv_stride, batch, kv_head, s.first_k);
    store_rows<T, D>(dv, v_tile, own_row, to, a.dv_stride[2], key, s.seqlen_k, a.head_dim_v);
  }
}

}  // namespace attention_sm80

int attention_backward_kv_sm80(const ff_attention_args* args, const Backward& b, void* stream) {
  using namespace attention_sm80;
  return for_attention_kernels(args, is_plain(b.a), [&](auto t, auto d, auto plain) {
    using T = decltype(t);
    constexpr int D = d.value;
    constexpr bool kPlain = plain.value;
    using Tile = BackwardKV<D, kPlain>;
    const int64_t blocks = (args->seqlen_k + Tile::kKeys - 1) / Tile::kKeys * args->num_kv_heads * args->batch;
    if (blocks == 0) return int(FF_OK);
    if (blocks > INT32_MAX) return fail(FF_UNSUPPORTED, "batch, num_kv_heads, seqlen_k: too many keys");
    const auto run = [&](const char* name, void (*kernel)(Backward)) {
      return launch(name, kernel, dim3(unsigned(blocks)), dim3(Tile::kThreads), Tile::kShared, stream, b);
    };
    if constexpr (D <= 128) return run("attention_backward_kv", attention_backward_kv<T, D, kPlain, Wanted::both>);
    else {
      if (int status = run("attention_backward_k", attention_backward_kv<T, D, kPlain, Wanted::dk>)) return status;
      return run("attention_backward_v", attention_backward_kv<T, D, kPlain, Wanted::dv>);
    }
  });
}

}  // namespace ff
