// Forward kernels of layer_norm and add_layer_norm (ADD: the row is residual + dropout(x), written to `summed`).
//
// A row is read once and stays in registers as 16-byte packs of its own dtype, so mean, variance (the exact two-pass
// one) and output cost one read and one write of memory. Rows too long for registers go through memory three times,
// most of it cache.
#pragma once
#include "philox.cuh"
#include "row.cuh"

namespace ff {

constexpr int kForwardThreads = 128;  // of a block, unless one row has more
constexpr int kLongThreads = 512;     // of a block on a row too long for registers

// T: data, P: parameters.
template <class T, class P> struct NormForward {
  int64_t rows, cols;
  int64_t x_stride, residual_stride;
  float eps, inverse_cols;
  const T* x;         // (rows, cols)
  const T* residual;  // (rows, cols), ADD only
  const P* weight;    // (cols) or null
  const P* bias;      // (cols) or null
  T* out;             // (rows, cols)
  T* summed;          // (rows, cols), ADD only
  float* mean;        // (rows)
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
    for (int e = 0; e < E; e++) sum[e] = residual[e] + x[e] * (keep >> e & 1 ? a.dropout.scale : 0.f);
  } else {
#pragma unroll
    for (int e = 0; e < E; e++) sum[e] = residual[e] + x[e];
  }
  return make_pack<T, E>(sum);
}

template <class T, class P, int E>
FF_DEVICE void store_normalised(const NormForward<T, P>& a, const Pack<T, E>& x, float mean, float rstd, int64_t row,
                                int64_t col) {
  float y[E];
#pragma unroll
  for (int e = 0; e < E; e++) y[e] = (x[e] - mean) * rstd;
  if (a.weight) {
    const Pack<P, E> weight = load_cached<P, E>(a.weight + col);
#pragma unroll
    for (int e = 0; e < E; e++) y[e] *= weight[e];
  }
  if (a.bias) {
    const Pack<P, E> bias = load_cached<P, E>(a.bias + col);
#pragma unroll
    for (int e = 0; e < E; e++) y[e] += bias[e];
  }
  store_streaming(a.out + row * a.cols + col, make_pack<T, E>(y));
}

// A block of 1024 leaves 64 registers to a thread: enough for float32, not for converted halves.
template <class T, int E> constexpr int forward_max_threads() { return E > 1 && sizeof(T) == 4 ? 1024 : 512; }

// V packs of E elements per thread (row.cuh). cols is a multiple of E.
template <bool ADD, class T, class P, int E, int V>
__global__ void __launch_bounds__(forward_max_threads<T, E>()) norm_forward(const NormForward<T, P> a) {
  FF_SHARED(float, partial, [2][32][1]);
  RowSum<1> row_sum(partial);
  const int cols = int(a.cols);
  constexpr int kBatch = V < 8 ? V : 8;  // loads in flight before the first is used
  // The loop is the same for all rows of a block, so that they meet at the same barriers; a row past the end idles.
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < a.rows; first += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.rows;
    Pack<T, E> x[V];
#pragma unroll
    for (int begin = 0; begin < V; begin += kBatch) {
      Pack<T, E> residual[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; j++) {
        const int i = begin + j, col = column<E, V>(i);
        const bool inside = live && col < cols;
        x[i] = inside ? load_streaming<T, E>(a.x + row * a.x_stride + col) : zero_pack<T, E>();
        if constexpr (ADD)
          residual[j] =
              inside ? load_streaming<T, E>(a.residual + row * a.residual_stride + col) : zero_pack<T, E>();
      }
      if constexpr (ADD) {
#pragma unroll
        for (int j = 0; j < kBatch; j++) {
          const int i = begin + j, col = column<E, V>(i);
          x[i] = add_residual(a, x[i], residual[j], row, col);
          if (live && col < cols) store_streaming(a.summed + row * a.cols + col, x[i]);
        }
      }
    }

    float sum[1] = {0};
#pragma unroll
    for (int i = 0; i < V; i++) {
#pragma unroll
      for (int e = 0; e < E; e++) sum[0] += x[i][e];  // 0 outside the row
    }
    row_sum(sum);
    const float mean = sum[0] * a.inverse_cols;

    sum[0] = 0;
#pragma unroll
    for (int i = 0; i < V; i++) {
      if (column<E, V>(i) < cols) {
#pragma unroll
        for (int e = 0; e < E; e++) sum[0] += (x[i][e] - mean) * (x[i][e] - mean);
      }
    }
    row_sum(sum);
    const float rstd = rsqrtf(sum[0] * a.inverse_cols + a.eps);

    if (live && threadIdx.x == 0) {
      a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int col = column<E, V>(i);
      if (live && col < cols) store_normalised(a, x[i], mean, rstd, row, col);
    }
  }
}

// One block per row, any number of columns.
template <bool ADD, class T, class P, int E>
__global__ void __launch_bounds__(kLongThreads) norm_forward_long(const NormForward<T, P> a) {
  FF_SHARED(float, partial, [2][32][1]);
  RowSum<1> row_sum(partial);
  const int64_t step = int64_t(blockDim.x) * E;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    // Where the later passes find the row; each thread reads only what it wrote itself.
    const T* source = ADD ? a.summed + row * a.cols : a.x + row * a.x_stride;
    float sum[1] = {0};
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
    row_sum(sum);
    const float mean = sum[0] * a.inverse_cols;

    sum[0] = 0;
    for (int64_t col = threadIdx.x * E; col < a.cols; col += step) {
      const Pack<T, E> x = load<T, E>(source + col);
#pragma unroll
      for (int e = 0; e < E; e++) sum[0] += (x[e] - mean) * (x[e] - mean);
    }
    row_sum(sum);
    const float rstd = rsqrtf(sum[0] * a.inverse_cols + a.eps);

    if (threadIdx.x == 0) {
      a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    for (int64_t col = threadIdx.x * E; col < a.cols; col += step)
      store_normalised(a, load<T, E>(source + col), mean, rstd, row, col);
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------
// Few threads for a short row, so that a warp works on several; never more than 64 bytes of it in one thread, so that
// many threads fit and keep many loads in flight.
constexpr RowPlan kForwardPlans[] = {{8, 8, 1},     {16, 16, 1},   {32, 32, 1},    {128, 32, 4},  {256, 64, 4},
                                     {512, 128, 4}, {1024, 256, 4}, {2048, 512, 4}, {4096, 1024, 4}};
constexpr RowPlan kForwardScalarPlans[] = {{256, 32, 8}, {512, 64, 8}, {1024, 128, 8}, {2048, 256, 8}, {4096, 512, 8}};

template <bool ADD, class T, class P, int E>
int launch_norm_forward(const char* name, const NormForward<T, P>& a, void* stream) {
  const RowPlan* plan = E == 1 ? choose_plan(kForwardScalarPlans, a.cols) : choose_plan(kForwardPlans, a.cols / E);
  if (!plan || plan->threads > forward_max_threads<T, E>())
    return launch(name, norm_forward_long<ADD, T, P, E>, grid_of(a.rows), kLongThreads, 0, stream, a);
  const int rows_per_block = plan->threads < kForwardThreads ? kForwardThreads / plan->threads : 1;
  const dim3 grid = grid_of((a.rows + rows_per_block - 1) / rows_per_block), block(plan->threads, rows_per_block);
  if constexpr (E == 1) return launch(name, norm_forward<ADD, T, P, 1, 8>, grid, block, 0, stream, a);
  else if (plan->per_thread == 1) return launch(name, norm_forward<ADD, T, P, E, 1>, grid, block, 0, stream, a);
  else return launch(name, norm_forward<ADD, T, P, E, 4>, grid, block, 0, stream, a);
}

// `vector`: every row and parameter can be read 16 bytes at a time.
template <bool ADD, class T, class P>
int run_norm_forward(const char* name, const NormForward<T, P>& a, bool vector, void* stream) {
  if (a.rows == 0) return FF_OK;
  return vector ? launch_norm_forward<ADD, T, P, kVector<T>>(name, a, stream)
                : launch_norm_forward<ADD, T, P, 1>(name, a, stream);
}

}  // namespace ff
