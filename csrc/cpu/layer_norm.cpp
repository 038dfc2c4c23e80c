// Layer normalisation on the CPU: out = (x - mean) * rstd * weight + bias, and its gradients.
//
// Floor: one read and one write of the tensor forward, two reads and one write backward. Rows go to threads in contiguous
// parts; everything per row happens while the row is in L1 or L2 (layer_norm.h).
#include "layer_norm.h"

FF_DECLARE_IMPL(layer_norm_forward)
FF_DECLARE_IMPL(layer_norm_backward)

namespace ff {
namespace FF_ISA {

template <class T, class P> static void forward_rows(const ff_layer_norm_args* a) {
  using A = acc_t<T>;
  parallel_for(a->rows, a->cols, [&](int64_t begin, int64_t end, int) {
    const Affine<T, P> affine(a->weight, a->bias, a->cols, thread_buffer<A>(2 * a->cols));
    for (int64_t r = begin; r < end; r++) {
      const T *x = (const T*)a->x + r * a->x_stride, *next = r + 1 < end ? x + a->x_stride : x;
      T* out = (T*)a->out + r * a->cols;
      const A mean = row_mean(x, a->cols);
      // Where to fetch the next row was measured: half precision's conversions leave no room in the last pass.
      const A rstd = row_rstd(x, a->cols, a->eps, mean, [&](int64_t i) FF_LAMBDA {
        if (sizeof(T) == 2) fetch(next + i);
        else fetch_to_write(out + i);
      });
      normalize_row(x, affine, out, a->cols, mean, rstd, [&](int64_t i) FF_LAMBDA {
        if (sizeof(T) > 2) fetch(next + i);
      });
      if (a->mean) ((A*)a->mean)[r] = mean, ((A*)a->rstd)[r] = rstd;
    }
  });
}

int layer_norm_forward(const ff_layer_norm_args* a, void*) {
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    forward_rows<T, P>(a);
    return FF_OK;
  });
}

int layer_norm_backward(const ff_layer_norm_args* a, void*) {
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    using A = acc_t<T>;
    const int64_t n = a->cols;
    const int threads = num_threads(a->rows * n);
    A* partial = (a->dweight || a->dbias) ? (A*)a->workspace : nullptr;
    if (partial) std::fill(partial, partial + int64_t(threads) * 2 * n, A(0));
    T* dx = (T*)a->dx;
    parallel_for(a->rows, n, [&](int64_t begin, int64_t end, int thread) {
      A* dw = a->dweight ? partial + int64_t(2 * thread) * n : nullptr;
      A* db = a->dbias ? partial + int64_t(2 * thread + 1) * n : nullptr;
      const Affine<T, P> affine(a->weight, nullptr, n, thread_buffer<A>(2 * n));
      auto block = [&](int64_t r, auto count) {
        constexpr int R = decltype(count)::value;
        const T *dout[R], *x[R];
        for (int j = 0; j < R; j++) {
          dout[j] = (const T*)a->dout + (r + j) * a->dout_stride;
          x[j] = (const T*)a->x + (r + j) * a->x_stride;
        }
        auto finish = [&](int j, int64_t i, auto v, auto... k) FF_LAMBDA { store_n(dx + (r + j) * n + i, v, k...); };
        const int64_t next = r + 2 * R <= end ? R : 0;
        auto prefetch = [&](int j, int64_t i) FF_LAMBDA {
          if (sizeof(T) == 2) fetch(dout[j] + next * a->dout_stride + i), fetch(x[j] + next * a->x_stride + i);
        };
        backward_rows<R>(dout, x, affine, (const A*)a->mean + r, (const A*)a->rstd + r, dw, db, n, dx != nullptr, prefetch,
                         finish);
      };
      int64_t r = begin;
      for (; r + kRows<T> <= end; r += kRows<T>) block(r, std::integral_constant<int, kRows<T>>{});
      for (; r < end; r++) block(r, std::integral_constant<int, 1>{});
    });
    if (partial) reduce_partials<T>(partial, threads, n, (P*)a->dweight, (P*)a->dbias);
    return FF_OK;
  });
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
static int check(const ff_layer_norm_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->eps >= 0, "eps: %g is negative", a->eps);
  FF_REQUIRE(a->rows == 0 || a->x, "x: must not be NULL");
  return FF_OK;
}

extern "C" int ff_cpu_layer_norm_forward(const ff_layer_norm_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->out || a->rows == 0, "out: must not be NULL");
  FF_REQUIRE(!a->mean == !a->rstd, "mean, rstd: both or neither");
  return FF_DISPATCH(layer_norm_forward)(a, stream);
}

extern "C" int ff_cpu_layer_norm_backward(const ff_layer_norm_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->rows == 0 || (a->dout && a->mean && a->rstd), "dout, mean, rstd: must not be NULL");
  FF_REQUIRE(!(a->dweight || a->dbias) || a->workspace, "workspace: must not be NULL when dweight or dbias is asked for");
  return FF_DISPATCH(layer_norm_backward)(a, stream);
}

extern "C" size_t ff_cpu_layer_norm_backward_workspace(const ff_layer_norm_args* a) {
  return ff::FF_ISA::backward_workspace(a->rows, a->cols, a->dtype == FF_FLOAT64 ? 8 : 4);
}
#endif
