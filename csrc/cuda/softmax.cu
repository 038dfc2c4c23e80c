// softmax(scale * x + bias + mask) over rows on a GPU, its logarithm, and their gradients; the formula: fastformer.h.
//
// Forward: a row is read once, stays in registers as float32, and each exponential is computed once, against the
// maximum of its thread; one merge of (max, sum) then gives every thread its factor (softmax.cuh). Backward needs the
// output only: dx = scale * y * (dy - sum(dy * y)), for the logarithm scale * (dy - exp(y) * sum(dy)). On Hopper a row
// too long for one block is shared by a cluster of 2 to 16; elsewhere, and for still longer rows, it is read twice.
// Floor: one read and one write of x forward, two reads and one write backward, and mask and bias where there are any.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c softmax.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c softmax.cu
#include "softmax.cuh"

namespace ff {
namespace {

// What is added to the scores, and which columns take part.
struct Scores {
  int64_t heads, queries, cols;  // row r is (r / (heads * queries), r / queries % heads, r % queries)
  int causal;
  const uint8_t* mask;           // or null
  const void* bias;              // or null
  int bias_is_float;             // else the data's dtype
  int64_t mask_stride[4], bias_stride[4];
};

// One row of them.
template <class T> struct RowScores {
  const uint8_t* mask;
  const T* bias;
  const float* float_bias;
  int64_t mask_step, bias_step, last;  // last: the last column that causal lets take part

  FF_DEVICE RowScores(const Scores& s, int64_t row) {
    const int64_t rest = quotient(row, s.queries), k = row - rest * s.queries;
    const int64_t i = quotient(rest, s.heads), j = rest - i * s.heads;
    const int64_t bias = i * s.bias_stride[0] + j * s.bias_stride[1] + k * s.bias_stride[2];
    this->mask = s.mask ? s.mask + i * s.mask_stride[0] + j * s.mask_stride[1] + k * s.mask_stride[2] : nullptr;
    this->bias = s.bias && !s.bias_is_float ? static_cast<const T*>(s.bias) + bias : nullptr;
    float_bias = s.bias && s.bias_is_float ? static_cast<const float*>(s.bias) + bias : nullptr;
    mask_step = s.mask_stride[3], bias_step = s.bias_stride[3];
    last = s.causal ? k + s.cols - s.queries : s.cols - 1;
  }
  // Makes -inf of what takes no part, having added the bias to the rest.
  template <int E> FF_DEVICE void apply(float (&z)[E], int64_t col, int64_t cols) const {
    if (bias) {
      T b[E];
      load_any<T, E>(b, bias, bias_step, col, cols);
#pragma unroll
      for (int e = 0; e < E; e++) z[e] += to_float(b[e]);
    }
    if (float_bias) {
      float b[E];
      load_any<float, E>(b, float_bias, bias_step, col, cols);
#pragma unroll
      for (int e = 0; e < E; e++) z[e] += b[e];
    }
    hide<E>(z, kNegInf, col, cols);
  }
  template <int E> FF_DEVICE void hide(float (&z)[E], float value, int64_t col, int64_t cols) const {
    if (mask) {
      uint8_t visible[E];
      load_any<uint8_t, E>(visible, mask, mask_step, col, cols);
#pragma unroll
      for (int e = 0; e < E; e++) z[e] = visible[e] ? z[e] : value;
    }
#pragma unroll
    for (int e = 0; e < E; e++) z[e] = col + e <= last ? z[e] : value;
  }
};

// ---- forward --------------------------------------------------------------------------------------------------------
template <class T> struct SoftmaxForward {
  int64_t rows, cols, x_stride;
  int64_t virtual_cols;  // softmax.cuh
  int slice;             // of them, for each block of a cluster
  int log;
  float scale;
  const T* x;            // (rows, cols)
  T* out;                // (rows, cols)
  Scores scores;         // SCORES only
};

// scale * x from column `col` on, as the scores have it; -inf outside the row.
template <bool SCORES, class T, int E>
FF_DEVICE void scores_of(float (&z)[E], const SoftmaxForward<T>& a, const Pack<T, E>& x, const RowScores<T>& scores,
                         int64_t col) {
#pragma unroll
  for (int e = 0; e < E; e++) z[e] = x[e] * a.scale;
  if constexpr (SCORES) scores.template apply<E>(z, col, a.cols);
#pragma unroll
  for (int e = 0; e < E; e++) z[e] = uint64_t(col + e) < uint64_t(a.cols) ? z[e] : kNegInf;
}

template <bool SCORES, class T, int E, int V, bool CLUSTER>
__global__ void __launch_bounds__(CLUSTER ? kClusterThreads : forward_max_threads<T, E>())
    softmax_forward(const SoftmaxForward<T> a) {
  FF_CLUSTERS_ONLY(CLUSTER);
  FF_SHARED(float, partial, [2][32][2]);
  FF_SHARED(float, exchanged, [2][CLUSTER ? kMaxCluster : 1][2]);
  RowMaxSum row_max_sum(partial);
  ClusterExchange<CLUSTER, 2> exchange(exchanged);
  const Slice<CLUSTER> slice(a.virtual_cols, a.slice);
  for (int64_t first = slice.first_row; first < a.rows; first += slice.row_step) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.rows;
    const T* x_row = a.x + row * a.x_stride;
    const int64_t begin = slice.begin - offset_of<T, E>(x_row);
    const auto inside = [&](int i) { return live && slice.begin + column<E, V>(i) < slice.end; };
    Pack<T, E> x[V];
#pragma unroll
    for (int i = 0; i < V; i++)
      x[i] = inside(i) ? load_window<T, E>(x_row, begin + column<E, V>(i), a.cols) : zero_pack<T, E>();

    const RowScores<T> scores(a.scores, SCORES && live ? row : 0);
    float z[V][E];
    MaxSum m;
#pragma unroll
    for (int i = 0; i < V; i++) {
      scores_of<SCORES>(z[i], a, x[i], scores, inside(i) ? begin + column<E, V>(i) : a.cols);
#pragma unroll
      for (int e = 0; e < E; e++) m.max = fmaxf(m.max, z[i][e]);
    }
    const float shift = shift_of(m.max);
#pragma unroll
    for (int i = 0; i < V; i++) {
#pragma unroll
      for (int e = 0; e < E; e++) {
        const float p = __expf(z[i][e] - shift);
        m.sum += p;
        if (!a.log) z[i][e] = p;
      }
    }
    MaxSum total = row_max_sum(m);
    if constexpr (CLUSTER) {
      const float mine[2] = {total.max, total.sum};
      const auto& all = exchange(mine);
      total = {all[0][0], all[0][1]};
      for (int r = 1; r < slice.blocks; r++) merge(total, {all[r][0], all[r][1]});
    }
    // The logarithm: z - max - log(sum). Else what was computed against the thread's maximum, times one factor.
    const float max = shift_of(total.max), log_sum = log_of_sum(total.sum);
    const float factor = total.sum == 0 ? 0.f : __expf(m.max - max) / total.sum;
#pragma unroll
    for (int i = 0; i < V; i++) {
#pragma unroll
      for (int e = 0; e < E; e++) z[i][e] = a.log ? z[i][e] - max - log_sum : z[i][e] * factor;
      if (inside(i)) store_window<T, E>(a.out + row * a.cols, begin + column<E, V>(i), a.cols, z[i]);
    }
  }
}

// One block per row, any number of columns, two reads of it.
template <class T, int E>
__global__ void __launch_bounds__(kLongThreads) softmax_forward_long(const SoftmaxForward<T> a) {
  FF_SHARED(float, partial, [2][32][2]);
  RowMaxSum row_max_sum(partial);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x_row = a.x + row * a.x_stride;
    const RowScores<T> scores(a.scores, row);
    const int64_t begin = int64_t(threadIdx.x) * E - offset_of<T, E>(x_row), step = int64_t(blockDim.x) * E;
    MaxSum m;
    float z[E];
    for (int64_t col = begin; col < a.cols; col += step) {
      scores_of<true>(z, a, load_window<T, E>(x_row, col, a.cols), scores, col);
      add_numbers<E>(m, z);
    }
    const MaxSum total = row_max_sum(m);
    const float shift = shift_of(total.max), log_sum = log_of_sum(total.sum);
    const float inverse = total.sum == 0 ? 0.f : 1.f / total.sum;
    for (int64_t col = begin; col < a.cols; col += step) {
      scores_of<true>(z, a, load_window<T, E>(x_row, col, a.cols), scores, col);
#pragma unroll
      for (int e = 0; e < E; e++) z[e] = a.log ? z[e] - shift - log_sum : __expf(z[e] - shift) * inverse;
      store_window<T, E>(a.out + row * a.cols, col, a.cols, z);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------
template <class T> struct SoftmaxBackward {
  int64_t rows, cols, dout_stride;
  int64_t virtual_cols;
  int slice, log;
  float scale;
  const T* out;   // (rows, cols)
  const T* dout;  // (rows, cols)
  T* dx;          // (rows, cols)
  Scores scores;  // the logarithm's mask: its -inf does not tell what took no part from what was -inf
};

// What backward sums over a row: dy * y, for the logarithm dy, and how many outputs are not the logarithm's -inf.
template <class T, int E>
FF_DEVICE void add_terms(float (&sum)[2], int log, const Pack<T, E>& y, const Pack<T, E>& dy, int64_t col,
                         int64_t cols) {
#pragma unroll
  for (int e = 0; e < E; e++) {
    sum[0] += log ? dy[e] : dy[e] * y[e];  // 0 outside the row
    sum[1] += uint64_t(col + e) < uint64_t(cols) && y[e] != kNegInf ? 1.f : 0.f;
  }
}
template <class T, int E>
FF_DEVICE void store_gradient(const SoftmaxBackward<T>& a, const Pack<T, E>& y, const Pack<T, E>& dy,
                              const float (&sum)[2], int64_t row, int64_t col) {
  float dx[E];
#pragma unroll
  for (int e = 0; e < E; e++) {
    dx[e] = a.log ? dy[e] - __expf(y[e]) * sum[0] : y[e] * (dy[e] - sum[0]);
    dx[e] = a.log && sum[1] == 0 ? 0.f : dx[e] * a.scale;  // a row without any element
  }
  if (a.log && (a.scores.mask || a.scores.causal))
    RowScores<T>(a.scores, row).template hide<E>(dx, 0.f, col, a.cols);
  store_window<T, E>(a.dx + row * a.cols, col, a.cols, dx);
}
constexpr int kBackwardThreads = 512, kBackwardClusterPacks = 4;  // two tensors' packs are in registers

template <class T, int E, int V, bool CLUSTER>
__global__ void __launch_bounds__(kBackwardThreads) softmax_backward(const SoftmaxBackward<T> a) {
  FF_CLUSTERS_ONLY(CLUSTER);
  FF_SHARED(float, partial, [2][32][2]);
  FF_SHARED(float, exchanged, [2][CLUSTER ? kMaxCluster : 1][2]);
  RowSum<2> row_sum(partial);
  ClusterExchange<CLUSTER, 2> exchange(exchanged);
  const Slice<CLUSTER> slice(a.virtual_cols, a.slice);
  for (int64_t first = slice.first_row; first < a.rows; first += slice.row_step) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.rows;
    const T *y_row = a.out + row * a.cols, *dy_row = a.dout + row * a.dout_stride;
    const int64_t begin = slice.begin - offset_of<T, E>(y_row);
    const auto inside = [&](int i) { return live && slice.begin + column<E, V>(i) < slice.end; };
    Pack<T, E> y[V], dy[V];
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int64_t col = inside(i) ? begin + column<E, V>(i) : a.cols;
      y[i] = load_window<T, E>(y_row, col, a.cols);
      dy[i] = load_window<T, E>(dy_row, col, a.cols);
    }
    float sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < V; i++)
      add_terms<T, E>(sum, a.log, y[i], dy[i], inside(i) ? begin + column<E, V>(i) : a.cols, a.cols);
    row_sum(sum);
    if constexpr (CLUSTER) {
      const auto& all = exchange(sum);
      sum[0] = sum[1] = 0;
      for (int r = 0; r < slice.blocks; r++) sum[0] += all[r][0], sum[1] += all[r][1];
    }
#pragma unroll
    for (int i = 0; i < V; i++)
      if (inside(i)) store_gradient<T, E>(a, y[i], dy[i], sum, row, begin + column<E, V>(i));
  }
}

template <class T, int E>
__global__ void __launch_bounds__(kLongThreads) softmax_backward_long(const SoftmaxBackward<T> a) {
  FF_SHARED(float, partial, [2][32][2]);
  RowSum<2> row_sum(partial);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T *y_row = a.out + row * a.cols, *dy_row = a.dout + row * a.dout_stride;
    const int64_t begin = int64_t(threadIdx.x) * E - offset_of<T, E>(y_row), step = int64_t(blockDim.x) * E;
    float sum[2] = {0, 0};
    for (int64_t col = begin; col < a.cols; col += step)
      add_terms<T, E>(sum, a.log, load_window<T, E>(y_row, col, a.cols), load_window<T, E>(dy_row, col, a.cols), col,
                      a.cols);
    row_sum(sum);
    for (int64_t col = begin; col < a.cols; col += step)
      store_gradient<T, E>(a, load_window<T, E>(y_row, col, a.cols), load_window<T, E>(dy_row, col, a.cols), sum,
                           row, col);
  }
}

// ---- arguments and launching ----------------------------------------------------------------------------------------
int check(const ff_softmax_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 0, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->out || a->rows * a->cols == 0, "out: must not be NULL");
  if (a->mask || a->bias || a->causal) {
    FF_REQUIRE(a->row_shape[0] * a->row_shape[1] * a->row_shape[2] == a->rows,
               "row_shape: %lld x %lld x %lld is not rows, %lld", (long long)a->row_shape[0],
               (long long)a->row_shape[1], (long long)a->row_shape[2], (long long)a->rows);
  }
  FF_REQUIRE(!a->mask || a->mask_stride[3] == 0 || a->mask_stride[3] == 1, "mask_stride: the last is %lld, not 0 or 1",
             (long long)a->mask_stride[3]);
  FF_REQUIRE(!a->bias || a->bias_stride[3] == 0 || a->bias_stride[3] == 1, "bias_stride: the last is %lld, not 0 or 1",
             (long long)a->bias_stride[3]);
  FF_REQUIRE(!a->bias || a->bias_dtype == a->dtype || a->bias_dtype == FF_FLOAT32,
             "bias_dtype: %s is neither the data's nor float32", dtype_name(a->bias_dtype));
  return check_dtypes(a->dtype, a->dtype);
}

Scores make_scores(const ff_softmax_args* a) {
  Scores s{};
  const bool any = a->mask || a->bias || a->causal;
  s.heads = any ? a->row_shape[1] : 1, s.queries = any ? a->row_shape[2] : 1, s.cols = a->cols;
  s.causal = a->causal, s.mask = a->mask, s.bias = a->bias, s.bias_is_float = a->bias_dtype == FF_FLOAT32;
  for (int d = 0; d < 4; d++) s.mask_stride[d] = a->mask_stride[d], s.bias_stride[d] = a->bias_stride[d];
  return s;
}

template <class T, int E> int launch_forward(SoftmaxForward<T> a, void* stream) {
  const char* name = "softmax_forward";
  const bool scores = a.scores.mask || a.scores.bias || a.scores.causal;
  a.virtual_cols = virtual_columns(a.cols, a.x_stride, a.x, E, sizeof(T));
  if constexpr (E > 1) {
    const auto run = [&](auto packs, auto in_cluster, int cluster, dim3 grid, dim3 block) {
      constexpr int V = decltype(packs)::value;
      constexpr bool CLUSTER = decltype(in_cluster)::value;
      return launch_clusters(name, scores ? softmax_forward<true, T, E, V, CLUSTER>
                                          : softmax_forward<false, T, E, V, CLUSTER>,
                             cluster, grid, block, 0, stream, a);
    };
    return launch_rows<kForwardClusterPacks, forward_max_threads<T, E>(), E>(a, run, [&] {
      return launch(name, softmax_forward_long<T, E>, grid_of(a.rows), kLongThreads, 0, stream, a);
    });
  }
  return launch(name, softmax_forward_long<T, 1>, grid_of(a.rows), kLongThreads, 0, stream, a);
}

template <class T, int E> int launch_backward(SoftmaxBackward<T> a, void* stream) {
  const char* name = "softmax_backward";
  a.virtual_cols = virtual_columns(a.cols, a.cols, a.out, E, sizeof(T));
  if constexpr (E > 1) {
    const auto run = [&](auto packs, auto in_cluster, int cluster, dim3 grid, dim3 block) {
      return launch_clusters(name, softmax_backward<T, E, decltype(packs)::value, decltype(in_cluster)::value>, cluster,
                             grid, block, 0, stream, a);
    };
    return launch_rows<kBackwardClusterPacks, kBackwardThreads, E>(a, run, [&] {
      return launch(name, softmax_backward_long<T, E>, grid_of(a.rows), kLongThreads, 0, stream, a);
    });
  }
  return launch(name, softmax_backward_long<T, 1>, grid_of(a.rows), kLongThreads, 0, stream, a);
}

}  // namespace
}  // namespace ff

extern "C" int ff_cuda_softmax_forward(const ff_softmax_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  if (a->rows == 0 || a->cols == 0) return FF_OK;
  FF_REQUIRE(a->x, "x: must not be NULL");
  const bool vector = same_offsets(a->dtype, {{a->x, a->x_stride}, {a->out, a->cols}});
  return for_dtypes(a->dtype, a->dtype, [&](auto t, auto) {
    using T = decltype(t);
    SoftmaxForward<T> k{};
    k.rows = a->rows, k.cols = a->cols, k.x_stride = a->x_stride, k.log = a->log, k.scale = float(a->scale);
    k.x = static_cast<const T*>(a->x), k.out = static_cast<T*>(a->out), k.scores = make_scores(a);
    return vector ? launch_forward<T, kVector<T>>(k, stream) : launch_forward<T, 1>(k, stream);
  });
}

extern "C" int ff_cuda_softmax_backward(const ff_softmax_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  if (a->rows == 0 || a->cols == 0) return FF_OK;
  FF_REQUIRE(a->dout && a->dx, "dout, dx: must not be NULL");
  const bool vector = same_offsets(a->dtype, {{a->out, a->cols}, {a->dx, a->cols}, {a->dout, a->dout_stride}});
  return for_dtypes(a->dtype, a->dtype, [&](auto t, auto) {
    using T = decltype(t);
    SoftmaxBackward<T> k{};
    k.rows = a->rows, k.cols = a->cols, k.dout_stride = a->dout_stride, k.log = a->log, k.scale = float(a->scale);
    k.out = static_cast<const T*>(a->out), k.dout = static_cast<const T*>(a->dout), k.dx = static_cast<T*>(a->dx);
    k.scores = make_scores(a);
    return vector ? launch_backward<T, kVector<T>>(k, stream) : launch_backward<T, 1>(k, stream);
  });
}
