// Row functions that softmax.cpp and cross_entropy.cpp share: maximum and sum of exponentials, and rows cut into parts.
#pragma once
#include "rows.h"

namespace ff {
namespace FF_ISA {

template <class A> constexpr A kNegInf = -std::numeric_limits<A>::infinity();

// sum = sum_i exp(x_i - max), over the elements seen so far.
template <class A> struct MaxSum {
  A max = kNegInf<A>;
  double sum = 0;

  // What to subtract: a row of only -inf has no maximum to subtract, and its exponentials are 0 without.
  A shift() const { return max == kNegInf<A> ? A(0) : max; }
  void raise(A m) {
    if (!(m > max)) return;
    if (sum != 0) sum *= std::exp(double(max) - double(m));
    max = m;
  }
  void merge(const MaxSum& other) {
    raise(other.max);
    sum += other.max == max ? other.sum : other.sum * std::exp(double(other.max) - double(max));
  }
};

template <class T> FF_INLINE acc_t<T> row_max(const T* x, int64_t n, acc_t<T> scale) {
  using A = acc_t<T>;
  constexpr int W = vec<A>::W;
  const vec_t<A> lowest = splat(kNegInf<A>);
  vec_t<A> m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    m0 = vmax(load(x + i) * scale, m0);
    m1 = vmax(load(x + i + W) * scale, m1);
    m2 = vmax(load(x + i + 2 * W) * scale, m2);
    m3 = vmax(load(x + i + 3 * W) * scale, m3);
  }
  for (; i + W <= n; i += W) m0 = vmax(load(x + i) * scale, m0);
  if (i < n) m1 = vmax(keep_first(load_partial(x + i, int(n - i)) * scale, int(n - i), kNegInf<A>), m1);
  return hmax(vmax(vmax(m0, m1), vmax(m2, m3)));
}

// The two steps of taking the maximum and the sum of scale * x. A row of one block has its maximum taken first; a longer
// one block by block in the second step, where a block's exponentials still find it in L1. NaN in x makes the sum NaN.
template <class T> FF_INLINE void find_max(const T* x, int64_t n, acc_t<T> scale, MaxSum<acc_t<T>>& m) {
  if (n <= kChunk) m.max = row_max(x, n, scale);
}
template <class T> FF_INLINE void add_exponentials(const T* x, int64_t n, acc_t<T> scale, MaxSum<acc_t<T>>& m) {
  using A = acc_t<T>;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t count = std::min(kChunk, n - begin);
    if (n > kChunk) m.raise(row_max(x + begin, count, scale));
    const A shift = m.shift();
    m.sum += reduce_row<A>(count, [&](int64_t i, int k) FF_LAMBDA {
      vec_t<A> e = vexp_nonpositive(load_n(x + begin + i, k) * scale - shift);
      return k == vec<A>::W ? e : keep_first(e, k, A(0));
    });
  }
}

// Rows short enough are taken this many elements at a time, one step for all of them and then the next: the end of a
// row's maximum or sum is a chain of dependent operations, which then overlaps with the rows beside it.
constexpr int64_t kBatch = 4096, kBatchRows = 16;

// At most this many parts of rows at once, so that their results fit on the stack.
constexpr int64_t kMaxParts = 1024;

inline int64_t parts_per_row(int64_t rows, int64_t cols) {
  const int64_t threads = num_threads(rows * cols);
  if (threads == 1 || rows >= 8 * threads) return 1;
  return std::max<int64_t>(1, std::min({threads, cols / (2 * kChunk), kMaxParts / std::max<int64_t>(rows, 1)}));
}

// Where part p of `parts` begins; p = parts gives the end.
inline int64_t part_begin(int64_t cols, int64_t p, int64_t parts) {
  return p == parts ? cols : cols * p / parts / 64 * 64;
}

// For every row: first(row, begin, end, S&) and second(row, begin, end, S&) over its columns [begin, end), S::merge over
// the parts, and then finish(row, begin, end, S) for the same columns. One part per row unless rows are too few to
// occupy the threads.
template <class S, class First, class Second, class Finish>
void reduce_rows(int64_t rows, int64_t cols, First first, Second second, Finish finish) {
  const int64_t parts = parts_per_row(rows, cols);
  if (parts == 1)
    return parallel_for(rows, cols, [&](int64_t begin, int64_t end, int) {
      const int64_t batch = std::max<int64_t>(1, std::min(kBatchRows, kBatch / cols));
      for (int64_t r = begin; r < end; r += batch) {
        S results[kBatchRows];
        const int64_t count = std::min(batch, end - r);
        for (int64_t j = 0; j < count; j++) first(r + j, int64_t(0), cols, results[j]);
        for (int64_t j = 0; j < count; j++) second(r + j, int64_t(0), cols, results[j]);
        for (int64_t j = 0; j < count; j++) finish(r + j, int64_t(0), cols, results[j]);
      }
    });
  S results[kMaxParts];
  auto for_parts = [&](auto f) {
    parallel_for(rows * parts, cols / parts, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t p = i % parts;
        f(i, i / parts, part_begin(cols, p, parts), part_begin(cols, p + 1, parts));
      }
    });
  };
  for_parts([&](int64_t i, int64_t r, int64_t begin, int64_t end) {
    first(r, begin, end, results[i]);
    second(r, begin, end, results[i]);
  });
  for_parts([&](int64_t, int64_t r, int64_t begin, int64_t end) {
    S total = results[r * parts];
    for (int64_t p = 1; p < parts; p++) total.merge(results[r * parts + p]);
    finish(r, begin, end, total);
  });
}

}  // namespace FF_ISA
}  // namespace ff
