// dropout(act(x + bias) * (up + up_bias)) on a GPU, and its gradients; the functions themselves are in activation.cuh.
//
// Floor: one read and one write forward, two reads and one write backward; with `up` one read more forward, one read
// and one write more backward. Biases, their gradients and the dropout mask move nothing: a thread owns E neighbouring
// columns and walks down the rows, a few of them in flight, so biases stay in its registers, and so do the sums of
// their gradients, in float32. The blocks' sums go to the workspace and a second kernel adds them in a fixed order: no
// atomics, and results repeat bit for bit on one card. Where columns do not matter and nothing lies between the rows,
// the tensor is one line, cut into rows of whatever suits the blocks.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c activation.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c activation.cu
#include "activation.cuh"

#include "column_sum.cuh"
#include "philox.cuh"
#include "window.cuh"

namespace ff {
namespace {

constexpr int kThreads = 256;
constexpr int kForwardRows = 2, kBackwardRows = 2;  // of a thread, in flight

template <class T> struct Activation {
  int64_t rows, cols;
  int64_t x_stride, up_stride, out_stride, dout_stride, dx_stride, dup_stride;
  ff_activation kind;
  int64_t line;       // 0, or the length of the one line that rows and cols cover
  const T* x;         // (rows, cols)
  const T* bias;      // (cols) or null
  const T* up;        // (rows, cols) or null
  const T* up_bias;   // (cols) or null
  T* out;             // forward: (rows, cols); backward: the same, or null
  const T* dout;      // backward: (rows, cols)
  T* dx;              // backward: (rows, cols)
  T* dup;             // backward: (rows, cols), with up
  float* dbias;       // backward: (strips, cols), or null
  float* dup_bias;    // backward: (strips, cols), or null
  Dropout dropout;
};

// Where the pack of a thread in one row is: columns col .. col + E - 1 of `cols`, some of which may lie outside.
struct Place {
  int64_t row, col, cols;
  bool live;
  template <class T, int E> FF_DEVICE Pack<T, E> load(const T* p, int64_t stride) const {
    return load_window<T, E>(p + row * stride, col, cols);
  }
  template <class T, int E> FF_DEVICE void store(T* p, int64_t stride, const float (&x)[E]) const {
    if (live) store_window<T, E>(p + row * stride, col, cols, x);
  }
};
template <class T, int E> FF_DEVICE Place place_of(const Activation<T>& a, int64_t row, int64_t col) {
  Place p{row, col, a.cols, row < a.rows && col < a.cols};
  if (a.line) p = {0, row * a.cols + col - offset_of<T, E>(a.x), a.line, p.live};
  if (!p.live) p.row = 0, p.col = p.cols;
  return p;
}

// The bias of this thread's columns, 0 where there is none.
template <class T, int E> FF_DEVICE Pack<T, E> load_bias(const T* bias, int64_t col, int64_t cols) {
  return bias && col < cols ? load_cached<T, E>(bias + col) : zero_pack<T, E>();
}

// The loop is the same for all threads of a block, so that the lanes of a warp meet at the shuffles of dropout.
template <int K, class T, int E>
__global__ void __launch_bounds__(kThreads, 3) activation_forward(const Activation<T> a) {
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * E;
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  const Pack<T, E> bias = load_bias<T, E>(a.bias, col, a.cols), up_bias = load_bias<T, E>(a.up_bias, col, a.cols);
  for (int64_t first = int64_t(blockIdx.y) * blockDim.y; first < a.rows; first += kForwardRows * step) {
    Pack<T, E> x[kForwardRows], up[kForwardRows];
#pragma unroll
    for (int u = 0; u < kForwardRows; u++) {
      const Place p = place_of<T, E>(a, first + u * step + threadIdx.y, col);
      x[u] = p.load<T, E>(a.x, a.x_stride);
      up[u] = a.up ? p.load<T, E>(a.up, a.up_stride) : zero_pack<T, E>();
    }
#pragma unroll
    for (int u = 0; u < kForwardRows; u++) {
      const int64_t row = first + u * step + threadIdx.y;
      float y[E], slope;
#pragma unroll
      for (int e = 0; e < E; e++) {
        evaluate<K>(a.kind, x[u][e] + bias[e], y[e], slope);
        if (a.up) y[e] *= up[u][e] + up_bias[e];
      }
      if (a.dropout.on) {
        const uint32_t keep = keep_bits<E>(a.dropout, row, col);
#pragma unroll
        for (int e = 0; e < E; e++) y[e] *= a.dropout.factor(keep, e);
      }
      place_of<T, E>(a, row, col).template store<T, E>(a.out, a.out_stride, y);
    }
  }
}

// Adds up the sums of a block's rows, one after another, and writes one line of the workspace.
template <int E>
FF_DEVICE void store_block_sum(float* total, float* line, const float (&sum)[E], int64_t col, int64_t cols) {
  for (int y = 0; y < int(blockDim.y); y++) {
    if (int(threadIdx.y) == y) {
#pragma unroll
      for (int e = 0; e < E; e++) {
        float& t = total[e * blockDim.x + threadIdx.x];
        t = (y ? t : 0.f) + sum[e];
      }
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && col < cols) {
#pragma unroll
    for (int e = 0; e < E; e++) line[col + e] = total[e * blockDim.x + threadIdx.x];
  }
}

// Everything is loaded before anything is stored: outputs may lie over inputs.
template <int K, class T, int E>
__global__ void __launch_bounds__(kThreads, 2) activation_backward(const Activation<T> a) {
  FF_SHARED(float, total, [2][32 * E]);
  const int64_t col = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * E;
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  float dbias[E], dup_bias[E];
#pragma unroll
  for (int e = 0; e < E; e++) dbias[e] = dup_bias[e] = 0;
  for (int64_t first = int64_t(blockIdx.y) * blockDim.y; first < a.rows; first += kBackwardRows * step) {
    Pack<T, E> x[kBackwardRows], up[kBackwardRows], dout[kBackwardRows];
#pragma unroll
    for (int u = 0; u < kBackwardRows; u++) {
      const Place p = place_of<T, E>(a, first + u * step + threadIdx.y, col);
      x[u] = p.load<T, E>(a.x, a.x_stride);
      dout[u] = p.load<T, E>(a.dout, a.dout_stride);
      up[u] = a.up ? p.load<T, E>(a.up, a.up_stride) : zero_pack<T, E>();
    }
    const Pack<T, E> bias = load_bias<T, E>(a.bias, col, a.cols), up_bias = load_bias<T, E>(a.up_bias, col, a.cols);
#pragma unroll
    for (int u = 0; u < kBackwardRows; u++) {
      const int64_t row = first + u * step + threadIdx.y;
      const Place p = place_of<T, E>(a, row, col);
      const uint32_t keep = a.dropout.on ? keep_bits<E>(a.dropout, row, col) : 0;
      float dx[E], dup[E], out[E];
#pragma unroll
      for (int e = 0; e < E; e++) {
        const float kept = a.dropout.on ? a.dropout.factor(keep, e) : 1.f;
        float value, slope, d = dout[u][e] * kept;  // 0 outside the row
        evaluate<K>(a.kind, x[u][e] + bias[e], value, slope);
        if (a.up) {
          const float factor = up[u][e] + up_bias[e];
          dup[e] = d * value;
          dup_bias[e] += dup[e];
          d *= factor, value *= factor;
        }
        out[e] = value * kept;
        dx[e] = d * slope;
        dbias[e] += dx[e];
      }
      if (a.out) p.store<T, E>(a.out, a.out_stride, out);
      if (a.up) p.store<T, E>(a.dup, a.dup_stride, dup);
      p.store<T, E>(a.dx, a.dx_stride, dx);
    }
  }
  const int64_t line = int64_t(blockIdx.y) * a.cols;
  if (a.dbias) store_block_sum<E>(total[0], a.dbias + line, dbias, col, a.cols);
  if (a.dup_bias) store_block_sum<E>(total[1], a.dup_bias + line, dup_bias, col, a.cols);
}

// ---- arguments and launching ----------------------------------------------------------------------------------------
int check(const ff_activation_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 0, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->x || a->rows * a->cols == 0, "x: must not be NULL");
  FF_REQUIRE(a->up || !a->up_bias || a->rows * a->cols == 0, "up_bias: needs up");
  FF_REQUIRE(a->dropout_p >= 0 && a->dropout_p <= 1, "dropout_p: %g is not in [0, 1]", a->dropout_p);
  return check_dtypes(a->dtype, a->dtype);
}

// How blocks cover (rows, cols): threads along a row and rows of a block, blocks along a row, and strips of rows.
struct Cover {
  int threads;
  int64_t blocks, strips;
};
Cover cover_of(int64_t rows, int64_t cols, int E) {
  Cover c{32, 0, 0};
  while (c.threads > 8 && (c.threads / 2) * E >= cols) c.threads /= 2;
  c.blocks = (cols + c.threads * E - 1) / (c.threads * E);
  const int64_t tiles = (rows + kThreads / c.threads - 1) / (kThreads / c.threads);
  const int64_t count = multiprocessors(), wanted = 8 * (count > 0 ? count : 1);  // fill the device a few times over
  const int64_t most = wanted / c.blocks > 1 ? wanted / c.blocks : 1;
  c.strips = tiles < most ? tiles : most;
  return c;
}
// Strips at most, for any alignment of the data.
int64_t max_strips(int64_t rows, int64_t cols) {
  int64_t most = 0;
  for (int E : {1, 4, 8}) {
    const int64_t strips = cover_of(rows, cols, E).strips;
    most = strips > most ? strips : most;
  }
  return most;
}

// One line, where the columns do not matter and nothing lies between the rows.
template <class T> void flatten(Activation<T>& a, int E) {
  const auto dense = [&](const void* p, int64_t stride) { return !p || stride == a.cols; };
  const bool columns = a.bias || a.up_bias || a.dbias || a.dup_bias || a.dropout.on;
  if (columns || !dense(a.x, a.x_stride) || !dense(a.up, a.up_stride) || !dense(a.out, a.out_stride) ||
      !dense(a.dout, a.dout_stride) || !dense(a.dx, a.dx_stride) || !dense(a.dup, a.dup_stride))
    return;
  a.line = a.rows * a.cols;
  a.cols = 32 * E;
  a.rows = (a.line + (E - 1) + a.cols - 1) / a.cols;  // it may start in the middle of a pack
}

// Whether packs may be read: of one line where all tensors are off by the same amount, else of rows that start on
// packs.
template <class T> bool in_packs(const ff_activation_args* a, Activation<T> k) {
  flatten(k, kVector<T>);
  if (k.line)
    return same_offsets(a->dtype, {{k.x, 0}, {k.up, 0}, {k.out, 0}, {k.dout, 0}, {k.dx, 0}, {k.dup, 0}});
  const auto stride = [](const void* p, int64_t n) { return p ? n : 0; };
  return whole_vectors(a->dtype,
                       {k.cols, k.x_stride, stride(k.up, k.up_stride), stride(k.out, k.out_stride),
                        stride(k.dout, k.dout_stride), stride(k.dx, k.dx_stride), stride(k.dup, k.dup_stride)},
                       {k.x, k.up, k.out, k.dout, k.dx, k.dup, k.bias, k.up_bias});
}

template <class T> Activation<T> make_activation(const ff_activation_args* a) {
  Activation<T> k{};
  k.rows = a->rows, k.cols = a->cols, k.kind = a->kind;
  k.x_stride = a->x_stride, k.up_stride = a->up_stride, k.out_stride = a->out_stride;
  k.x = static_cast<const T*>(a->x), k.bias = static_cast<const T*>(a->bias), k.out = static_cast<T*>(a->out);
  k.up = static_cast<const T*>(a->up), k.up_bias = static_cast<const T*>(a->up_bias);
  k.dropout = make_dropout(a->dropout_p, a->seed);
  return k;
}

// Calls run(kernel arguments, kind, elements of a pack, cover) for the widest packs there can be. One element at a time
// is slow anyway: there the kernel of all kinds will do.
template <class T, class Run> int choose(const ff_activation_args* a, Activation<T> k, Run run) {
  return for_activation(a->kind, [&](auto kind) {
    const auto with = [&](auto kind, auto pack) {
      constexpr int E = decltype(pack)::value;
      flatten(k, E);
      return run(k, kind, pack, cover_of(k.rows, k.cols, E));
    };
    return in_packs(a, k) ? with(kind, std::integral_constant<int, kVector<T>>{})
                          : with(std::integral_constant<int, kAnyKind>{}, std::integral_constant<int, 1>{});
  });
}
dim3 grid_of(const Cover& c) { return dim3(unsigned(c.blocks), unsigned(c.strips)); }
dim3 block_of(const Cover& c) { return dim3(unsigned(c.threads), unsigned(kThreads / c.threads)); }

}  // namespace
}  // namespace ff

extern "C" int ff_cuda_activation_forward(const ff_activation_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  if (a->rows == 0 || a->cols == 0) return FF_OK;
  FF_REQUIRE(a->out, "out: must not be NULL");
  return for_dtypes(a->dtype, a->dtype, [&](auto t, auto) {
    using T = decltype(t);
    return choose<T>(a, make_activation<T>(a), [&](const auto& k, auto kind, auto pack, const Cover& c) {
      return launch("activation_forward", activation_forward<decltype(kind)::value, T, decltype(pack)::value>,
                    grid_of(c), block_of(c), 0, stream, k);
    });
  });
}

extern "C" size_t ff_cuda_activation_backward_workspace(const ff_activation_args* a) {
  if (!a || a->rows <= 0 || a->cols <= 0) return 0;
  const size_t sums = size_t(!!a->dbias + !!a->dup_bias);
  return sums ? sums * size_t(ff::max_strips(a->rows, a->cols)) * size_t(a->cols) * sizeof(float) : 0;
}

extern "C" int ff_cuda_activation_backward(const ff_activation_args* a, void* stream) {
  using namespace ff;
  const char* name = "activation_backward";
  if (int status = check(a)) return status;
  const bool empty = a->rows == 0 || a->cols == 0, sums = a->dbias || a->dup_bias;
  FF_REQUIRE((a->dout && a->dx && (a->dup || !a->up)) || empty, "dout, dx, dup: must not be NULL");
  FF_REQUIRE(a->up || !a->dup_bias || empty, "dup_bias: needs up");
  FF_REQUIRE(!sums || a->workspace || empty, "workspace: must not be NULL when dbias or dup_bias is asked for");
  if (a->cols == 0) return FF_OK;
  return for_dtypes(a->dtype, a->dtype, [&](auto t, auto) {
    using T = decltype(t);
    Activation<T> k = make_activation<T>(a);
    k.dout_stride = a->dout_stride, k.dx_stride = a->dx_stride, k.dup_stride = a->dup_stride;
    k.dout = static_cast<const T*>(a->dout), k.dx = static_cast<T*>(a->dx), k.dup = static_cast<T*>(a->dup);
    float* const partial = static_cast<float*>(a->workspace);
    int64_t strips = 0;
    if (!empty) {
      if (a->dbias) k.dbias = partial;
      if (a->dup_bias) k.dup_bias = partial;  // after dbias's, below; not null for flatten()
      const int status = choose<T>(a, k, [&](auto args, auto kind, auto pack, const Cover& c) {
        strips = c.strips;
        if (a->dbias && a->dup_bias) args.dup_bias = partial + strips * a->cols;
        return launch(name, activation_backward<decltype(kind)::value, T, decltype(pack)::value>, grid_of(c),
                      block_of(c), 0, stream, args);
      });
      if (status != FF_OK) return status;
    }
    if (!sums) return int(FF_OK);
    T *first = static_cast<T*>(a->dbias), *second = static_cast<T*>(a->dup_bias);
    if (!first) first = second, second = nullptr;
    return launch_column_sum(name, partial, strips, a->cols, first, second, stream);
  });
}
