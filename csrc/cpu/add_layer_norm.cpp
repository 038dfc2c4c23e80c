// summed = residual + dropout(x); out = layer_norm(summed), in one pass over memory.
//
// Floor: two reads and two writes forward; three reads and one write (two with dropout) backward. The dropout mask is
// recomputed from the seed in a row-sized buffer on the stack's side of the cache, never stored.
#include "dropout.h"
#include "layer_norm.h"

FF_DECLARE_IMPL(add_layer_norm_forward)
FF_DECLARE_IMPL(add_layer_norm_backward)

namespace ff {
namespace FF_ISA {

template <class T, class P> static void forward_rows(const ff_add_layer_norm_args* a) {
  using A = acc_t<T>;
  const int64_t n = a->cols;
  parallel_for(a->rows, n, [&](int64_t begin, int64_t end, int) {
    const Affine<T, P> affine(a->weight, a->bias, n, thread_buffer<A>(2 * n));
    float* keep = a->dropout_p > 0 ? keep_row(n) : nullptr;
    for (int64_t r = begin; r < end; r++) {
      const T* x = (const T*)a->x + r * a->x_stride;
      const T* residual = (const T*)a->residual + r * a->residual_stride;
      T *summed = (T*)a->summed + r * n, *out = (T*)a->out + r * n;
      auto add = [&](auto scaled) FF_LAMBDA {  // stores the sum, and adds it up as it is stored
        return reduce_row<A>(
            n,
            [&](int64_t i) FF_LAMBDA {
              const Pair<A> v = round_pair<T>(load_pair(residual + i) + scaled(load_pair(x + i), i));
              store_rounded(summed + i, v);
              return v;
            },
            [&](int64_t i, int k) FF_LAMBDA {
              store_n(summed + i, load_n(residual + i, k) + scaled(load_n(x + i, k), i, k), k);
              return load_n(summed + i, k);
            });
      };
      double sum;
      if (keep) {
        dropout_scales(keep, n, uint64_t(r), a->seed, a->dropout_p);
        sum = add([&](auto v, int64_t i, auto... k) FF_LAMBDA { return v * scales<T>(keep, i, k...); });
      } else {
        sum = add([](auto v, auto...) FF_LAMBDA { return v; });
      }
      const A mean = A(sum / double(n));
      const bool more = r + 1 < end;
      const T *next_x = x + (more ? a->x_stride : 0), *next_residual = residual + (more ? a->residual_stride : 0);
      const A rstd = row_rstd(summed, n, a->eps, mean, [&](int64_t i) FF_LAMBDA {
        if (sizeof(T) == 2) fetch(next_x + i), fetch(next_residual + i);
      });
      normalize_row(summed, affine, out, n, mean, rstd, [](int64_t) {});
      if (a->mean) ((A*)a->mean)[r] = mean, ((A*)a->rstd)[r] = rstd;
    }
  });
}

int add_layer_norm_forward(const ff_add_layer_norm_args* a, void*) {
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    forward_rows<T, P>(a);
    return FF_OK;
  });
}

int add_layer_norm_backward(const ff_add_layer_norm_args* a, void*) {
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    using A = acc_t<T>;
    const int64_t n = a->cols;
    const int threads = num_threads(a->rows * n);
    A* partial = (a->dweight || a->dbias) ? (A*)a->workspace : nullptr;
    if (partial) std::fill(partial, partial + int64_t(threads) * 2 * n, A(0));
    const bool drop = a->dx && a->dropout_p > 0;
    parallel_for(a->rows, n, [&](int64_t begin, int64_t end, int thread) {
      A* dw = a->dweight ? partial + int64_t(2 * thread) * n : nullptr;
      A* db = a->dbias ? partial + int64_t(2 * thread + 1) * n : nullptr;
      float* keep = drop ? keep_row(n) : nullptr;
      const Affine<T, P> affine(a->weight, nullptr, n, thread_buffer<A>(2 * n));
      auto block = [&](int64_t r, auto count) {
        constexpr int R = decltype(count)::value;
        const T *dout[R], *x[R];
        for (int j = 0; j < R; j++) {
          dout[j] = (const T*)a->dout + (r + j) * a->dout_stride;
          x[j] = (const T*)a->summed + (r + j) * n;
        }
        auto finish = [&](int j, int64_t i, auto v, auto... k) FF_LAMBDA {
          if (a->dsummed) v += load_n((const T*)a->dsummed + (r + j) * a->dsummed_stride + i, k...);
          store_n((T*)a->dresidual + (r + j) * n + i, v, k...);
        };
        const int64_t next = r + 2 * R <= end ? R : 0;
        auto prefetch = [&](int j, int64_t i) FF_LAMBDA {
          if (sizeof(T) > 2) return;
          fetch(dout[j] + next * a->dout_stride + i), fetch(x[j] + next * n + i);
          if (a->dsummed) fetch((const T*)a->dsummed + (r + j) * a->dsummed_stride + i);
        };
        backward_rows<R>(dout, x, affine, (const A*)a->mean + r, (const A*)a->rstd + r, dw, db, n, true, prefetch, finish);
        if (a->dx)
          for (int j = 0; j < R; j++) {
            const T* from = (const T*)a->dresidual + (r + j) * n;
            T* to = (T*)a->dx + (r + j) * n;
            if (!keep) {
              memcpy((void*)to, from, size_t(n) * sizeof(T));
              continue;
            }
            dropout_scales(keep, n, uint64_t(r + j), a->seed, a->dropout_p);
            auto drop = [&](int64_t i, auto... k) FF_LAMBDA {
              store_n(to + i, load_n(from + i, k...) * scales<T>(keep, i, k...), k...);
            };
            for_row<A>(n, drop, drop);
          }
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
static int check(const ff_add_layer_norm_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->eps >= 0, "eps: %g is negative", a->eps);
  FF_REQUIRE(a->dropout_p >= 0 && a->dropout_p <= 1, "dropout_p: %g is not in [0, 1]", a->dropout_p);
  FF_REQUIRE(a->rows == 0 || a->summed, "summed: must not be NULL");
  return FF_OK;
}

extern "C" int ff_cpu_add_layer_norm_forward(const ff_add_layer_norm_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->rows == 0 || (a->x && a->residual && a->out), "x, residual, out: must not be NULL");
  FF_REQUIRE(!a->mean == !a->rstd, "mean, rstd: both or neither");
  return FF_DISPATCH(add_layer_norm_forward)(a, stream);
}

extern "C" int ff_cpu_add_layer_norm_backward(const ff_add_layer_norm_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->rows == 0 || (a->dout && a->dresidual && a->mean && a->rstd),
             "dout, dresidual, mean, rstd: must not be NULL");
  FF_REQUIRE(!(a->dweight || a->dbias) || a->workspace, "workspace: must not be NULL when dweight or dbias is asked for");
  return FF_DISPATCH(add_layer_norm_backward)(a, stream);
}

extern "C" size_t ff_cpu_add_layer_norm_backward_workspace(const ff_add_layer_norm_args* a) {
  return ff::FF_ISA::backward_workspace(a->rows, a->cols, a->dtype == FF_FLOAT64 ? 8 : 4);
}
#endif
