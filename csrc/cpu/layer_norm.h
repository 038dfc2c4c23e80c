// Row functions that layer_norm.cpp and add_layer_norm.cpp share.
//
// A row is read from memory once: the later passes (centred squares, output) find it in cache. The variance is the exact
// two-pass one.
#pragma once
#include "rows.h"

namespace ff {
namespace FF_ISA {

template <class T>
FF_INLINE void row_statistics(const T* x, int64_t n, double eps, acc_t<T>& mean, acc_t<T>& rstd) {
  using A = acc_t<T>;
  A mu = A(reduce_row<A>(n, [&](int64_t i, int k) FF_LAMBDA { return load_n(x + i, k); }) / double(n));
  double m2 = reduce_row<A>(n, [&](int64_t i, int k) FF_LAMBDA {
    vec_t<A> d = k == vec<A>::W ? load(x + i) - mu : load_partial(x + i, k, mu) - mu;
    return d * d;
  });
  mean = mu;
  rstd = A(1.0 / std::sqrt(m2 / double(n) + eps));
}

template <class T, class P>
FF_INLINE void normalize_row(const T* x, const P* weight, const P* bias, T* out, int64_t n, acc_t<T> mean,
                             acc_t<T> rstd) {
  using A = acc_t<T>;
  if (weight && bias)
    for_row<A>(n, [&](int64_t i, int k) FF_LAMBDA {
      store_n(out + i, (load_n(x + i, k) - mean) * rstd * load_n(weight + i, k) + load_n(bias + i, k), k);
    });
  else
    for_row<A>(n, [&](int64_t i, int k) FF_LAMBDA {
      vec_t<A> y = (load_n(x + i, k) - mean) * rstd;
      if (weight) y *= load_n(weight + i, k);
      if (bias) y += load_n(bias + i, k);
      store_n(out + i, y, k);
    });
}

// How many rows to take at once. More share the loads and stores of the running sums, but rows 4096 bytes apart compete
// for the same lines of L1: at 8192 x 1024 two rows of float are 1.4 times as fast as four.
template <class T> constexpr int kRows = sizeof(T) == 2 ? 4 : 2;

// Gradients of R rows at once: the running dweight and dbias are loaded and stored once for all of them.
//   g = dout * weight;  dx = rstd * (g - mean(g) - xhat * mean(g * xhat)) (+ dsummed);  dweight += dout * xhat
// `finish(r, i, dx, k)` receives each vector of dx.
template <int R, class T, class P, class Finish>
FF_INLINE void backward_rows(const T* const* dout, const T* const* x, const P* weight, const acc_t<T>* mean,
                             const acc_t<T>* rstd, acc_t<T>* dweight, acc_t<T>* dbias, int64_t n, bool need_dx,
                             Finish finish) {
  using A = acc_t<T>;
  A mean_g[R] = {}, mean_gx[R] = {};
  if (need_dx)
    for (int r = 0; r < R; r++) {
      // One pass over the row for both sums: chunks as in reduce_row.
      double sum_g = 0, sum_gx = 0;
      for (int64_t begin = 0; begin < n; begin += kChunk) {
        vec_t<A> g0{}, g1{}, x0{}, x1{};
        int64_t end = std::min(n, begin + kChunk), i = begin;
        constexpr int W = vec<A>::W;
        auto step = [&](int64_t j, int k, vec_t<A>& sg, vec_t<A>& sx) {
          vec_t<A> g = load_n(dout[r] + j, k);
          if (weight) g *= load_n(weight + j, k);
          sg += g;
          sx += g * (load_n(x[r] + j, k) - mean[r]);
        };
        for (; i + 2 * W <= end; i += 2 * W) step(i, W, g0, x0), step(i + W, W, g1, x1);
        for (; i < end; i += W) step(i, int(std::min<int64_t>(W, end - i)), g0, x0);
        sum_g += double(hsum(g0 + g1));
        sum_gx += double(hsum(x0 + x1));
      }
      mean_g[r] = A(sum_g / double(n));
      mean_gx[r] = A(sum_gx * double(rstd[r]) / double(n));
    }
  for_row<A>(n, [&](int64_t i, int k) FF_LAMBDA {
    vec_t<A> w = weight ? load_n(weight + i, k) : splat<A>(1);
    vec_t<A> dw = dweight ? load_n(dweight + i, k) : vec_t<A>{}, db = dbias ? load_n(dbias + i, k) : vec_t<A>{};
    for (int r = 0; r < R; r++) {
      vec_t<A> dy = load_n(dout[r] + i, k), xhat = (load_n(x[r] + i, k) - mean[r]) * rstd[r];
      dw += dy * xhat;
      db += dy;
      if (need_dx) finish(r, i, rstd[r] * (dy * w - mean_g[r] - xhat * mean_gx[r]), k);
    }
    if (dweight) store_n(dweight + i, dw, k);
    if (dbias) store_n(dbias + i, db, k);
  });
}

// Where a backward pass keeps each thread's running dweight and dbias: (threads, 2, cols) acc.
inline size_t backward_workspace(int64_t rows, int64_t cols, size_t acc_bytes) {
  return size_t(num_threads(rows * cols)) * 2 * size_t(cols) * acc_bytes;
}

// Adds up the threads' partial sums, in thread order, into dweight and dbias.
template <class A, class P>
void reduce_partials(const A* partial, int threads, int64_t cols, P* dweight, P* dbias) {
  parallel_for(cols, 2 * threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; c++) {
      A dw = 0, db = 0;
      for (int t = 0; t < threads; t++) dw += partial[(2 * t) * cols + c], db += partial[(2 * t + 1) * cols + c];
      if (dweight) dweight[c] = from_float<P>(acc_t<P>(dw));
      if (dbias) dbias[c] = from_float<P>(acc_t<P>(db));
    }
  });
}

}  // namespace FF_ISA
}  // namespace ff
