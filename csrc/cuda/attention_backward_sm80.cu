// Attention backward on a GPU: statistics per query, then the kernels of attention_backward_q_sm80.cu (dq, what is
// added to the scores) and attention_backward_kv_sm80.cu (dk, dv), and here the gradient of a bias that several heads,
// sequences or queries share: a block owns a tile of dbias, computes that tile of dz for each of them in turn and adds
// in registers. Two more products of tiles, and again no atomic addition.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c attention_backward_sm80.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c attention_backward_sm80.cu
#include "attention_backward_sm80.cuh"

namespace ff {
namespace attention_sm80 {

// 8 threads per query, 16 bytes of its row at a time.
constexpr int kStatisticsThreads = 256, kStatisticsQueries = kStatisticsThreads / 8;
static_assert(kPadding % kStatisticsQueries == 0, "whole blocks");

template <class T>
__global__ void __launch_bounds__(kStatisticsThreads) attention_statistics(const __grid_constant__ Backward b) {
  const Attention& a = b.a;
  const int blocks = (a.seqlen_q + kPadding - 1) / kPadding * (kPadding / kStatisticsQueries);
  const int query = int(blockIdx.x % blocks) * kStatisticsQueries + int(threadIdx.x / 8), part = threadIdx.x % 8;
  const int head = int(blockIdx.x / blocks) % a.num_heads, batch = int(blockIdx.x / blocks) / a.num_heads;
  const Sequence s = find_sequence(a, batch);
  if (query / kPadding * kPadding >= s.seqlen_q) return;  // a whole block of 128 has nothing to do
  const T* out = sequence_start(a, static_cast<const T*>(a.out), a.out_stride, batch, head, s.first_q);
  const T* dout = sequence_start(a, static_cast<const T*>(a.dout), a.dout_stride, batch, head, s.first_q);
  float delta = 0.f;
  if (query < s.seqlen_q) {
    for (int col = part * 8; col < a.head_dim_v; col += 64) {
      const Pack<T, 8> x = load<T, 8>(out + query * a.out_stride[2] + col);
      const Pack<T, 8> dx = load<T, 8>(dout + query * a.dout_stride[2] + col);
#pragma unroll
      for (int e = 0; e < 8; e++) delta += x[e] * dx[e];
    }
  }
#pragma unroll
  for (int other = 1; other < 8; other *= 2) delta += __shfl_xor_sync(~0u, delta, other);
  if (part != 0) return;
  Statistics statistics = make_float2(INFINITY, 0.f);
  if (query < s.seqlen_q) {
    const int64_t row = first_row(a, s, batch, head) + query;
    const float lse = a.lse[row];
    if (lse != -INFINITY) statistics = make_float2(lse * kLog2e, delta - (a.dlse ? a.dlse[row] : 0.f));
  }
  statistics_of(b, s, batch, head)[query] = statistics;
}

template <int D> struct BackwardBias {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kQueries = 16 * kWarps, kKeys = 32;
  static constexpr int kShared = 2 * (kQueries + kKeys) * D * 2;
  static_assert(kShared <= kSharedLimit, "fits every GPU");
};

template <class T, int D>
__global__ void __launch_bounds__(BackwardBias<D>::kThreads)
    attention_backward_bias(const __grid_constant__ Backward b, int batches, int heads, int rows) {
  using Tile = BackwardBias<D>;
  constexpr int N = Tile::kKeys / 2, kThreads = Tile::kThreads;
  const Attention& a = b.a;
  FF_DYNAMIC_SHARED(T, shared);
  T *q_tile = shared, *dout_tile = q_tile + Tile::kQueries * D;
  T *k_tile = dout_tile + Tile::kQueries * D, *v_tile = k_tile + Tile::kKeys * D;
  const int lane = threadIdx.x % 32, own_row = int(threadIdx.x / 32) * 16;

  // batches, heads, rows: how many dbias has, each 1 or as many as the scores.
  const int key_blocks = (a.seqlen_k + Tile::kKeys - 1) / Tile::kKeys;
  const int row_blocks = (rows + Tile::kQueries - 1) / Tile::kQueries;
  const int key = int(blockIdx.x % key_blocks) * Tile::kKeys, row_block = int(blockIdx.x / key_blocks) % row_blocks;
  const int bias_head = int(blockIdx.x / key_blocks / row_blocks) % heads;
  const int bias_batch = int(blockIdx.x / key_blocks / row_blocks) / heads;
  const int first_batch = batches == 1 ? 0 : bias_batch, end_batch = batches == 1 ? a.batch : bias_batch + 1;
  const int first_head = heads == 1 ? 0 : bias_head, end_head = heads == 1 ? a.num_heads : bias_head + 1;

  float sum[N] = {};
  for (int batch = first_batch; batch < end_batch; batch++) {
    const Sequence s = find_sequence(a, batch);
    Range queries = queries_of(a, s, key, min(key + Tile::kKeys, s.seqlen_k));
    if (rows > 1) {
      queries.begin = max(queries.begin, row_block * Tile::kQueries);
      queries.end = min(queries.end, (row_block + 1) * Tile::kQueries);
    }
    if (queries.begin >= queries.end) continue;
    const int first_query = queries.begin / Tile::kQueries * Tile::kQueries;
    for (int head = first_head; head < end_head; head++) {
      for (int query = first_query; query < queries.end; query += Tile::kQueries) {
        const int kv_head = head / a.heads_per_kv;
        const auto load = [&](auto rows_of_tile, T* tile, const void* tensor, const int64_t(&stride)[3], int of_head,
                              int first, int end, int cols) {
          const T* matrix = sequence_start(a, static_cast<const T*>(tensor), stride, batch, of_head, 0);
          load_tile<rows_of_tile.value, D, kThreads>(tile, matrix, stride[2], first, end, cols);
        };
        using Queries = std::integral_constant<int, Tile::kQueries>;
        using Keys = std::integral_constant<int, Tile::kKeys>;
        __syncthreads();  // nobody reads the last tiles any more
        load(Queries{}, q_tile, a.q, a.q_stride, head, query, s.seqlen_q, a.head_dim);
        load(Queries{}, dout_tile, a.dout, a.dout_stride, head, query, s.seqlen_q, a.head_dim_v);
        load(Keys{}, k_tile, a.k, a.k_stride, kv_head, key, s.seqlen_k, a.head_dim);
        load(Keys{}, v_tile, a.v, a.v_stride, kv_head, key, s.seqlen_k, a.head_dim_v);
        cp_async_commit();
        const Statistics* own = statistics_of(b, s, batch, head) + query + own_row + lane / 4;
        const Statistics statistics[2] = {own[0], own[8]};
        cp_async_wait<0>();
        __syncthreads();
        const Place<false> at{query + own_row + lane / 4, key + lane % 4 * 2};
        const bool edge = touches_edge(a, s, query, Tile::kQueries, key, Tile::kKeys);
        float p[1][N], dz[1][N], derivative[N];
        multiply_transposed<T, D>(p, SharedRows<T, D, 1>{q_tile, own_row}, k_tile);
        multiply_transposed<T, D>(dz, SharedRows<T, D, 1>{dout_tile, own_row}, v_tile);
        differentiate<T, false>(a, s, batch, head, at, edge, p[0], dz[0], derivative,
                                [&](int i) { return statistics[i / 2 % 2]; });
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] += dz[0][i];
      }
    }
  }

  float* dbias = a.dbias + bias_batch * a.dbias_stride[0] + bias_head * a.dbias_stride[1];
  if (rows > 1) {
    const Place<false> at{row_block * Tile::kQueries + own_row + lane / 4, key + lane % 4 * 2};
#pragma unroll
    for (int i = 0; i < N; i++)
      if (at.query_of(i) < a.seqlen_q && at.key_of(i) < a.seqlen_k)
        dbias[at.query_of(i) * a.dbias_stride[2] + at.key_of(i)] = sum[i];
    return;
  }
  // One row for all queries: over the 16 rows of a warp, then over the warps in order.
  float* columns = reinterpret_cast<float*>(shared);  // (kWarps, kKeys)
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i += i % 2 ? 3 : 1) {
    float total = sum[i] + sum[i + 2];
#pragma unroll
    for (int other = 4; other < 32; other *= 2) total += __shfl_xor_sync(~0u, total, other);
    if (lane < 4) columns[int(threadIdx.x / 32) * Tile::kKeys + i / 4 * 8 + lane * 2 + i % 2] = total;
  }
  __syncthreads();
  if (int(threadIdx.x) < Tile::kKeys && key + int(threadIdx.x) < a.seqlen_k) {
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < Tile::kWarps; warp++) total += columns[warp * Tile::kKeys + threadIdx.x];
    dbias[key + threadIdx.x] = total;
  }
}

int sum_bias_gradient(const ff_attention_args* args, const Backward& b, void* stream) {
  const auto count = [&](int i, int64_t n) { return args->dbias_stride[i] == 0 ? int64_t(1) : n; };
  const int64_t batches = count(0, args->batch), heads = count(1, args->num_heads), rows = count(2, args->seqlen_q);
  return for_attention_kernels(args, false, [&](auto t, auto d, auto) {
    using Tile = BackwardBias<d.value>;
    const int64_t blocks = padded(args->seqlen_k, Tile::kKeys) / Tile::kKeys *
                           (padded(rows, Tile::kQueries) / Tile::kQueries) * heads * batches;
    if (blocks == 0) return int(FF_OK);
    if (blocks > INT32_MAX) return fail(FF_UNSUPPORTED, "dbias: too large");
    return launch("attention_backward_bias", attention_backward_bias<decltype(t), d.value>, dim3(unsigned(blocks)),
                  dim3(Tile::kThreads), Tile::kShared, stream, b, int(batches), int(heads), int(rows));
  });
}

int compute_statistics(const ff_attention_args* args, const Backward& b, void* stream) {
  const int64_t blocks = padded(args->seqlen_q, kPadding) / kStatisticsQueries * args->num_heads * args->batch;
  if (blocks == 0) return FF_OK;
  if (blocks > INT32_MAX) return fail(FF_UNSUPPORTED, "batch, num_heads, seqlen_q: too many queries");
  const auto run = [&](void (*kernel)(Backward)) {
    return launch("attention_statistics", kernel, dim3(unsigned(blocks)), dim3(kStatisticsThreads), 0, stream, b);
  };
  return args->dtype == FF_BFLOAT16 ? run(attention_statistics<__nv_bfloat16>) : run(attention_statistics<__half>);
}

}  // namespace attention_sm80

size_t attention_backward_workspace_sm80(const ff_attention_args* args) {
  size_t bytes = size_t(statistics_count(args)) * sizeof(Statistics);
  if (args->ddistance_bias)
    bytes += size_t(attention_backward_q_blocks(args) * args->num_heads * args->batch) *
             size_t(2 * args->max_distance + 1) * sizeof(float);
  return bytes;
}

int attention_backward_sm80(const ff_attention_args* args, void* stream) {
  using namespace attention_sm80;
  Backward b{make_attention(args), static_cast<Statistics*>(args->workspace), statistics_stride(args), nullptr};
  b.partial = reinterpret_cast<float*>(b.statistics + statistics_count(args));
  const bool summed = args->dbias && bias_gradient_is_summed(args);
  if (int status = compute_statistics(args, b, stream)) return status;
  if (summed) {
    if (int status = sum_bias_gradient(args, b, stream)) return status;
    b.a.dbias = nullptr;
  }
  if (int status = attention_backward_q_sm80(args, b, stream)) return status;
  return attention_backward_kv_sm80(args, b, stream);
}

}  // namespace ff
