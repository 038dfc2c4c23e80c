// dq of attention, and the gradients of what is added to its scores: the kernel that owns queries
// (attention_backward_sm80.cuh says how the parts fit together).
//
// A block owns 128 queries of a head, 16 per warp, whose rows of q and dout stay in registers (64 and in shared memory
// above dimension 128), and walks over the keys they see. dbias is stored as it is found where every score has its own
// (attention_backward_bias sums the others). For ddistance_bias a block sums the diagonals of each tile of dz, a thread
// per diagonal, into a row of its own in the workspace; a second kernel adds the rows in order.
#include "attention_backward_sm80.cuh"

namespace ff {
namespace attention_sm80 {

template <int D, bool Plain> struct BackwardQ {
  static constexpr bool kInRegisters = D <= 128;  // q and dout
  static constexpr int kWarps = kInRegisters ? 8 : 4, kThreads = 32 * kWarps;
  static constexpr int kQueries = 16 * kWarps;
  static constexpr int kKeys = Plain && D <= 64 ? 64 : 32;
  static constexpr int kStages = kInRegisters ? 2 : 1;
  static constexpr int kRows = 2 * kQueries * D, kStageElements = 2 * kKeys * D;
  // dz in float, padded against bank conflicts; above dimension 128 in place of v, which has been used by then.
  static constexpr int kDzStride = kKeys + 8, kDzElements = Plain ? 0 : 2 * kQueries * kDzStride;
  static constexpr int kElements = !kInRegisters ? kRows + kStageElements
                                   : kRows > 2 * kStageElements + kDzElements ? kRows
                                                                              : 2 * kStageElements + kDzElements;
  static constexpr int kShared = kElements * 2;
  static_assert(kShared <= kSharedLimit && (kInRegisters || kDzElements <= kKeys * D), "fits every GPU");
};

// One block's sums of dz per distance, in the row of its number. Distances that clamp to the ends gather in registers
// until the end.
template <int Queries, int Keys, int Stride, int Threads> struct DistanceSums {
  const Backward& b;
  float low = 0.f, high = 0.f;

  FF_DEVICE int most() const { return b.a.max_distance; }
  FF_DEVICE float* row() const { return b.partial + blockIdx.x * (2 * int64_t(most()) + 1); }
  FF_DEVICE void start() {
    for (int64_t i = threadIdx.x; i <= 2 * int64_t(most()); i += Threads) row()[i] = 0.f;
    __syncthreads();
  }
  // All of one tile, whose first key lies `distance` from its first query. Every thread of the block calls.
  template <int N> FF_DEVICE void add(const float (&dz)[N], int own_row, int distance, float* tile) {
    const bool all_low = distance + Keys - 1 <= -most(), all_high = distance - Queries + 1 >= most();
    if (all_low || all_high) {
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < N; i++) sum += dz[i];
      (all_low ? low : high) += sum;
      return;
    }
    const int lane = threadIdx.x % 32;
    __syncthreads();  // nobody reads what lay here, the last tile included
#pragma unroll
    for (int i = 0; i < N; i += 2)
      *reinterpret_cast<float2*>(tile + (own_row + lane / 4 + i / 2 % 2 * 8) * Stride + i / 4 * 8 + lane % 4 * 2) =
          make_float2(dz[i], dz[i + 1]);
    __syncthreads();
    const int diagonal = int(threadIdx.x) - (Queries - 1);  // key - query within the tile
    if (diagonal < Keys) {
      float sum = 0.f;
#pragma unroll 8
      for (int key = 0; key < Keys; key++) {
        const int query = key - diagonal;
        if (query >= 0 && query < Queries) sum += tile[query * Stride + key];
      }
      const int at = distance + diagonal;
      if (at <= -most()) low += sum;
      else if (at >= most()) high += sum;
      else row()[at + most()] += sum;
    }
  }
  FF_DEVICE void finish(float* scratch) {
    __syncthreads();
    scratch[threadIdx.x] = low, scratch[Threads + threadIdx.x] = high;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < Threads; i++) low += scratch[i], high += scratch[Threads + i];
      row()[0] += low;
      row()[2 * int64_t(most())] += high;
    }
  }
};

template <class T, int D, bool Plain>
__global__ void __launch_bounds__(BackwardQ<D, Plain>::kThreads)
    attention_backward_q(const __grid_constant__ Backward b) {
  using Tile = BackwardQ<D, Plain>;
  constexpr int N = Tile::kKeys / 2, kThreads = Tile::kThreads;
  const Attention& a = b.a;
  FF_DYNAMIC_SHARED(T, shared);
  T *q_tile = shared, *dout_tile = q_tile + Tile::kQueries * D;
  T* stages = Tile::kInRegisters ? shared : shared + Tile::kRows;
  const int lane = threadIdx.x % 32, own_row = int(threadIdx.x / 32) * 16;

  const int blocks = (a.seqlen_q + Tile::kQueries - 1) / Tile::kQueries;
  const int query = (blocks - 1 - int(blockIdx.x % blocks)) * Tile::kQueries;
  const int head = int(blockIdx.x / blocks) % a.num_heads, batch = int(blockIdx.x / blocks) / a.num_heads;
  const int kv_head = head / a.heads_per_kv;
  const Sequence s = find_sequence(a, batch);
  DistanceSums<Tile::kQueries, Tile::kKeys, Tile::kDzStride, kThreads> distances{b};
  const bool by_distance = !Plain && a.ddistance_bias;
  if (by_distance) distances.start();
  if (query >= s.seqlen_q) return;
  const Range seen = keys_of(a, s, query, min(query + Tile::kQueries, s.seqlen_q));
  const bool any = seen.begin < seen.end;
  const int first_key = any ? seen.begin / Tile::kKeys * Tile::kKeys : seen.end;

  const T* k = sequence_start(a, static_cast<const T*>(a.k), a.k_stride, batch, kv_head, s.first_k);
  const T* v = sequence_start(a, static_cast<const T*>(a.v), a.v_stride, batch, kv_head, s.first_k);
  const auto load = [&](int stage, int key) {
    T* to = stages + stage * Tile::kStageElements;
    load_tile<Tile::kKeys, D, kThreads>(to, k, a.k_stride[2], key, s.seqlen_k, a.head_dim);
    load_tile<Tile::kKeys, D, kThreads>(to + Tile::kKeys * D, v, a.v_stride[2], key, s.seqlen_k, a.head_dim_v);
  };

  float dq[1][D / 2] = {};
  std::conditional_t<Tile::kInRegisters, RegisterRows<T, D>, SharedRows<T, D, 1, Plain ? 4 : 1>> q_rows{}, dout_rows{};
  if (any) {
    const T* q = sequence_start(a, static_cast<const T*>(a.q), a.q_stride, batch, head, s.first_q);
    const T* dout = sequence_start(a, static_cast<const T*>(a.dout), a.dout_stride, batch, head, s.first_q);
    load_tile<Tile::kQueries, D, kThreads>(q_tile, q, a.q_stride[2], query, s.seqlen_q, a.head_dim);
    load_tile<Tile::kQueries, D, kThreads>(dout_tile, dout, a.dout_stride[2], query, s.seqlen_q, a.head_dim_v);
    cp_async_commit();
    if constexpr (Tile::kInRegisters) {
      cp_async_wait<0>();
      __syncthreads();
      q_rows.read(q_tile, own_row), dout_rows.read(dout_tile, own_row);
      __syncthreads();
    } else {
      q_rows = {q_tile, own_row}, dout_rows = {dout_tile, own_row};
    }
    load(0, first_key);
    cp_async_commit();
  }
  const Statistics* own = statistics_of(b, s, batch, head) + query + own_row + lane / 4;
  const Statistics statistics[2] = {own[0], own[8]};

  int stage = 0;
  for (int key = first_key; key < seen.end; key += Tile::kKeys) {
    const int next = key + Tile::kKeys;
    if (Tile::kStages == 2) {
      if (next < seen.end) load(stage ^ 1, next);
      cp_async_commit();
    }
    cp_async_wait<Tile::kStages - 1>();
    __syncthreads();  // this step's tiles are there

    T *k_tile = stages + stage * Tile::kStageElements, *v_tile = k_tile + Tile::kKeys * D;
    const Place<false> at{query + own_row + lane / 4, key + lane % 4 * 2};
    const bool edge = touches_edge(a, s, query, Tile::kQueries, key, Tile::kKeys);
    float p[1][N], dz[1][N], derivative[N];
    multiply_transposed<T, D>(p, q_rows, k_tile);
    multiply_transposed<T, D>(dz, dout_rows, v_tile);
    differentiate<T, Plain>(a, s, batch, head, at, edge, p[0], dz[0], derivative,
                            [&](int i) { return statistics[i / 2 % 2]; });
    if constexpr (!Plain) {
      if (a.dbias) {
        float* dbias = a.dbias + batch * a.dbias_stride[0] + head * a.dbias_stride[1];
#pragma unroll
        for (int i = 0; i < N; i++) {
          const int row = at.query_of(i), col = at.key_of(i);
          if (row < s.seqlen_q && col < s.seqlen_k) dbias[row * a.dbias_stride[2] + col] = dz[0][i];
        }
      }
      if (by_distance) {
        float* tile = reinterpret_cast<float*>(Tile::kInRegisters ? stages + 2 * Tile::kStageElements : v_tile);
        distances.add(dz[0], own_row, key - (query + s.offset), tile);
      }
      if (a.softcap > 0) {
#pragma unroll
        for (int i = 0; i < N; i++) dz[0][i] *= derivative[i];
      }
    }
    multiply_add<T, D>(dq, dz, k_tile);
    __syncthreads();  // nobody reads this step's tiles any more
    if (Tile::kStages == 1) {
      if (next < seen.end) load(0, next);
      cp_async_commit();
    }
    stage = (stage + 1) % Tile::kStages;
  }
  cp_async_wait<0>();

  if (by_distance) distances.finish(reinterpret_cast<float*>(stages));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < D / 2; i++) dq[0][i] *= a.scale;
  T* to = sequence_start(a, static_cast<T*>(a.dq), a.dq_stride, batch, head, s.first_q);
  store_rows<T, D>(dq, q_tile, own_row, to, a.dq_stride[2], query, s.seqlen_q, a.head_dim);
}

// ddistance_bias[head, i] = sum of partial[batch, head, block, i] in the order of batch and block.
constexpr int kSumThreads = 128;
__global__ void __launch_bounds__(kSumThreads) attention_sum_distances(const __grid_constant__ Backward b, int blocks) {
  const int64_t length = 2 * int64_t(b.a.max_distance) + 1, i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= length) return;
  for (int head = blockIdx.y; head < b.a.num_heads; head += gridDim.y) {
    float sum = 0.f;
    for (int batch = 0; batch < b.a.batch; batch++) {
      const float* row = b.partial + (int64_t(batch) * b.a.num_heads + head) * blocks * length + i;
      for (int block = 0; block < blocks; block++) sum += row[block * length];
    }
    b.a.ddistance_bias[head * length + i] = sum;
  }
}

}  // namespace attention_sm80

int64_t attention_backward_q_blocks(const ff_attention_args* args) {
  using namespace attention_sm80;
  int64_t blocks = 0;
  for_attention_kernels(args, false, [&](auto, auto d, auto plain) {
    constexpr int kQueries = BackwardQ<d.value, plain.value>::kQueries;
    blocks = padded(args->seqlen_q, kQueries) / kQueries;
    return int(FF_OK);
  });
  return blocks;
}

int attention_backward_q_sm80(const ff_attention_args* args, const Backward& b, void* stream) {
  using namespace attention_sm80;
  const int status = for_attention_kernels(args, is_plain(b.a), [&](auto t, auto d, auto plain) {
    using Tile = BackwardQ<d.value, plain.value>;
    const int64_t blocks = padded(args->seqlen_q, Tile::kQueries) / Tile::kQueries * args->num_heads * args->batch;
    if (blocks == 0) return int(FF_OK);
    if (blocks > INT32_MAX) return fail(FF_UNSUPPORTED, "batch, num_heads, seqlen_q: too many queries");
    return launch("attention_backward_q", attention_backward_q<decltype(t), d.value, plain.value>,
                  dim3(unsigned(blocks)), dim3(Tile::kThreads), Tile::kShared, stream, b);
  });
  if (status || !args->ddistance_bias) return status;
  const int64_t columns = padded(2 * args->max_distance + 1, kSumThreads) / kSumThreads;
  return launch("attention_sum_distances", attention_sum_distances,
                dim3(unsigned(columns), unsigned(std::min<int64_t>(args->num_heads, 65535))), dim3(kSumThreads), 0,
                stream, b, int(attention_backward_q_blocks(args)));
}

}  // namespace ff
