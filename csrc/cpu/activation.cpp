// dropout(act(x + bias) * (up + up_bias)) and its gradients on the CPU; the functions themselves are in activation.h.
//
// Floor: one read and one write forward, two reads and one write backward; with `up` one read more forward, one read and
// one write more backward. Biases, their gradients and the dropout mask move nothing. bfloat16 is taken apart as even and
// odd elements (vec.h), two vectors at a time; other types go vector by vector, whose registers suffice.
// A bias gradient is summed in the pass that computes dx, one row at a time: several rows at once would spare loads of the
// sums, but 4096 bytes apart they compete for the same lines of the cache (measured: 1.7 times slower at 8192 x 1024).
#include "activation.h"

#include "dropout.h"

FF_DECLARE_IMPL(activation_forward)
FF_DECLARE_IMPL(activation_backward)

namespace ff {
namespace FF_ISA {

using Args = ff_activation_args;

// Where the columns do not matter and nothing lies between the rows, the tensor is one long row.
static Args flattened(Args a, bool backward) {
  auto dense = [&](const void* p, int64_t stride) { return !p || stride == a.cols; };
  const bool columns = a.bias || a.up_bias || a.dbias || a.dup_bias || a.dropout_p > 0;
  const bool all_dense = dense(a.x, a.x_stride) && dense(a.up, a.up_stride) && dense(a.out, a.out_stride) &&
                         (!backward || (dense(a.dout, a.dout_stride) && dense(a.dx, a.dx_stride) &&
                                        dense(a.dup, a.dup_stride)));
  if (!columns && all_dense) a.cols *= a.rows, a.rows = 1;
  return a;
}

template <class T> FF_INLINE T* row(T* p, int64_t offset) { return p ? p + offset : p; }

// Vector by vector; in pairs where the storage type's order asks for it, and for relu, which is little but the loop.
template <ff_activation K, class T, class F> FF_INLINE void walk(int64_t n, F step) {
  if constexpr (kInOrder<T> && K != FF_RELU) for_row<acc_t<T>>(n, step);
  else for_row<acc_t<T>>(n, step, step);
}

template <ff_activation K, class T> static void forward(const Args& a) {
  parallel_blocks(a.rows, a.cols, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, int) {
    const int64_t n = c1 - c0;
    const T *bias = row((const T*)a.bias, c0), *up_bias = row((const T*)a.up_bias, c0);
    float* keep = a.dropout_p > 0 ? keep_row(n) : nullptr;
    for (int64_t r = r0; r < r1; r++) {
      const T *x = (const T*)a.x + r * a.x_stride + c0, *up = row((const T*)a.up, r * a.up_stride + c0);
      T* out = (T*)a.out + r * a.out_stride + c0;
      if (keep) dropout_scales(keep, n, uint64_t(r), a.seed, a.dropout_p, c0);
      if (bias || up || keep) {
        auto step = [&](int64_t i, auto... k) FF_LAMBDA {
          auto z = load_n(x + i, k...);
          if (bias) z += load_n(bias + i, k...);
          auto y = activate<K>(z);
          if (up) {
            auto u = load_n(up + i, k...);
            if (up_bias) u += load_n(up_bias + i, k...);
            y = y * u;
          }
          if (keep) y = y * scales<T>(keep, i, k...);
          store_n(out + i, y, k...);
        };
        walk<K, T>(n, step);
      } else {
        auto step = [&](int64_t i, auto... k) FF_LAMBDA { store_n(out + i, activate<K>(load_n(x + i, k...)), k...); };
        walk<K, T>(n, step);
      }
    }
  });
}

int activation_forward(const Args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) {
    using T = decltype(t);
    return for_activation(a->kind, [&](auto kind) {
      forward<decltype(kind)::value, T>(flattened(*a, false));
      return FF_OK;
    });
  });
}

// A thread's running sums are emptied into its totals this often, so that long columns keep float accuracy.
constexpr int64_t kRowsPerSum = 32;

// The sums of one bias gradient over the rows: (2, threads, cols) of running sums and totals, in the order of T's pairs.
template <class T> struct ColumnSums {
  using A = acc_t<T>;
  A* partial;
  int threads;
  int64_t cols;

  void clear() { std::fill(partial, partial + 2 * threads * cols, A(0)); }
  A* of(int thread, int64_t col) const { return partial ? partial + thread * cols + col : nullptr; }
  void empty(A* sum, int64_t n) const {
    A* total = sum + threads * cols;
    for (int64_t c = 0; c < n; c++) total[c] += sum[c], sum[c] = 0;
  }
  void reduce(T* out) const {
    for (int64_t c = 0; c < cols; c++) {
      A sum = 0;
      for (int i = 2 * threads - 1; i >= 0; i--) sum += partial[i * cols + arranged_at<T>(c, cols)];
      out[c] = from_float<T>(sum);
    }
  }
};

template <ff_activation K, class T> static void backward(const Args& a) {
  using A = acc_t<T>;
  const int64_t n = a.cols;
  const int threads = num_threads(a.rows * n);
  A* const workspace = (A*)a.workspace;
  ColumnSums<T> bias_sums{a.dbias ? workspace : nullptr, threads, n};
  ColumnSums<T> up_sums{a.dup_bias ? workspace + (a.dbias ? 2 * threads * n : 0) : nullptr, threads, n};
  for (ColumnSums<T>* s : {&bias_sums, &up_sums})
    if (s->partial) s->clear();
  parallel_blocks(a.rows, n, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, int thread) {
    const int64_t n = c1 - c0;
    const T *bias = row((const T*)a.bias, c0), *up_bias = row((const T*)a.up_bias, c0);
    A *const sum = bias_sums.of(thread, c0), *const up_sum = up_sums.of(thread, c0);
    float* keep = a.dropout_p > 0 ? keep_row(n) : nullptr;
    for (int64_t r = r0; r < r1; r++) {
      const T *x = (const T*)a.x + r * a.x_stride + c0, *up = row((const T*)a.up, r * a.up_stride + c0);
      const T* dout = (const T*)a.dout + r * a.dout_stride + c0;
      T *dx = (T*)a.dx + r * a.dx_stride + c0, *dup = row((T*)a.dup, r * a.dup_stride + c0);
      T* out = row((T*)a.out, r * a.out_stride + c0);
      if (keep) dropout_scales(keep, n, uint64_t(r), a.seed, a.dropout_p, c0);
      // Everything is loaded before anything is stored: outputs may lie over inputs.
      auto step = [&](int64_t i, auto... k) FF_LAMBDA {
        auto z = load_n(x + i, k...), d = load_n(dout + i, k...), value = z, slope = z;
        if (bias) z += load_n(bias + i, k...);
        evaluate<K>(z, value, slope);
        if (keep) d = d * scales<T>(keep, i, k...);
        if (up) {
          auto u = load_n(up + i, k...);
          if (up_bias) u += load_n(up_bias + i, k...);
          const auto du = d * value;
          store_n(dup + i, du, k...);
          if (up_sum) store_n(up_sum + i, load_n(up_sum + i, k...) + du, k...);
          d = d * u, value = value * u;
        }
        if (out) store_n(out + i, keep ? value * scales<T>(keep, i, k...) : value, k...);
        d = d * slope;
        if (sum) store_n(sum + i, load_n(sum + i, k...) + d, k...);
        store_n(dx + i, d, k...);
      };
      auto plain_step = [&](int64_t i, auto... k) FF_LAMBDA {
        auto z = load_n(x + i, k...), d = load_n(dout + i, k...), value = z, slope = z;
        evaluate<K>(z, value, slope);
        store_n(dx + i, d * slope, k...);
      };
      if (bias || up || keep || out || sum) walk<K, T>(n, step);
      else walk<K, T>(n, plain_step);
      if ((r - r0) % kRowsPerSum == kRowsPerSum - 1) {
        if (sum) bias_sums.empty(sum, n);
        if (up_sum) up_sums.empty(up_sum, n);
      }
    }
  });
  if (a.dbias) bias_sums.reduce((T*)a.dbias);
  if (a.dup_bias) up_sums.reduce((T*)a.dup_bias);
}

int activation_backward(const Args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) {
    using T = decltype(t);
    return for_activation(a->kind, [&](auto kind) {
      backward<decltype(kind)::value, T>(flattened(*a, true));
      return FF_OK;
    });
  });
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
static int check(const ff_activation_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 0, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->x || a->rows * a->cols == 0, "x: must not be NULL");
  FF_REQUIRE(a->up || !a->up_bias || a->rows * a->cols == 0, "up_bias: needs up");
  FF_REQUIRE(a->dropout_p >= 0 && a->dropout_p <= 1, "dropout_p: %g is not in [0, 1]", a->dropout_p);
  return FF_OK;
}

extern "C" int ff_cpu_activation_forward(const ff_activation_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->out || a->rows * a->cols == 0, "out: must not be NULL");
  return FF_DISPATCH(activation_forward)(a, stream);
}

extern "C" int ff_cpu_activation_backward(const ff_activation_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE((a->dout && a->dx && (a->dup || !a->up)) || a->rows * a->cols == 0, "dout, dx, dup: must not be NULL");
  FF_REQUIRE(a->up || !a->dup_bias || a->rows * a->cols == 0, "dup_bias: needs up");
  FF_REQUIRE(!(a->dbias || a->dup_bias) || a->workspace,
             "workspace: must not be NULL when dbias or dup_bias is asked for");
  return FF_DISPATCH(activation_backward)(a, stream);
}

extern "C" size_t ff_cpu_activation_backward_workspace(const ff_activation_args* a) {
  const size_t sums = size_t(!!a->dbias + !!a->dup_bias) * 2 * size_t(ff::FF_ISA::num_threads(a->rows * a->cols));
  return sums * size_t(a->cols) * (a->dtype == FF_FLOAT64 ? 8 : 4);
}
#endif
