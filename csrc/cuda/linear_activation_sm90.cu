// A feed-forward's first matmul with its epilogue, and the backward pass of both, for Hopper; formulas: fastformer.h.
//
// A block per multiprocessor walks over tiles of 128 rows x 256 columns (128 of gate and 128 of up where there are two
// products). One thread of a third warpgroup keeps slices of 64 of the inner dimension coming by TMA, four stages ahead
// and into the next tile while this one's epilogue runs; two warpgroups multiply, 64 rows each (wgmma m64n256k16), and
// do not wait for each other. Tiles that run at the same time share rows and columns, which stay in the L2 cache.
// The epilogue takes 64 accumulated columns at a time through shared memory, from fragments to rows: a thread then has
// 4 neighbouring columns, rows are read and written 128 bytes at a time, and the activations are there once, not once
// for every register of the accumulators.
//
// Floor: 2 rows cols inner operations per product at the rate of the tensor cores; in bytes, x (or dout) and the
// weights once, forward one to three times rows x cols elements, backward two or four times. A matmul followed by an
// activation kernel moves rows x cols elements one (gate kept) to four times more forward (gate and up not kept), and
// twice more backward.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_90a,code=sm_90a -cudart static
//     -Xcompiler -fPIC,-fvisibility=hidden -c linear_activation_sm90.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c linear_activation_sm90.cu
#include "activation.cuh"
#include "column_sum.cuh"
#include "philox.cuh"
#include "sm90.h"

namespace ff {
namespace {

constexpr int kRows = 128, kCols = 256, kInner = 64, kStages = 4, kThreads = 384;
constexpr int kGroup = 8;    // tiles of rows that blocks walk down before they move to the next columns
constexpr int kStrip = 64;   // rows of a warpgroup, and of one partial sum of a bias gradient
constexpr int kPanels = 4;   // a tile's columns, for the epilogue

template <class T> struct Tiles {
  T a[kStages][kRows * kInner], b[kStages][kCols * kInner];
  float panel[8][16 * 64];  // of each warp: its 16 rows of a panel, of gate and up half as wide
  uint64_t full[kStages], empty[kStages];
};

template <class T> struct Params {
  TensorMap left, right[2];          // x, w1 and w_up; dout and w2
  int rows, cols, steps;             // the last: of the inner dimension
  uint32_t down, across;             // tiles of rows, of columns
  bool whole;                        // rows and columns allow 4 elements at a time
  ff_activation kind;
  Dropout dropout;
  const T *b1, *b_up;  // or null
  T *out, *gate, *up;  // forward: the last two or null; backward reads gate, and up or null
  T *dgate, *dup;
  int64_t dgate_stride;
  float* partial;  // (1 or 2, strips, cols) sums of dgate and dup over strips of rows, or null
  int strips;
};

struct Place {
  int row, col;
};
// In 32 bits: one of 64 would be a call, to a function with more registers than the warp that copies has kept.
template <class T> FF_DEVICE Place find_tile(const Params<T>& p, uint32_t tile, int tile_cols) {
  const uint32_t size = uint32_t(kGroup) * p.across, group = tile / size, within = tile - group * size;
  const uint32_t height = min(p.down - group * kGroup, uint32_t(kGroup));
  return {int((group * kGroup + within % height) * kRows), int(within / height) * tile_cols};
}

// ---- epilogue -------------------------------------------------------------------------------------------------------
// Where a panel of W columns has an element: groups of 8 columns are exchanged so that neither the fragments that are
// written nor the rows that are read meet in a bank.
template <int W> FF_DEVICE int panel_at(int row, int col) {
  return row * W + ((col / 8 ^ row % (W / 8)) * 8 + col % 8);
}

// A warp's 16 rows of panel `which` of a fragment, into shared memory.
template <int W, int N> FF_DEVICE void put_panel(const float (&values)[N], int which, float* panel) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int p = 0; p < kPanels; p++) {
    if (p != which) continue;
#pragma unroll
    for (int i = 0; i < W / 2; i += 2)
      *reinterpret_cast<float2*>(panel + panel_at<W>(lane / 4 + i / 2 % 2 * 8, i / 4 * 8 + lane % 4 * 2)) =
          make_float2(values[p * W / 2 + i], values[p * W / 2 + i + 1]);
  }
}
template <int W> FF_DEVICE void get_panel(float (&values)[4], const float* panel, int row, int col) {
  memcpy(values, panel + panel_at<W>(row, col), sizeof values);
}

// Calls f with the kind, the same for all threads, as a std::integral_constant.
template <class F> FF_DEVICE void with_kind(ff_activation kind, F f) {
  switch (kind) {
    case FF_RELU: return f(std::integral_constant<ff_activation, FF_RELU>{});
    case FF_GELU: return f(std::integral_constant<ff_activation, FF_GELU>{});
    case FF_GELU_TANH: return f(std::integral_constant<ff_activation, FF_GELU_TANH>{});
    case FF_SILU: return f(std::integral_constant<ff_activation, FF_SILU>{});
  }
}

// 4 columns, of which the first `left` are there; the others are 0 and not stored. `whole`: all or none of them.
template <class T> FF_DEVICE Pack<T, 4> load_columns(const T* from, int left, bool whole) {
  Pack<T, 4> pack = zero_pack<T, 4>();
  if (whole) return left > 0 ? load<T, 4>(from) : pack;
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (e < left) pack.value[e] = from[e];
  return pack;
}
template <class T> FF_DEVICE void store_columns(T* to, const float (&values)[4], int left, bool whole) {
  const Pack<T, 4> pack = make_pack<T, 4>(values);
  if (whole) {
    if (left > 0) store<T, 4>(to, pack);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (e < left) to[e] = pack.value[e];
}
template <class T> FF_DEVICE Pack<T, 4> load_bias(const T* from, int col, int cols) {
  return from ? load_columns(from + col, cols - col, false) : zero_pack<T, 4>();
}
template <class T> FF_DEVICE void drop(float (&values)[4], const Params<T>& p, int row, int col) {
  if (!p.dropout.on) return;
  const uint32_t kept = keep_bits<4>(p.dropout, row, col);
#pragma unroll
  for (int e = 0; e < 4; e++) values[e] *= kept >> e & 1 ? p.dropout.scale : 0.f;
}

// What a lane does with a panel of W columns: 4 columns of every kStep-th row of its warp's 16.
template <int W> struct Lane {
  static constexpr int kPerRow = W / 4, kStep = 32 / kPerRow, kPasses = 16 / kStep;
  int row, col;
  FF_DEVICE Lane() : row(threadIdx.x % 32 / kPerRow), col(threadIdx.x % kPerRow * 4) {}
};

// `tile`: the first row and column of the warpgroup's part of it.
template <class T, int Parts>
FF_DEVICE void finish_forward(const Params<T>& p, const float (&sums)[Parts][kCols / Parts / 2], Tiles<T>* tiles,
                              Place tile) {
  constexpr int W = kCols / Parts / kPanels;
  const int warp = threadIdx.x / 32;
  const Lane<W> lane;
  float* panel = tiles->panel[warp];
#pragma unroll 1
  for (int which = 0; which < kPanels && tile.col + which * W < p.cols; which++) {
    __syncwarp();  // the panel before has been read
#pragma unroll
    for (int part = 0; part < Parts; part++) put_panel<W>(sums[part], which, panel + part * 16 * W);
    __syncwarp();
    const int col = tile.col + which * W + lane.col;
    const Pack<T, 4> b1 = load_bias(p.b1, col, p.cols), b_up = load_bias(p.b_up, col, p.cols);
#pragma unroll 2
    for (int pass = 0; pass < Lane<W>::kPasses; pass++) {
      const int r = lane.row + pass * Lane<W>::kStep;
      const int row = tile.row + warp % 4 * 16 + r, left = row < p.rows ? p.cols - col : 0;
      const int64_t at = int64_t(row) * p.cols + col;
      float z[4], out[4], slope;
      get_panel<W>(z, panel, r, lane.col);
      if (p.gate) store_columns(p.gate + at, z, left, p.whole);
      with_kind(p.kind, [&](auto kind) {
#pragma unroll
        for (int e = 0; e < 4; e++) evaluate<decltype(kind)::value>(z[e] + b1[e], out[e], slope);
      });
      if constexpr (Parts == 2) {
        float u[4];
        get_panel<W>(u, panel + 16 * W, r, lane.col);
        if (p.up) store_columns(p.up + at, u, left, p.whole);
#pragma unroll
        for (int e = 0; e < 4; e++) out[e] *= u[e] + b_up[e];
      }
      drop(out, p, row, col);
      store_columns(p.out + at, out, left, p.whole);
    }
  }
}

template <class T>
FF_DEVICE void finish_backward(const Params<T>& p, const float (&sums)[1][kCols / 2], Tiles<T>* tiles, Place tile) {
  constexpr int W = kCols / kPanels, kPasses = Lane<W>::kPasses, kStep = Lane<W>::kStep, kAhead = 4;
  const int warp = threadIdx.x / 32, warpgroup = warp / 4, t = threadIdx.x % 128;
  const Lane<W> lane;
  const int first = tile.row + warp % 4 * 16 + lane.row;
  float* panel = tiles->panel[warp];
#pragma unroll 1
  for (int which = 0; which < kPanels && tile.col + which * W < p.cols; which++) {
    const int col = tile.col + which * W + lane.col;
    const int64_t at = int64_t(first) * p.cols + col, step = int64_t(kStep) * p.cols;
    const auto left_of = [&](int pass) { return first + pass * kStep < p.rows ? p.cols - col : 0; };
    Pack<T, 4> gate[kAhead], up[kAhead];  // on their way
    const auto start_loading = [&](int pass) {
      gate[pass % kAhead] = load_columns(p.gate + at + pass * step, left_of(pass), p.whole);
      if (p.up) up[pass % kAhead] = load_columns(p.up + at + pass * step, left_of(pass), p.whole);
    };
#pragma unroll
    for (int pass = 0; pass < kAhead; pass++) start_loading(pass);
    const Pack<T, 4> b1 = load_bias(p.b1, col, p.cols), b_up = load_bias(p.b_up, col, p.cols);
    __syncwarp();  // the panel before has been read
    put_panel<W>(sums[0], which, panel);
    __syncwarp();
    float sum[2][4] = {};
    int64_t target = int64_t(first) * p.dgate_stride + col;
#pragma unroll
    for (int pass = 0; pass < kPasses; pass++, target += kStep * p.dgate_stride) {
      const int left = left_of(pass);
      float d[4], value[4], slope[4];
      get_panel<W>(d, panel, lane.row + pass * kStep, lane.col);
      drop(d, p, first + pass * kStep, col);
      with_kind(p.kind, [&](auto kind) {
#pragma unroll
        for (int e = 0; e < 4; e++) evaluate<decltype(kind)::value>(gate[pass % kAhead][e] + b1[e], value[e], slope[e]);
      });
      if (p.up) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          value[e] *= d[e];
          d[e] *= up[pass % kAhead][e] + b_up[e];
          sum[1][e] += left > 0 ? value[e] : 0.f;
        }
        store_columns(p.dup + target, value, left, p.whole);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
        d[e] *= slope[e];
        sum[0][e] += left > 0 ? d[e] : 0.f;
      }
      store_columns(p.dgate + target, d, left, p.whole);
      if (pass + kAhead < kPasses) start_loading(pass + kAhead);
    }
    if (!p.partial) continue;
    // Over the lanes with the same columns, then over the four warps: thread t adds column t % 64 of sum t / 64.
    __syncwarp();
#pragma unroll
    for (int s = 0; s < 2; s++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        static_assert(kStep == 2, "two lanes have the same columns");
        sum[s][e] += __shfl_xor_sync(~0u, sum[s][e], 16);
        if (lane.row == 0) panel[s * W + lane.col + e] = sum[s][e];
      }
    }
    named_barrier_sync(1 + warpgroup, 128);
    float total = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) total += tiles->panel[warpgroup * 4 + w][t];
    const int strip = tile.row / kStrip, sum_col = tile.col + which * W + t % W;
    if (sum_col < p.cols && (t < W || p.up))
      p.partial[int64_t(t / W * p.strips + strip) * p.cols + sum_col] = total;
    named_barrier_sync(1 + warpgroup, 128);
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------
// Across: a row of the weights in memory has one of the inner dimension and all columns, else the other way round.
template <class T, int Parts, bool Backward, bool Across>
__global__ void __launch_bounds__(kThreads, 1) linear_activation_hopper(const __grid_constant__ Params<T> p) {
#ifdef FF_HOPPER
  constexpr int kTileCols = kCols / Parts;
  FF_DYNAMIC_SHARED(Tiles<T>, tiles);
  const int warpgroup = int(threadIdx.x / 128), t = int(threadIdx.x % 128);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(&tiles->full[i], 1);
      mbarrier_init(&tiles->empty[i], 8);  // a warp each
    }
    fence_async_proxy();
  }
  __syncthreads();

  uint32_t n = 0;  // slices so far
  if (warpgroup == 2) {
    decrease_registers<24>();
    if (t > 0) return;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < p.down * p.across; tile += gridDim.x) {
      const Place at = find_tile(p, tile, kTileCols);
#pragma unroll 1
      for (int step = 0; step < p.steps; step++, n++) {
        const int stage = n % kStages, inner = step * kInner;
        uint64_t* full = &tiles->full[stage];
        T* b = tiles->b[stage];
        mbarrier_wait(&tiles->empty[stage], n / kStages % 2 ^ 1);
        mbarrier_arrive_expect(full, sizeof tiles->a[stage] + sizeof tiles->b[stage]);
        tma_load_2d(tiles->a[stage], &p.left, full, inner, at.row);
#pragma unroll
        for (int part = 0; part < Parts; part++) {
          const TensorMap* map = &p.right[part];
          T* to = b + part * kTileCols * kInner;
          if constexpr (Across) {
#pragma unroll
            for (int col = 0; col < kTileCols; col += 64)
              tma_load_2d(to + col * kInner, map, full, at.col + col, inner);
          } else {
            tma_load_2d(to, map, full, inner, at.col);
          }
        }
      }
    }
    return;
  }

  increase_registers<240>();
  float sums[Parts][kTileCols / 2];
  const auto release = [&](uint32_t slice) {
    if (t % 32 == 0) mbarrier_arrive(&tiles->empty[slice % kStages]);
  };
#pragma unroll 1
  for (uint32_t tile = blockIdx.x; tile < p.down * p.across; tile += gridDim.x) {
#pragma unroll 1
    for (int step = 0; step < p.steps; step++, n++) {
      const int stage = n % kStages;
      const T *a = tiles->a[stage] + warpgroup * 64 * kInner, *b = tiles->b[stage];
      mbarrier_wait(&tiles->full[stage], n / kStages % 2);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kInner; k += 16) {
#pragma unroll
        for (int part = 0; part < Parts; part++) {
          const T* weights = b + part * kTileCols * kInner;
          wgmma_m64k16<T, 0, Across>(sums[part], k_in_rows<64>(a, k),
                                     Across ? k_across_rows<kInner>(weights, k) : k_in_rows<kTileCols>(weights, k),
                                     step > 0 || k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(n - 1);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int part = 0; part < Parts; part++) pin(sums[part]);
    release(n - 1);
    Place at = find_tile(p, tile, kTileCols);
    at.row += warpgroup * kStrip;
    if (at.row >= p.rows) continue;  // the last tile's lower half
    if constexpr (Backward) finish_backward(p, sums, tiles, at);
    else finish_forward<T, Parts>(p, sums, tiles, at);
  }
#endif
}

// ---- arguments and launching ----------------------------------------------------------------------------------------
int check(const ff_linear_activation_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 0, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->inner >= 1, "inner: %lld is not positive", (long long)a->inner);
  FF_REQUIRE(a->kind >= FF_RELU && a->kind <= FF_SILU, "kind: %d is not an ff_activation", int(a->kind));
  FF_REQUIRE(a->dropout_p >= 0 && a->dropout_p <= 1, "dropout_p: %g is not in [0, 1]", a->dropout_p);
  FF_REQUIRE(a->dtype >= FF_FLOAT32 && a->dtype <= FF_FLOAT64, "dtype: %d is not an ff_dtype", int(a->dtype));
  if (!is_half_precision(a->dtype))
    return fail(FF_UNSUPPORTED, "dtype: %s; linear_activation's CUDA kernel takes bfloat16 and float16",
                dtype_name(a->dtype));
  if (a->rows > INT32_MAX - kRows || a->cols > INT32_MAX - kCols || a->inner > INT32_MAX - kInner ||
      (a->rows / kRows + 1) * (a->cols * 2 / kCols + 1) > INT32_MAX)
    return fail(FF_UNSUPPORTED, "rows, cols, inner: %lld, %lld, %lld are too many to count in 32 bits",
                (long long)a->rows, (long long)a->cols, (long long)a->inner);
  if (!is_hopper()) return fail(FF_UNSUPPORTED, "linear_activation: the device's compute capability is not 9.0");
  return FF_OK;
}

// As TMA reads it: columns next to each other, rows (where there are several) and the start at multiples of 16 bytes.
bool readable(const void* data, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  return aligned16(data) && (col_stride == 1 || cols == 1) && (rows == 1 || (row_stride > 0 && row_stride % 8 == 0));
}
int make_map(TensorMap* map, const char* name, int dtype, const void* data, int64_t rows, int64_t cols,
             int64_t row_stride, int64_t col_stride, int box_rows) {
  if (!readable(data, rows, cols, row_stride, col_stride))
    return fail(FF_UNSUPPORTED, "%s: rows must start at multiples of 16 bytes", name);
  const int64_t stride = rows == 1 ? (cols + 7) / 8 * 8 : row_stride;
  return make_tensor_map(map, dtype == FF_BFLOAT16, data, rows, cols, stride, box_rows);
}

int64_t strips_of(const ff_linear_activation_args* a) { return (a->rows + kStrip - 1) / kStrip; }

// `stride`: of the weights, of a column and of one of the inner dimension.
template <class T, int Parts, bool Backward>
int run(const char* name, const ff_linear_activation_args* a, Params<T>& p, const char* operand, const void* data,
        int64_t data_stride, const char* const (&weight_names)[Parts], const void* const (&weights)[Parts],
        const int64_t (&stride)[2], void* stream) {
  if (int status = make_map(&p.left, operand, a->dtype, data, a->rows, a->inner, data_stride, 1, kRows)) return status;
  const bool across = !readable(weights[0], a->cols, a->inner, stride[0], stride[1]);
  for (int part = 0; part < Parts; part++) {
    TensorMap* map = &p.right[part];
    const int status = across ? make_map(map, weight_names[part], a->dtype, weights[part], a->inner, a->cols, stride[1],
                                         stride[0], kInner)
                              : make_map(map, weight_names[part], a->dtype, weights[part], a->cols, a->inner, stride[0],
                                         stride[1], kCols / Parts);
    if (status) return status;
  }
  p.rows = int(a->rows), p.cols = int(a->cols);
  p.down = uint32_t((a->rows + kRows - 1) / kRows), p.across = uint32_t((a->cols * Parts + kCols - 1) / kCols);
  p.steps = int((a->inner + kInner - 1) / kInner);
  p.kind = a->kind, p.dropout = make_dropout(a->dropout_p, a->seed);
  p.b1 = static_cast<const T*>(a->b1), p.b_up = static_cast<const T*>(a->b_up);
  p.gate = static_cast<T*>(a->gate), p.up = static_cast<T*>(a->up);
  p.whole = a->cols % 4 == 0 && a->dgate_stride % 4 == 0;
  for (const void* pointer : {a->out, a->gate, a->up, a->dgate, a->dup})
    p.whole &= reinterpret_cast<uintptr_t>(pointer) % (4 * sizeof(T)) == 0;
  const int64_t count = multiprocessors(), tiles = int64_t(p.down) * p.across;
  if (count == 0) {
    const int status = check_cuda(name);
    return status != FF_OK ? status : fail(FF_DEVICE_ERROR, "%s: the device has no multiprocessors", name);
  }
  return launch(name, across ? linear_activation_hopper<T, Parts, Backward, true>
                             : linear_activation_hopper<T, Parts, Backward, false>,
                dim3(unsigned(tiles < count ? tiles : count)), dim3(kThreads), sizeof(Tiles<T>), stream, p);
}

template <class T> int forward(const ff_linear_activation_args* a, void* stream) {
  Params<T> p{};
  p.out = static_cast<T*>(a->out);
  const char* name = "linear_activation_forward";
  if (a->w_up)
    return run<T, 2, false>(name, a, p, "x", a->x, a->x_stride, {"w1", "w_up"}, {a->w1, a->w_up}, a->w_stride, stream);
  return run<T, 1, false>(name, a, p, "x", a->x, a->x_stride, {"w1"}, {a->w1}, a->w_stride, stream);
}

template <class T> int backward(const ff_linear_activation_args* a, void* stream) {
  const bool sums = a->db1 || a->db_up;
  const char* name = "linear_activation_backward";
  if (a->rows > 0) {
    Params<T> p{};
    p.dgate = static_cast<T*>(a->dgate), p.dup = static_cast<T*>(a->dup), p.dgate_stride = a->dgate_stride;
    p.partial = sums ? static_cast<float*>(a->workspace) : nullptr, p.strips = int(strips_of(a));
    const int64_t stride[2] = {a->w2_stride[1], a->w2_stride[0]};
    if (int status = run<T, 1, true>(name, a, p, "dout", a->dout, a->dout_stride, {"w2"}, {a->w2}, stride, stream))
      return status;
  }
  if (!sums) return FF_OK;
  return launch_column_sum(name, static_cast<const float*>(a->workspace), strips_of(a), a->cols,
                           static_cast<T*>(a->db1), static_cast<T*>(a->db_up), stream);
}

}  // namespace
}  // namespace ff

extern "C" int ff_cuda_linear_activation_forward(const ff_linear_activation_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  if (a->rows == 0 || a->cols == 0) return FF_OK;
  FF_REQUIRE(a->x && a->w1 && a->out, "x, w1, out: must not be NULL");
  FF_REQUIRE(a->w_up || (!a->up && !a->b_up), "up, b_up: need w_up");
  return a->dtype == FF_BFLOAT16 ? forward<__nv_bfloat16>(a, stream) : forward<__half>(a, stream);
}

extern "C" int ff_cuda_linear_activation_backward(const ff_linear_activation_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  if (a->cols == 0) return FF_OK;
  FF_REQUIRE(a->rows == 0 || (a->dout && a->w2 && a->gate && a->dgate), "dout, w2, gate, dgate: must not be NULL");
  FF_REQUIRE(a->rows == 0 || !a->up || a->dup, "dup: must not be NULL where up is given");
  FF_REQUIRE(a->up || !a->db_up || a->rows == 0, "db_up: needs up");
  FF_REQUIRE(a->workspace || !(a->db1 || a->db_up) || a->rows == 0,
             "workspace: must not be NULL when db1 or db_up is asked for");
  return a->dtype == FF_BFLOAT16 ? backward<__nv_bfloat16>(a, stream) : backward<__half>(a, stream);
}

extern "C" size_t ff_cuda_linear_activation_backward_workspace(const ff_linear_activation_args* a) {
  if (!(a->db1 || a->db_up) || a->rows <= 0 || a->cols <= 0) return 0;
  return size_t(ff::strips_of(a)) * size_t(a->cols) * sizeof(float) * (a->up ? 2 : 1);
}
