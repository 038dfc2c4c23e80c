// The loops of layer_norm and rms_norm, alone and behind a residual addition. `Centred` tells the norms apart: a layer norm
// subtracts the row's mean, an rms norm has none, and whatever has to do with it is not compiled.
//
// A row is read from memory once: the later passes (squares, output) find it in cache. The variance is the exact two-pass
// one.
#pragma once
#include "rows.h"

namespace ff {
namespace FF_ISA {

// Asks for the cache lines of the pair at p. The hardware's own prefetcher starts anew with every page, and a row often is
// one, so kernels ask for the next rows while they work on these.
template <class T> FF_INLINE void fetch(const T* p) { __builtin_prefetch(p); }
// Likewise, to write there.
template <class T> FF_INLINE void fetch_to_write(const T* p) { __builtin_prefetch(p, 1); }

template <class T> FF_NOINLINE acc_t<T> row_mean(const T* x, int64_t n) {
  using A = acc_t<T>;
  const double sum = reduce_row<A>(
      n, [&](int64_t i) FF_LAMBDA { return load_pair(x + i); },
      [&](int64_t i, int k) FF_LAMBDA { return load_n(x + i, k); });
  return A(sum / double(n));
}

template <bool Centred, class V, class A> FF_INLINE V centred(V v, A mean) {
  if constexpr (Centred) return v - mean;
  else return v;
}

template <class A> FF_INLINE A rstd_of(double sum_of_squares, int64_t n, double eps) {
  return A(1.0 / std::sqrt(sum_of_squares / double(n) + eps));
}

// 1 / sqrt(var + eps) of a row with that mean, 1 / sqrt(mean square + eps) without one (then it is 0). fetch(i), called
// along the way, asks for what is needed next.
template <bool Centred, class T, class Fetch>
FF_NOINLINE acc_t<T> row_rstd(const T* x, int64_t n, double eps, acc_t<T> mean, Fetch fetch) {
  using A = acc_t<T>;
  const double squares = reduce_row<A>(
      n,
      [&](int64_t i) FF_LAMBDA {
        fetch(i);
        Pair<A> d = centred<Centred>(load_pair(x + i), mean);
        return d * d;
      },
      [&](int64_t i, int k) FF_LAMBDA {
        vec_t<A> d = centred<Centred>(k == vec<A>::W ? load(x + i) : load_partial(x + i, k, mean), mean);
        return d * d;
      });
  return rstd_of<A>(squares, n, eps);
}

// Weight and bias of a norm as its loops read them.
template <class T, class P> struct Affine {
  using A = acc_t<T>;
  const P *weight, *bias;                  // as given: the tail's
  const A *pairs_of_weight, *pairs_of_bias;  // in the order of T's pairs
  // `buffer` has room for 2 n.
  FF_INLINE Affine(const void* w, const void* b, int64_t n, A* buffer)
      : weight((const P*)w), bias((const P*)b), pairs_of_weight(arranged<T>(weight, n, buffer)),
        pairs_of_bias(arranged<T>(bias, n, buffer + n)) {}
};

template <bool Centred, class T, class P, class Fetch>
FF_NOINLINE void normalize_row(const T* x, const Affine<T, P>& to, T* out, int64_t n, acc_t<T> mean, acc_t<T> rstd,
                               Fetch fetch) {
  using A = acc_t<T>;
  const A shift = mean * rstd;
  auto rows = [&](auto has_weight, auto has_bias) FF_LAMBDA {
    for_row<A>(
        n,
        [&](int64_t i) FF_LAMBDA {
          fetch(i);
          // Half precision cannot tell x - mean from its rounding to float: one multiply-add instead of two operations.
          Pair<A> y;
          if (sizeof(T) == 2) y = centred<Centred>(load_pair(x + i) * rstd, shift);
          else y = centred<Centred>(load_pair(x + i), mean) * rstd;
          if (has_weight) y = y * load_pair(to.pairs_of_weight + i);
          if (has_bias) y += load_pair(to.pairs_of_bias + i);
          store_pair(out + i, y);
        },
        [&](int64_t i, int k) FF_LAMBDA {
          vec_t<A> y = centred<Centred>(load_n(x + i, k), mean) * rstd;
          if (has_weight) y *= load_n(to.weight + i, k);
          if (has_bias) y += load_n(to.bias + i, k);
          store_n(out + i, y, k);
        });
  };
  for_bool(to.weight, [&](auto w) FF_LAMBDA { for_bool(to.bias, [&](auto b) FF_LAMBDA { rows(w, b); }); });
}

// How many rows backward takes at once. More share the loads and stores of the running sums, but rows 2048 or 4096 bytes
// apart compete for the same lines of L1: two rows were faster than four in every dtype.
constexpr int kRows = 2;

// Gradients of R rows at once: the running dweight and dbias are loaded and stored once for all of them.
//   g = dout * weight;  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) (+ dsummed);  dweight += dout * xhat
// where an rms norm has no mean(g). Its `means` is not read. Usual promises the usual: a weight, and all gradients wanted
// (of the bias with a mean only), so that the loops ask nothing.
// prefetch(r, i), called along the first pass, asks for what is needed next.
// `finish(r, i, dx)` receives each pair of dx, `finish(r, i, dx, k)` the vectors of the tail. dweight and dbias are in the
// order of T's pairs (arranged_at).
template <bool Centred, bool Usual, int R, class T, class P, class Prefetch, class Finish>
FF_INLINE void backward_rows(const T* const* dout, const T* const* x, const Affine<T, P>& affine, const acc_t<T>* means,
                             const acc_t<T>* rstd, acc_t<T>* dweight, acc_t<T>* dbias, int64_t n, bool want_dx,
                             Prefetch prefetch, Finish finish) {
  using A = acc_t<T>;
  constexpr int W = vec<A>::W;
  const bool weighted = Usual || affine.weight, need_dx = Usual || want_dx;
  const bool need_dweight = Usual || dweight, need_dbias = Usual ? Centred : dbias != nullptr;
  A mean[R] = {}, mean_g[R] = {}, mean_gx[R] = {};
  if (Centred) std::copy(means, means + R, mean);
  if (need_dx)
    for (int r = 0; r < R; r++) {
      // One pass over the row for both sums: chunks as in reduce_row.
      double sum_g = 0, sum_gx = 0;
      for (int64_t begin = 0; begin < n; begin += kChunk) {
        Pair<A> g_sum{}, gx_sum{};
        const int64_t end = std::min(n, begin + kChunk);
        int64_t i = begin;
        for (; i + 2 * W <= end; i += 2 * W) {
          prefetch(r, i);
          Pair<A> g = load_pair(dout[r] + i);
          if (weighted) g = g * load_pair(affine.pairs_of_weight + i);
          if (Centred) g_sum += g;
          gx_sum += g * centred<Centred>(load_pair(x[r] + i), mean[r]);
        }
        for (; i < end; i += W) {
          const int k = int(std::min<int64_t>(W, end - i));
          vec_t<A> g = load_n(dout[r] + i, k);
          if (weighted) g *= load_n(affine.weight + i, k);
          if (Centred) g_sum.first += g;
          gx_sum.first += g * centred<Centred>(load_n(x[r] + i, k), mean[r]);
        }
        sum_g += double(hsum(g_sum.first + g_sum.second));
        sum_gx += double(hsum(gx_sum.first + gx_sum.second));
      }
      mean_g[r] = A(sum_g / double(n));
      mean_gx[r] = A(sum_gx * double(rstd[r]) / double(n));
    }
  for_row<A>(
      n,
      [&](int64_t i) FF_LAMBDA {
        Pair<A> w = weighted ? load_pair(affine.pairs_of_weight + i) : Pair<A>{splat<A>(1), splat<A>(1)};
        Pair<A> dw{}, db{};
        if (need_dweight) dw = load_pair(dweight + i);
        if (need_dbias) db = load_pair(dbias + i);
        for (int r = 0; r < R; r++) {
          Pair<A> dy = load_pair(dout[r] + i), xhat = centred<Centred>(load_pair(x[r] + i), mean[r]) * rstd[r];
          if (need_dweight) dw += dy * xhat;
          if (need_dbias) db += dy;
          if (need_dx) finish(r, i, (centred<Centred>(dy * w, mean_g[r]) - xhat * mean_gx[r]) * rstd[r]);
        }
        if (need_dweight) store_pair(dweight + i, dw);
        if (need_dbias) store_pair(dbias + i, db);
      },
      [&](int64_t i, int k) FF_LAMBDA {
        vec_t<A> w = weighted ? load_n(affine.weight + i, k) : splat<A>(1);
        vec_t<A> dw{}, db{};
        if (need_dweight) dw = load_n(dweight + i, k);
        if (need_dbias) db = load_n(dbias + i, k);
        for (int r = 0; r < R; r++) {
          vec_t<A> dy = load_n(dout[r] + i, k), xhat = centred<Centred>(load_n(x[r] + i, k), mean[r]) * rstd[r];
          dw += dy * xhat;
          db += dy;
          if (need_dx) finish(r, i, rstd[r] * (centred<Centred>(dy * w, mean_g[r]) - xhat * mean_gx[r]), k);
        }
        if (need_dweight) store_n(dweight + i, dw, k);
        if (need_dbias) store_n(dbias + i, db, k);
      });
}

// Where a backward pass keeps each thread's running dweight and dbias: (threads, 2, cols) acc.
inline size_t backward_workspace(int64_t rows, int64_t cols, size_t acc_bytes) {
  return size_t(num_threads(rows * cols)) * 2 * size_t(cols) * acc_bytes;
}

// Adds up the threads' partial sums, in thread order, into dweight and dbias.
template <class T, class P>
void reduce_partials(const acc_t<T>* partial, int threads, int64_t cols, P* dweight, P* dbias) {
  using A = acc_t<T>;
  parallel_for(cols, 2 * threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; c++) {
      const A* sums = partial + arranged_at<T>(c, cols);
      A dw = 0, db = 0;
      for (int t = 0; t < threads; t++) dw += sums[(2 * t) * cols], db += sums[(2 * t + 1) * cols];
      if (dweight) dweight[c] = from_float<P>(acc_t<P>(dw));
      if (dbias) dbias[c] = from_float<P>(acc_t<P>(db));
    }
  });
}

template <bool Centred, class T, class P> void norm_rows(const ff_layer_norm_args* a) {
  using A = acc_t<T>;
  parallel_for(a->rows, a->cols, [&](int64_t begin, int64_t end, int) {
    const Affine<T, P> affine(a->weight, a->bias, a->cols, thread_buffer<A>(2 * a->cols));
    for (int64_t r = begin; r < end; r++) {
      const T *x = (const T*)a->x + r * a->x_stride, *next = r + 1 < end ? x + a->x_stride : x;
      T* out = (T*)a->out + r * a->cols;
      const A mean = Centred ? row_mean(x, a->cols) : A(0);
      // Where to fetch the next row was measured: half precision's conversions leave no room in the last pass.
      const A rstd = row_rstd<Centred>(x, a->cols, a->eps, mean, [&](int64_t i) FF_LAMBDA {
        if (sizeof(T) == 2) fetch(next + i);
        else fetch_to_write(out + i);
      });
      normalize_row<Centred>(x, affine, out, a->cols, mean, rstd, [&](int64_t i) FF_LAMBDA {
        if (sizeof(T) > 2) fetch(next + i);
      });
      if (Centred && a->mean) ((A*)a->mean)[r] = mean;
      if (a->rstd) ((A*)a->rstd)[r] = rstd;
    }
  });
}

template <bool Centred> int norm_forward(const ff_layer_norm_args* a) {
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    norm_rows<Centred, decltype(t), decltype(p)>(a);
    return FF_OK;
  });
}

template <bool Centred> int norm_backward(const ff_layer_norm_args* a) {
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
      auto block = [&](int64_t r, auto count, auto usual) {
        constexpr int R = decltype(count)::value;
        const T *dout[R], *x[R];
        for (int j = 0; j < R; j++) {
          dout[j] = (const T*)a->dout + (r + j) * a->dout_stride;
          x[j] = (const T*)a->x + (r + j) * a->x_stride;
        }
        auto finish = [&](int j, int64_t i, auto v, auto... k) FF_LAMBDA { store_n(dx + (r + j) * n + i, v, k...); };
        const int64_t next = r + 2 * R <= end ? R : 0;
        auto prefetch = [&](int j, int64_t i) FF_LAMBDA {
          if (dx) fetch_to_write(dx + (r + j) * n + i);
          if (sizeof(T) == 2) fetch(dout[j] + next * a->dout_stride + i), fetch(x[j] + next * a->x_stride + i);
        };
        backward_rows<Centred, decltype(usual)::value, R>(dout, x, affine, (const A*)a->mean + r, (const A*)a->rstd + r, dw,
                                                          db, n, dx != nullptr, prefetch, finish);
      };
      int64_t r = begin;
      for_bool(dx && a->weight && dw && !db == !Centred, [&](auto usual) {
        for (; r + kRows <= end; r += kRows) block(r, std::integral_constant<int, kRows>{}, usual);
      });
      for (; r < end; r++) block(r, std::integral_constant<int, 1>{}, std::false_type{});
    });
    if (partial) reduce_partials<T>(partial, threads, n, (P*)a->dweight, (P*)a->dbias);
    return FF_OK;
  });
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
namespace ff {
inline int check_norm(const ff_layer_norm_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->eps >= 0, "eps: %g is negative", a->eps);
  FF_REQUIRE(a->rows == 0 || a->x, "x: must not be NULL");
  return FF_OK;
}
inline int check_norm_forward(const ff_layer_norm_args* a) {
  if (int status = check_norm(a)) return status;
  FF_REQUIRE(a->out || a->rows == 0, "out: must not be NULL");
  return FF_OK;
}
inline int check_norm_backward(const ff_layer_norm_args* a) {
  if (int status = check_norm(a)) return status;
  FF_REQUIRE(a->rows == 0 || (a->dout && a->rstd), "dout, rstd: must not be NULL");
  FF_REQUIRE(!(a->dweight || a->dbias) || a->workspace, "workspace: must not be NULL when dweight or dbias is asked for");
  return FF_OK;
}
}  // namespace ff
#endif
