// What the kernels that work on rows share: loops over a row and the split over threads.
//
// Stores are ordinary ones: streaming past the cache was measured and is slower (gelu 8192 x 1024, float: 1.6 against
// 0.9 ns an element; equal on freshly faulted memory), because a line half written waits for the next vector.
//
// Partial sums of 2048 elements are added up in double, so rows of any length keep float accuracy.
#pragma once
#include <type_traits>
#include <vector>

#include "cpu.h"

namespace ff {
namespace FF_ISA {

constexpr int64_t kChunk = 2048;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Sum over i < n of f(vector starting at i, lane count), in a fixed order.
template <class A, class F> FF_INLINE double reduce_row(int64_t n, F f) {
  constexpr int W = vec<A>::W;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    int64_t end = std::min(n, begin + kChunk), i = begin;
    vec_t<A> s0{}, s1{}, s2{}, s3{};
    for (; i + 4 * W <= end; i += 4 * W) {
      s0 += f(i, W);
      s1 += f(i + W, W);
      s2 += f(i + 2 * W, W);
      s3 += f(i + 3 * W, W);
    }
    for (; i + W <= end; i += W) s0 += f(i, W);
    if (i < end) s1 += f(i, int(end - i));
    total += double(hsum((s0 + s1) + (s2 + s3)));
  }
  return total;
}

// The same, of whole pairs by pair(i) and of what is left by f(i, lane count).
template <class A, class P, class F> FF_INLINE double reduce_row(int64_t n, P pair, F f) {
  constexpr int W = vec<A>::W;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    int64_t end = std::min(n, begin + kChunk), i = begin;
    Pair<A> s0{}, s1{};
    for (; i + 4 * W <= end; i += 4 * W) s0 += pair(i), s1 += pair(i + 2 * W);
    for (; i + W <= end; i += W) s0.first += f(i, W);
    if (i < end) s1.first += f(i, int(end - i));
    s0 += s1;
    total += double(hsum(s0.first + s0.second));
  }
  return total;
}

// Calls f(i, W) for whole vectors and f(i, rest) for the tail.
template <class A, class F> FF_INLINE void for_row(int64_t n, F f) {
  constexpr int W = vec<A>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, int(n - i));
}

// The same, with pair(i) for whole pairs first.
template <class A, class P, class F> FF_INLINE void for_row(int64_t n, P pair, F f) {
  constexpr int W = vec<A>::W;
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) pair(i);
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, int(n - i));
}

template <class T> FF_INLINE vec_t<acc_t<T>> load_n(const T* p, int n) {
  return n == vec<acc_t<T>>::W ? load(p) : load_partial(p, n);
}
template <class T> FF_INLINE void store_n(T* p, vec_t<acc_t<T>> v, int n) {
  if (n == vec<acc_t<T>>::W) store(p, v);
  else store_partial(p, v, n);
}
// A pair is whole.
template <class T> FF_INLINE Pair<acc_t<T>> load_n(const T* p) { return load_pair(p); }
template <class T> FF_INLINE void store_n(T* p, Pair<acc_t<T>> v) { store_pair(p, v); }

// A parameter's first n / 2 W * 2 W elements in acc, in the order of T's pairs: `p` itself if it is that, else `buffer`,
// filled. NULL stays NULL.
template <class T, class P> FF_INLINE const acc_t<T>* arranged(const P* p, int64_t n, acc_t<T>* buffer) {
  using A = acc_t<T>;
  constexpr int W = vec<A>::W;
  if constexpr (kInOrder<T> && std::is_same<P, A>::value) return p;
  else {
    if (!p) return nullptr;
    for (int64_t i = 0; i + 2 * W <= n; i += 2 * W) {
      if constexpr (std::is_same<P, T>::value) {
        Pair<A> v = load_pair(p + i);
        store(buffer + i, v.first), store(buffer + i + W, v.second);
      } else {  // float32 beside bfloat16 or float16
        for (int j = 0; j < 2 * W; j++) {
          const float value = p[i + j];
          buffer[i + (kInOrder<T> ? j : j % 2 * W + j / 2)] = value == value ? value : kNaN;  // as store_pair needs it
        }
      }
    }
    return buffer;
  }
}
// Where element c of a row of n lies in such an array.
template <class T> FF_INLINE int64_t arranged_at(int64_t c, int64_t n) {
  constexpr int64_t W = vec<acc_t<T>>::W;
  if (kInOrder<T> || c >= n / (2 * W) * (2 * W)) return c;
  return c / (2 * W) * (2 * W) + c % 2 * W + c % (2 * W) / 2;
}

// A thread's scratch, at least `count` floats; grows once and is kept.
template <class A> inline A* thread_buffer(int64_t count) {
  static thread_local std::vector<A> buffer;
  if (int64_t(buffer.size()) < count) buffer.resize(size_t(count));
  return buffer.data();
}

// Calls f with std::true_type or std::false_type, so that a kernel's options cost nothing inside its loops.
template <class F> inline void for_bool(bool value, F f) {
  if (value) f(std::true_type{});
  else f(std::false_type{});
}

// Runs f(row_begin, row_end, col_begin, col_end, thread) over the threads: parts of the rows, or, of few long rows, parts
// of the columns. For element-wise work; which thread has what depends on the shape and the thread count only.
template <class F> void parallel_blocks(int64_t rows, int64_t cols, F f) {
  const int64_t threads = num_threads(rows * cols), group = 64, groups = (cols + group - 1) / group;
  if (rows >= 8 * threads || groups < 8 * threads)
    parallel_for(rows, cols, [&](int64_t begin, int64_t end, int t) { f(begin, end, int64_t(0), cols, t); });
  else
    parallel_for(groups, rows * cols / groups, [&](int64_t begin, int64_t end, int t) {
      f(int64_t(0), rows, begin * group, std::min(end * group, cols), t);
    });
}

}  // namespace FF_ISA
}  // namespace ff
