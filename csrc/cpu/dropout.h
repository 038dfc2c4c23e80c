// The dropout scales of a row, for the kernels that apply them as they pass over it: recomputed from the seed in a buffer
// of the row's length, never stored.
#pragma once
#include "rows.h"

namespace ff {
namespace FF_ISA {

// A thread's buffer for one row of dropout scales.
inline float* keep_row(int64_t cols) {
  static thread_local std::vector<float> buffer;
  if (int64_t(buffer.size()) < cols + 64) buffer.resize(size_t(cols) + 64);
  return buffer.data();
}

// The dropout scales of a pair of elements from position i, in the order of T's pairs, or of a vector of those from there.
template <class T> FF_INLINE Pair<acc_t<T>> scales(const float* keep, int64_t i) {
  using A = acc_t<T>;
  constexpr int W = vec<A>::W;
  Pair<A> s;
  for (int j = 0; j < W; j++) {
    s.first[j] = A(keep[i + (kInOrder<T> ? j : 2 * j)]);
    s.second[j] = A(keep[i + (kInOrder<T> ? W + j : 2 * j + 1)]);
  }
  return s;
}
template <class T> FF_INLINE vec_t<acc_t<T>> scales(const float* keep, int64_t i, int) {
  vec_t<acc_t<T>> s;
  for (int j = 0; j < vec<acc_t<T>>::W; j++) s[j] = acc_t<T>(keep[i + j]);
  return s;
}

}  // namespace FF_ISA
}  // namespace ff
