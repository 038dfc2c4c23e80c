// Backward kernels of layer_norm and rms_norm (RMS: without the mean), and with ADD of add_layer_norm and add_rms_norm:
// x is `summed`, its own gradient is added to the row's.
//
// With xhat = (x - mean) * rstd and g = dout * weight:
//     dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),   dweight = sum_rows(dout * xhat),   dbias = sum_rows(dout)
// and for rms_norm both means 0, mean(g * xhat) apart. One block per multiprocessor walks the rows, on Hopper a cluster
// of 2 to 16 where rows are too long for one; a thread always has the same columns, so it sums dweight and dbias of
// all its rows in registers, in float32. The blocks' sums go to the workspace and a second kernel adds them in a fixed
// order: no atomics, and results repeat bit for bit on one card. Floor: 3 * rows * cols elements.
#pragma once
#include "cluster.cuh"
#include "column_sum.cuh"
#include "philox.cuh"
#include "row.cuh"

namespace ff {

constexpr int kBackwardThreads = 512;

// T: data, P: parameters.
template <class T, class P> struct NormBackward {
  int64_t rows, cols;
  int64_t x_stride, dout_stride, dsummed_stride;
  int slice;           // columns of each block of a cluster
  float inverse_cols;
  const T* x;          // (rows, cols): what was normalised
  const P* weight;     // (cols) or null
  const float* mean;   // (rows), not RMS
  const float* rstd;   // (rows)
  const T* dout;       // (rows, cols)
  const T* dsummed;    // (rows, cols) or null, ADD only
  T* dx;               // (rows, cols) or null
  T* dresidual;        // (rows, cols), ADD only
  P* dweight;          // (cols) or null
  P* dbias;            // (cols) or null
  float* partial;      // (2, blocks, cols): dweight's and dbias's sums of each block; null if neither is wanted
  Dropout dropout;     // ADD only
};

// Writes the gradient d of the normalised row, E columns of it. All lanes of a warp must call.
template <bool ADD, class T, class P, int E>
FF_DEVICE void store_gradient(const NormBackward<T, P>& a, float (&d)[E], const Pack<T, E>& dsummed, bool inside,
                              int64_t row, int64_t col) {
  const int64_t at = row * a.cols + col;
  if constexpr (ADD) {
#pragma unroll
    for (int e = 0; e < E; e++) d[e] += dsummed[e];  // zeros where there is none
    if (inside) store_streaming(a.dresidual + at, make_pack<T, E>(d));
    if (!a.dx) return;
    if (a.dropout.on) {
      const uint32_t keep = keep_bits<E>(a.dropout, row, col);
#pragma unroll
      for (int e = 0; e < E; e++) d[e] *= a.dropout.factor(keep, e);
    }
  }
  if (inside) store_streaming(a.dx + at, make_pack<T, E>(d));
}

// Read anew in each pass: the cache has it, and registers are what this kernel is short of.
template <class P, int E> FF_DEVICE Pack<P, E> load_weight(const P* weight, int64_t col, bool inside) {
  if (weight && inside) return load_cached<P, E>(weight + col);
  Pack<P, E> ones;
#pragma unroll
  for (int e = 0; e < E; e++) ones.value[e] = from_float<P>(1.f);
  return ones;
}

// V packs of E elements per thread and clusters as in norm_forward.
template <bool ADD, bool RMS, class T, class P, int E, int V, bool CLUSTER>
__global__ void __launch_bounds__(kBackwardThreads, 1) norm_backward(const NormBackward<T, P> a) {
  FF_CLUSTERS_ONLY(CLUSTER);
  constexpr int kSums = RMS ? 1 : 2;  // of g, not RMS, and of g * xhat
  FF_SHARED(float, partial, [2][32][kSums]);
  FF_SHARED(float, exchanged, [2][CLUSTER ? kMaxCluster : 1][kSums]);
  RowSum<kSums> row_sum(partial);
  ClusterExchange<CLUSTER, kSums> exchange(exchanged);
  const Slice<CLUSTER> slice(a.cols, a.slice);
  const auto col_of = [&](int i) { return slice.begin + column<E, V>(i); };
  const bool need_dx = ADD || a.dx;
  // The next row's loads are in flight while this one is summed, if there are registers for both.
  constexpr bool kPrefetch = E > 1 && E * V <= 8;

  struct Row {
    Pack<T, E> x[V], dout[V];
    float mean, rstd;
  };
  const auto fetch = [&](int64_t row) {
    Row s;
    const bool live = row < a.rows;
#pragma unroll
    for (int i = 0; i < V; i++) {
      const bool inside = live && col_of(i) < slice.end;
      s.x[i] = inside ? load_streaming<T, E>(a.x + row * a.x_stride + col_of(i)) : zero_pack<T, E>();
      s.dout[i] = inside ? load_streaming<T, E>(a.dout + row * a.dout_stride + col_of(i)) : zero_pack<T, E>();
    }
    s.mean = live && !RMS ? __ldg(a.mean + row) : 0.f;
    s.rstd = live ? __ldg(a.rstd + row) : 0.f;
    return s;
  };

  float dweight[V][E], dbias[V][E];
#pragma unroll
  for (int i = 0; i < V; i++) {
#pragma unroll
    for (int e = 0; e < E; e++) dweight[i][e] = dbias[i][e] = 0;
  }

  const int step = int(slice.row_step);  // a grid of one block per multiprocessor is small
  int64_t first = slice.first_row;
  Row s = fetch(first + threadIdx.y);
  for (; first < a.rows; first += step) {
    const int64_t row = first + threadIdx.y;
    Row next;
    if constexpr (kPrefetch) next = fetch(row + step);
    Pack<T, E> dsummed[ADD ? V : 1];
    if constexpr (ADD) {
#pragma unroll
      for (int i = 0; i < V; i++)
        dsummed[i] = a.dsummed && row < a.rows && col_of(i) < slice.end
                         ? load_streaming<T, E>(a.dsummed + row * a.dsummed_stride + col_of(i))
                         : zero_pack<T, E>();
    }

    float sum[kSums] = {};  // dout is 0 outside the row
#pragma unroll
    for (int i = 0; i < V; i++) {
      const Pack<P, E> weight = load_weight<P, E>(a.weight, col_of(i), col_of(i) < slice.end);
#pragma unroll
      for (int e = 0; e < E; e++) {
        const float dy = s.dout[i][e], xhat = (s.x[i][e] - s.mean) * s.rstd, g = dy * weight[e];
        const float dyx = dy * xhat;
        dweight[i][e] += dyx;
        dbias[i][e] += dy;
        if constexpr (!RMS) sum[0] += g;
        sum[kSums - 1] += RMS ? dyx * weight[e] : g * xhat;  // the same; each way round spares its kernel a spill
      }
    }
    if (need_dx) {
      row_sum(sum);
      if constexpr (CLUSTER) {
        const auto& all = exchange(sum);
#pragma unroll
        for (int k = 0; k < kSums; k++) {
          sum[k] = 0;
          for (int r = 0; r < slice.blocks; r++) sum[k] += all[r][k];
        }
      }
      const float mean_g = RMS ? 0.f : sum[0] * a.inverse_cols, mean_gx = sum[kSums - 1] * a.inverse_cols;
#pragma unroll
      for (int i = 0; i < V; i++) {
        const Pack<P, E> weight = load_weight<P, E>(a.weight, col_of(i), col_of(i) < slice.end);
        float d[E];
#pragma unroll
        for (int e = 0; e < E; e++) {
          const float xhat = (s.x[i][e] - s.mean) * s.rstd, g = s.dout[i][e] * weight[e];
          d[e] = s.rstd * (g - mean_g - xhat * mean_gx);
        }
        store_gradient<ADD>(a, d, dsummed[ADD ? i : 0], row < a.rows && col_of(i) < slice.end, row, col_of(i));
      }
    }
    if constexpr (kPrefetch) s = next;
    else s = fetch(row + step);
  }

  if (!a.partial) return;
  const int64_t group = blockIdx.x / slice.blocks, groups = gridDim.x / slice.blocks;
  float* block_dweight = a.partial + group * a.cols;
  float* block_dbias = a.partial + (groups + group) * a.cols;
  if (blockDim.y == 1) {
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (col_of(i) >= slice.end) continue;
      store_floats<E>(block_dweight + col_of(i), dweight[i]);
      store_floats<E>(block_dbias + col_of(i), dbias[i]);
    }
    return;
  }
  FF_DYNAMIC_SHARED(float, total);  // (2, cols): the rows of the block, one after another
  const int cols = slice.end;
  for (int y = 0; y < int(blockDim.y); y++) {
    if (int(threadIdx.y) == y) {
#pragma unroll
      for (int i = 0; i < V; i++) {
#pragma unroll
        for (int e = 0; e < E; e++) {
          const int col = column<E, V>(i) + e;
          if (col >= cols) continue;
          total[col] = (y ? total[col] : 0.f) + dweight[i][e];
          total[cols + col] = (y ? total[cols + col] : 0.f) + dbias[i][e];
        }
      }
    }
    __syncthreads();
  }
  for (int col = threadIdx.y * blockDim.x + threadIdx.x; col < cols; col += blockDim.x * blockDim.y) {
    block_dweight[col] = total[col];
    block_dbias[col] = total[cols + col];
  }
}

// One block per row at a time, any number of columns; the blocks' sums live in the workspace throughout.
template <bool ADD, bool RMS, class T, class P, int E>
__global__ void __launch_bounds__(kBackwardThreads) norm_backward_long(const NormBackward<T, P> a) {
  constexpr int kSums = RMS ? 1 : 2;  // of g, not RMS, and of g * xhat
  FF_SHARED(float, partial, [2][32][kSums]);
  RowSum<kSums> row_sum(partial);
  const int64_t step = int64_t(blockDim.x) * E;
  float* block_dweight = a.partial + int64_t(blockIdx.x) * a.cols;
  float* block_dbias = a.partial + (int64_t(gridDim.x) + blockIdx.x) * a.cols;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const float mean = RMS ? 0.f : __ldg(a.mean + row), rstd = __ldg(a.rstd + row);
    const T *x_row = a.x + row * a.x_stride, *dout_row = a.dout + row * a.dout_stride;
    float sum[kSums] = {};
    for (int64_t col = threadIdx.x * E; col < a.cols; col += step) {
      const Pack<T, E> x = load<T, E>(x_row + col), dout = load<T, E>(dout_row + col);
      const Pack<P, E> weight = load_weight<P, E>(a.weight, col, true);
#pragma unroll
      for (int e = 0; e < E; e++) {
        const float g = dout[e] * weight[e];
        if constexpr (!RMS) sum[0] += g;
        sum[kSums - 1] += g * (x[e] - mean) * rstd;
      }
    }
    row_sum(sum);
    const float mean_g = RMS ? 0.f : sum[0] * a.inverse_cols, mean_gx = sum[kSums - 1] * a.inverse_cols;

    for (int64_t begin = 0; begin < a.cols; begin += step) {
      const int64_t col = begin + threadIdx.x * E;
      const bool inside = col < a.cols;
      const Pack<T, E> x = inside ? load_streaming<T, E>(x_row + col) : zero_pack<T, E>();
      const Pack<T, E> dout = inside ? load_streaming<T, E>(dout_row + col) : zero_pack<T, E>();
      Pack<T, E> dsummed = zero_pack<T, E>();
      if (ADD && a.dsummed && inside) dsummed = load_streaming<T, E>(a.dsummed + row * a.dsummed_stride + col);
      const Pack<P, E> weight = load_weight<P, E>(a.weight, col, inside);
      float d[E], dweight[E], dbias[E];
#pragma unroll
      for (int e = 0; e < E; e++) {
        const float xhat = (x[e] - mean) * rstd;
        d[e] = rstd * (dout[e] * weight[e] - mean_g - xhat * mean_gx);
        dweight[e] = dout[e] * xhat;
        dbias[e] = dout[e];
      }
      if (ADD || a.dx) store_gradient<ADD>(a, d, dsummed, inside, row, col);
      if (!a.partial || !inside) continue;
      if (row != blockIdx.x) {  // not this block's first row
#pragma unroll
        for (int e = 0; e < E; e++) {
          dweight[e] += block_dweight[col + e];
          dbias[e] += block_dbias[col + e];
        }
      }
      store_floats<E>(block_dweight + col, dweight);
      store_floats<E>(block_dbias + col, dbias);
    }
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------
// At most 32 bytes of a row in one thread's registers, beside their two float32 sums and the next row.
constexpr RowPlan kBackwardPlans[] = {{8, 8, 1},     {16, 16, 1},   {32, 32, 1},   {64, 32, 2},
                                      {128, 64, 2}, {256, 128, 2}, {512, 256, 2}, {1024, 512, 2}};
constexpr RowPlan kBackwardScalarPlans[] = {{256, 32, 8}, {512, 64, 8}, {1024, 128, 8}, {2048, 256, 8}, {4096, 512, 8}};

// Blocks whose sums the workspace must hold, for any alignment of the data.
inline int64_t max_backward_blocks(int64_t rows) {
  const int64_t count = multiprocessors();
  return rows < count ? rows : count;
}
inline size_t backward_workspace(int64_t rows, int64_t cols) {
  return rows <= 0 || cols <= 0 ? 0 : size_t(max_backward_blocks(rows)) * size_t(cols) * 2 * sizeof(float);
}

// Packs in each thread of a cluster: as many as leave registers for their two float32 sums, and for dsummed.
template <bool ADD, int E> constexpr int kBackwardClusterPacks = (E == 4 ? 4 : 2) / (ADD ? 2 : 1);

template <bool ADD, bool RMS, class T, class P, int E>
int launch_norm_backward(const char* name, NormBackward<T, P> a, int64_t& blocks, void* stream) {
  const RowPlan* plan = E == 1 ? choose_plan(kBackwardScalarPlans, a.cols) : choose_plan(kBackwardPlans, a.cols / E);
  blocks = max_backward_blocks(a.rows);
  if (!plan) {
    if constexpr (E > 1) {
      constexpr int V = kBackwardClusterPacks<ADD, E>;
      if (const int cluster = cluster_for(a.cols, kBackwardThreads * V * E)) {
        a.slice = cluster_slice(a.cols, cluster);
        const int64_t clusters = multiprocessors() / cluster;
        blocks = clusters < 1 ? 1 : clusters < a.rows ? clusters : a.rows;  // each fills one line of the workspace
        return launch_clusters(name, norm_backward<ADD, RMS, T, P, E, V, true>, cluster,
                               grid_of_clusters(blocks, cluster), kBackwardThreads, 0, stream, a);
      }
    }
    return launch(name, norm_backward_long<ADD, RMS, T, P, E>, grid_of(blocks), kBackwardThreads, 0, stream, a);
  }
  const int rows_per_block = kBackwardThreads / plan->threads;
  const int64_t needed = (a.rows + rows_per_block - 1) / rows_per_block;
  blocks = needed < blocks ? needed : blocks;
  const dim3 grid = grid_of(blocks), block(plan->threads, rows_per_block);
  const size_t shared = rows_per_block > 1 ? size_t(a.cols) * 2 * sizeof(float) : 0;
  const auto run = [&](auto packs) {
    return launch(name, norm_backward<ADD, RMS, T, P, E, decltype(packs)::value, false>, grid, block, shared, stream,
                  a);
  };
  if constexpr (E == 1) return run(std::integral_constant<int, 8>{});
  else if (plan->per_thread == 1) return run(std::integral_constant<int, 1>{});
  else return run(std::integral_constant<int, 2>{});
}

// `vector`: every row and parameter can be read 16 bytes at a time.
template <bool ADD, bool RMS, class T, class P>
int run_norm_backward(const char* name, const NormBackward<T, P>& a, bool vector, void* stream) {
  if (multiprocessors() == 0) {
    const int status = check_cuda(name);
    return status != FF_OK ? status : fail(FF_DEVICE_ERROR, "%s: the device has no multiprocessors", name);
  }
  int64_t blocks = 0;
  if (a.rows > 0 && (ADD || a.dx || a.partial)) {
    const int status = vector ? launch_norm_backward<ADD, RMS, T, P, kVector<T>>(name, a, blocks, stream)
                              : launch_norm_backward<ADD, RMS, T, P, 1>(name, a, blocks, stream);
    if (status != FF_OK) return status;
  }
  if (!a.dweight && !a.dbias) return FF_OK;
  return launch_column_sum(name, a.partial, blocks, a.cols, a.dweight, a.dbias, stream);
}

}  // namespace ff
