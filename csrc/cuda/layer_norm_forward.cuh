// Forward kernels of layer_norm and rms_norm (RMS: the mean counts as 0), and with ADD of add_layer_norm and
// add_rms_norm: the row is residual + dropout(x), written to `summed`.
//
// A row is read once and stays in registers as 16-byte packs of its own dtype, so mean, variance (the exact two-pass
// one) and output cost one read and one write of memory: the floor, 2 * rows * cols elements, 4 with ADD. On Hopper a
// row too long for one block is shared by a cluster of 2 to 16, which merge their means and squares (Chan, Golub,
// LeVeque 1979) in distributed shared memory. Elsewhere, and for still longer rows, it goes through memory three times,
// most of it cache.
#pragma once
#include "cluster.cuh"
#include "philox.cuh"
#include "row.cuh"

namespace ff {

// T: data, P: parameters.
template <class T, class P> struct NormForward {
  int64_t rows, cols;
  int64_t x_stride, residual_stride;
  int slice;          // columns of each block of a cluster
  float eps, inverse_cols;
  const T* x;         // (rows, cols)
  const T* residual;  // (rows, cols), ADD only
  const P* weight;    // (cols) or null
  const P* bias;      // (cols) or null
  T* out;             // (rows, cols)
  T* summed;          // (rows, cols), ADD only
  float* mean;        // (rows), not RMS
  float* rstd;        // (rows)
  Dropout dropout;    // ADD only
};

// residual + dropout(x), rounded to T: what later layers see is what gets normalised. All lanes of a warp must call.
template <class T, class P, int E>
FF_DEVICE Pack<T, E> add_residual(const NormForward<T, P>& a, const Pack<T, E>& x, const Pack<T, E>& residual,
                                  int64_t row, int64_t col) {
  float sum[E];
  if (a.dropout.on) {
    const uint32_t keep = keep_bits<E>(a.dropout, row, col);
#pragma unroll
    for (int e = 0; e < E; e++) sum[e] = residual[e] + x[e] * a.dropout.factor(keep, e);
  } else {
#pragma unroll
    for (int e = 0; e < E; e++) sum[e] = residual[e] + x[e];
  }
  return make_pack<T, E>(sum);
}

// y = y * weight + bias from column `col` on, either of them null.
template <class P, int E> FF_DEVICE void apply_affine(float (&y)[E], const P* weight, const P* bias, int64_t col) {
  if (weight) {
    const Pack<P, E> w = load_cached<P, E>(weight + col);
#pragma unroll
    for (int e = 0; e < E; e++) y[e] *= w[e];
  }
  if (bias) {
    const Pack<P, E> b = load_cached<P, E>(bias + col);
#pragma unroll
    for (int e = 0; e < E; e++) y[e] += b[e];
  }
}

template <class T, class P, int E>
FF_DEVICE void store_normalised(const NormForward<T, P>& a, const Pack<T, E>& x, float mean, float rstd, int64_t row,
                                int64_t col) {
  float y[E];
#pragma unroll
  for (int e = 0; e < E; e++) y[e] = (x[e] - mean) * rstd;
  apply_affine(y, a.weight, a.bias, col);
  store_streaming(a.out + row * a.cols + col, make_pack<T, E>(y));
}

// The mean of a row in registers (RMS: 0) and the sum of the squared distances from it; x is 0 where inside(i) is not.
template <bool RMS, class T, int E, int V, class Inside>
FF_DEVICE void row_moments(const Pack<T, E> (&x)[V], Inside inside, float inverse_count, RowSum<1>& row_sum,
                           float& mean, float& squares) {
  float sum[1] = {0};
  mean = 0;
  if constexpr (!RMS) {
#pragma unroll
    for (int i = 0; i < V; i++) {
#pragma unroll
      for (int e = 0; e < E; e++) sum[0] += x[i][e];
    }
    row_sum(sum);
    mean = sum[0] * inverse_count;
    sum[0] = 0;
  }
#pragma unroll
  for (int i = 0; i < V; i++) {
    if (inside(i)) {
#pragma unroll
      for (int e = 0; e < E; e++) sum[0] += (x[i][e] - mean) * (x[i][e] - mean);
    }
  }
  row_sum(sum);
  squares = sum[0];
}

// V packs of E elements per thread (row.cuh). cols is a multiple of E. With CLUSTER, the blocks of one work on a row.
template <bool ADD, bool RMS, class T, class P, int E, int V, bool CLUSTER>
__global__ void __launch_bounds__(CLUSTER ? kClusterThreads : forward_max_threads<T, E>())
    norm_forward(const NormForward<T, P> a) {
  FF_CLUSTERS_ONLY(CLUSTER);
  FF_SHARED(float, partial, [2][32][1]);
  FF_SHARED(float, exchanged, [2][CLUSTER ? kMaxCluster : 1][2]);
  RowSum<1> row_sum(partial);
  ClusterExchange<CLUSTER, 2> exchange(exchanged);
  const Slice<CLUSTER> slice(a.cols, a.slice);
  const auto col_of = [&](int i) { return slice.begin + column<E, V>(i); };
  constexpr int kBatch = V < 8 ? V : 8;  // loads in flight before the first is used
  // The loop is the same for all rows of a block, so that they meet at the same barriers; a row past the end idles.
  for (int64_t first = slice.first_row; first < a.rows; first += slice.row_step) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.rows;
    Pack<T, E> x[V];
#pragma unroll
    for (int begin = 0; begin < V; begin += kBatch) {
      Pack<T, E> residual[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; j++) {
        const int i = begin + j, col = col_of(i);
        const bool inside = live && col < slice.end;
        x[i] = inside ? load_streaming<T, E>(a.x + row * a.x_stride + col) : zero_pack<T, E>();
        if constexpr (ADD)
          residual[j] =
              inside ? load_streaming<T, E>(a.residual + row * a.residual_stride + col) : zero_pack<T, E>();
      }
      if constexpr (ADD) {
#pragma unroll
        for (int j = 0; j < kBatch; j++) {
          const int i = begin + j, col = col_of(i);
          x[i] = add_residual(a, x[i], residual[j], row, col);
          if (live && col < slice.end) store_streaming(a.summed + row * a.cols + col, x[i]);
        }
      }
    }

    float mean, squares;
    row_moments<RMS>(x, [&](int i) { return col_of(i) < slice.end; },
                     CLUSTER ? 1.f / float(slice.end - slice.begin) : a.inverse_cols, row_sum, mean, squares);
    if constexpr (CLUSTER) {
      const float mine[2] = {mean, squares};
      const auto& all = exchange(mine);
      const auto count = [&](int r) { return float(min(a.slice, int(a.cols) - r * a.slice)); };
      if constexpr (!RMS) {
        mean = 0;
        for (int r = 0; r < slice.blocks; r++) mean += all[r][0] * count(r);
        mean *= a.inverse_cols;
      }
      squares = 0;
      for (int r = 0; r < slice.blocks; r++) {
        const float apart = RMS ? 0.f : all[r][0] - mean;
        squares += all[r][1] + count(r) * apart * apart;
      }
    }
    const float rstd = rsqrtf(squares * a.inverse_cols + a.eps);

    if (live && threadIdx.x == 0 && slice.rank == 0) {
      if constexpr (!RMS) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int col = col_of(i);
      if (live && col < slice.end) store_normalised(a, x[i], mean, rstd, row, col);
    }
  }
}

// One block per row, any number of columns.
template <bool ADD, bool RMS, class T, class P, int E>
__global__ void __launch_bounds__(kLongThreads) norm_forward_long(const NormForward<T, P> a) {
  FF_SHARED(float, partial, [2][32][1]);
  RowSum<1> row_sum(partial);
  const int64_t step = int64_t(blockDim.x) * E;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    // Where the later passes find the row; each thread reads only what it wrote itself.
    const T* source = ADD ? a.summed + row * a.cols : a.x + row * a.x_stride;
    float sum[1] = {0}, mean = 0;
    if constexpr (ADD || !RMS) {
      for (int64_t begin = 0; begin < a.cols; begin += step) {
        const int64_t col = begin + threadIdx.x * E;
        const bool inside = col < a.cols;
        Pack<T, E> x = inside ? load<T, E>(a.x + row * a.x_stride + col) : zero_pack<T, E>();
        if constexpr (ADD) {
          const Pack<T, E> residual =
              inside ? load_streaming<T, E>(a.residual + row * a.residual_stride + col) : zero_pack<T, E>();
          x = add_residual(a, x, residual, row, col);
          if (inside) store(a.summed + row * a.cols + col, x);
        }
#pragma unroll
        for (int e = 0; e < E; e++) sum[0] += x[e];
      }
    }
    if constexpr (!RMS) {
      row_sum(sum);
      mean = sum[0] * a.inverse_cols;
    }

    sum[0] = 0;
    for (int64_t col = threadIdx.x * E; col < a.cols; col += step) {
      const Pack<T, E> x = load<T, E>(source + col);
#pragma unroll
      for (int e = 0; e < E; e++) sum[0] += (x[e] - mean) * (x[e] - mean);
    }
    row_sum(sum);
    const float rstd = rsqrtf(sum[0] * a.inverse_cols + a.eps);

    if (threadIdx.x == 0) {
      if constexpr (!RMS) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    for (int64_t col = threadIdx.x * E; col < a.cols; col += step)
      store_normalised(a, load<T, E>(source + col), mean, rstd, row, col);
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------
constexpr RowPlan kForwardScalarPlans[] = {{256, 32, 8}, {512, 64, 8}, {1024, 128, 8}, {2048, 256, 8}, {4096, 512, 8}};

template <bool ADD, bool RMS, class T, class P, int E>
int launch_norm_forward(const char* name, NormForward<T, P> a, void* stream) {
  const RowPlan* plan = E == 1 ? choose_plan(kForwardScalarPlans, a.cols)
                               : forward_plan(a.cols / E, forward_max_threads<T, E>());
  if (!plan) {
    if constexpr (E > 1) {
      constexpr int V = kForwardClusterPacks / (ADD ? 2 : 1);  // the residual takes registers as well
      if (const int cluster = cluster_for(a.cols, kClusterThreads * V * E)) {
        a.slice = cluster_slice(a.cols, cluster);
        return launch_clusters(name, norm_forward<ADD, RMS, T, P, E, V, true>, cluster,
                               grid_of_clusters(a.rows, cluster), kClusterThreads, 0, stream, a);
      }
    }
    return launch(name, norm_forward_long<ADD, RMS, T, P, E>, grid_of(a.rows), kLongThreads, 0, stream, a);
  }
  const dim3 block = forward_block(*plan), grid = forward_grid(a.rows, block);
  const auto run = [&](auto packs) {
    return launch(name, norm_forward<ADD, RMS, T, P, E, decltype(packs)::value, false>, grid, block, 0, stream, a);
  };
  if constexpr (E == 1) return run(std::integral_constant<int, 8>{});
  else if (plan->per_thread == 1) return run(std::integral_constant<int, 1>{});
  else return run(std::integral_constant<int, 4>{});
}

// `vector`: every row and parameter can be read 16 bytes at a time.
template <bool ADD, bool RMS, class T, class P>
int run_norm_forward(const char* name, const NormForward<T, P>& a, bool vector, void* stream) {
  if (a.rows == 0) return FF_OK;
  return vector ? launch_norm_forward<ADD, RMS, T, P, kVector<T>>(name, a, stream)
                : launch_norm_forward<ADD, RMS, T, P, 1>(name, a, stream);
}

}  // namespace ff
