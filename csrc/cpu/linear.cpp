// A linear layer of a few rows, out = x W^T + start, with a weight of float32, bfloat16 or float16 in either orientation.
//
// Floor: the weight read once, so its bytes over the bandwidth. Every thread owns a range of the results' columns; the
// weight is converted in registers, sums are float32 and rounded once.
#include "linear.h"

FF_DECLARE_IMPL(linear)
FF_DECLARE_IMPL(linear_workspace)

namespace ff {
namespace FF_ISA {

using Args = ff_linear_args;
static constexpr int64_t kColumns = 64;  // of the result, which threads share out: whole pairs and cache lines

static bool in_rows(const Args* a) { return a->weight_stride[1] == 1; }

template <class T> static int run(const Args* a) {
  const int64_t M = a->rows, K = a->in_features, N = a->out_features;
  float *x = (float*)a->workspace, *y = x + M * K;
  const T *weight = (const T*)a->weight, *start = (const T*)a->start;
  T* out = (T*)a->out;
  for (int64_t r = 0; r < M; r++) {
    const T* from = (const T*)a->x + r * a->x_stride;
    if (in_rows(a)) pack_row(from, K, x + r * K);
    else
      for (int64_t k = 0; k < K; k++) x[r * K + k] = to_float(from[k]);
  }
  parallel_for((N + kColumns - 1) / kColumns, kColumns * K, [&](int64_t first, int64_t last, int) {
    const int64_t begin = first * kColumns, end = std::min(N, last * kColumns);
    if (in_rows(a))
      return dot_rows(M, K, x, K, weight, a->weight_stride[0], begin, end, [&](int64_t r, int64_t n, float sum) FF_LAMBDA {
        if (start) sum += to_float(start[r * a->start_stride + n]);
        out[r * a->out_stride + n] = from_float<T>(sum);
      });
    for (int64_t r = 0; r < M; r++) {
      if (start) pack_row(start + r * a->start_stride + begin, end - begin, y + r * N + begin);
      else std::fill(y + r * N + begin, y + r * N + end, 0.f);
    }
    add_columns(M, K, x, K, weight, a->weight_stride[1], y, N, begin, end);
    for (int64_t r = 0; r < M; r++) {
      const float* from = y + r * N;
      T* to = out + r * a->out_stride;
      int64_t c = begin;
      for (; c + kPair <= end; c += kPair) store_pair<T>(to + c, {load(from + c), load(from + c + kW)});
      for (; c < end; c++) to[c] = from_float<T>(from[c]);
    }
  });
  return FF_OK;
}

int linear(const Args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) -> int {
    using T = decltype(t);
    if constexpr (sizeof(T) == 8) return fail(FF_UNSUPPORTED, "dtype: float64");
    else return run<T>(a);
  });
}

size_t linear_workspace(const Args* a) {
  return size_t(a->rows * (a->in_features + (in_rows(a) ? 0 : a->out_features))) * sizeof(float);
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
extern "C" int ff_cpu_linear(const ff_linear_args* a, void* stream) {
  FF_REQUIRE(a, "args: NULL");
  if (a->dtype == FF_FLOAT64) return ff::fail(FF_UNSUPPORTED, "dtype: float64; float32, bfloat16 and float16 are supported");
  FF_REQUIRE(a->rows >= 0 && a->in_features >= 0 && a->out_features >= 0,
             "rows, in_features, out_features: %lld, %lld, %lld", (long long)a->rows, (long long)a->in_features,
             (long long)a->out_features);
  if (a->rows == 0 || a->out_features == 0) return FF_OK;
  FF_REQUIRE(a->weight_stride[0] == 1 || a->weight_stride[1] == 1, "weight_stride: neither of %lld, %lld is 1",
             (long long)a->weight_stride[0], (long long)a->weight_stride[1]);
  FF_REQUIRE(a->out && a->workspace && (a->in_features == 0 || (a->x && a->weight)),
             "x, weight, out, workspace: must not be NULL");
  return FF_DISPATCH(linear)(a, stream);
}

extern "C" size_t ff_cpu_linear_workspace(const ff_linear_args* a) { return FF_DISPATCH(linear_workspace)(a); }
#endif
