// Row functions that softmax.cpp and cross_entropy.cpp share: maximum and sum of exponentials, and rows cut into parts.
//
// A row's scores come from a function object z: z(i) is a pair of vectors at column i, z(i, k) a vector of which k
// elements count.
#pragma once
#include "rows.h"

namespace ff {
namespace FF_ISA {

template <class A> constexpr A kNegInf = -std::numeric_limits<A>::infinity();

// scale * x, or x where not Scaled.
template <class T, bool Scaled = false> struct Scores {
  using A = acc_t<T>;
  // Fused with a subtraction the product is not rounded, so that it may exceed the largest rounded one.
  static constexpr bool kMayExceedMax = Scaled;
  const T* x;
  A scale = 1;
  FF_INLINE Pair<A> operator()(int64_t i) const {
    const Pair<A> v = load_pair(x + i);
    return Scaled ? v * scale : v;
  }
  FF_INLINE vec_t<A> operator()(int64_t i, int k) const {
    const vec_t<A> v = load_n(x + i, k);
    return Scaled ? v * scale : v;
  }
};
// Scores that lie in memory, in the order of T's pairs and in whole vectors.
template <class A> struct KeptScores {
  static constexpr bool kMayExceedMax = false;
  const A* x;
  FF_INLINE Pair<A> operator()(int64_t i) const { return load_pair(x + i); }
  FF_INLINE vec_t<A> operator()(int64_t i, int) const { return load(x + i); }
};

// 2 W elements of P, which is T or what T is computed in, in the order of T's pairs.
template <class T, class P> FF_INLINE Pair<acc_t<T>> load_pair_as(const P* p) {
  if constexpr (kInOrder<T> || std::is_same<P, T>::value) return load_pair(p);
  else {
    constexpr int W = kW;
    const f32v low = load(p), high = load(p + W);
    i32v even;
    for (int i = 0; i < W; i++) even[i] = 2 * i;
    return {__builtin_shuffle(low, high, even), __builtin_shuffle(low, high, even + 1)};
  }
}

// hide_unless (vec.h) of a pair in the order of T's.
template <class T> FF_INLINE Pair<acc_t<T>> hide_unless(Pair<acc_t<T>> z, const uint8_t* bytes) {
  using A = acc_t<T>;
  constexpr int W = vec<A>::W;
  if constexpr (kInOrder<T>) return {hide_unless<A>(z.first, bytes, W), hide_unless<A>(z.second, bytes + W, W)};
  else {
    u16v both;
    memcpy(&both, bytes, sizeof both);
    const i32v even = __builtin_convertvector(both & 0xff, i32v), odd = __builtin_convertvector(both >> 8, i32v);
    return {even != 0 ? z.first : splat(kNegInf<A>), odd != 0 ? z.second : splat(kNegInf<A>)};
  }
}

// exp(d) for d <= 0, with the digits T can hold; results below 2^-126 are 0, NaN stays NaN. As 2^(d log2(e)), whose error
// of |d| units in the last place is small beside the row's largest term; bfloat16 and float16 need a polynomial of four
// terms (relative error 3e-6), not seven.
template <class T> FF_INLINE vec_t<acc_t<T>> vexp_score(vec_t<acc_t<T>> d) {
  if constexpr (sizeof(T) == 8) return vexp_nonpositive(d);
  else {
    constexpr float kLog2e = 1.44269504088896341f;
    d = vmax(splat(-88.f), d);
    const f32v t = d * kLog2e + kRound, f = d * kLog2e - (t - kRound);
    if constexpr (sizeof(T) == 4) return exp2_reduced(f) * exponent(t);
    const f32v f2 = f * f;
    return (((f * 9.58285e-3f + 5.590643e-2f) * f2 + (f * 0.24024099f + 0.69312419f)) * f + 1.f) * exponent(t);
  }
}
template <class T> FF_INLINE Pair<acc_t<T>> vexp_score(Pair<acc_t<T>> d) {
  return {vexp_score<T>(d.first), vexp_score<T>(d.second)};
}

// sum = sum_i exp(x_i - max), over the elements seen so far.
template <class A> struct MaxSum {
  A max = kNegInf<A>;
  double sum = 0;

  // What to subtract: a row of only -inf has no maximum to subtract, and its exponentials are 0 without.
  A shift() const { return max == kNegInf<A> ? A(0) : max; }
  double log_sum() const { return sum == 0 ? 0 : std::log(sum); }
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

// The largest of the scores [begin, end); NaN is passed over.
template <class A, class Z> FF_NOINLINE A row_max(Z z, int64_t begin, int64_t end) {
  constexpr int W = vec<A>::W;
  const vec_t<A> lowest = splat(kNegInf<A>);
  vec_t<A> m0 = lowest, m1 = lowest, m2 = lowest, m3 = lowest;
  int64_t i = begin;
  for (; i + 4 * W <= end; i += 4 * W) {
    const Pair<A> a = z(i), b = z(i + 2 * W);
    m0 = vmax(a.first, m0), m1 = vmax(a.second, m1);
    m2 = vmax(b.first, m2), m3 = vmax(b.second, m3);
  }
  if (i + 2 * W <= end) {
    const Pair<A> a = z(i);
    m0 = vmax(a.first, m0), m1 = vmax(a.second, m1);
    i += 2 * W;
  }
  if (i + W <= end) m2 = vmax(z(i, W), m2), i += W;
  if (i < end) m3 = vmax(keep_first(z(i, int(end - i)), int(end - i), kNegInf<A>), m3);
  return hmax(vmax(vmax(m0, m1), vmax(m2, m3)));
}

// The sum of exp(z - shift) over [begin, begin + n), to T's digits; sink(i, exponentials) and sink(i, exponentials, k)
// receive what is summed, i counted from begin.
template <class T, class Z, class Sink>
FF_NOINLINE double exponentials(Z z, int64_t begin, int64_t n, acc_t<T> shift, Sink sink) {
  using A = acc_t<T>;
  return reduce_row<A>(
      n,
      [&](int64_t i) FF_LAMBDA {
        Pair<A> d = z(begin + i) - shift;
        if (Z::kMayExceedMax) d = {vmin(splat(A(0)), d.first), vmin(splat(A(0)), d.second)};
        const Pair<A> e = vexp_score<T>(d);
        sink(i, e);
        return e;
      },
      [&](int64_t i, int k) FF_LAMBDA {
        vec_t<A> d = z(begin + i, k) - shift;
        if (Z::kMayExceedMax) d = vmin(splat(A(0)), d);
        const vec_t<A> e = vexp_score<T>(d);
        sink(i, e, k);
        return k == vec<A>::W ? e : keep_first(e, k, A(0));
      });
}
struct NoSink {
  template <class V> FF_INLINE void operator()(int64_t, V) const {}
  template <class V> FF_INLINE void operator()(int64_t, V, int) const {}
};

// The two steps of taking the maximum and the sum of scores in memory once. A row of one block has its maximum taken
// first; a longer one block by block in the second step, where a block's exponentials still find it in L1. NaN among the
// scores makes the sum NaN.
template <class A, class Z> FF_INLINE void find_max(Z z, int64_t begin, int64_t end, MaxSum<A>& m) {
  if (end - begin <= kChunk) m.max = row_max<A>(z, begin, end);
}
template <class T, class Z> FF_INLINE void add_exponentials(Z z, int64_t begin, int64_t end, MaxSum<acc_t<T>>& m) {
  for (int64_t b = begin; b < end; b += kChunk) {
    const int64_t e = std::min(end, b + kChunk);
    if (end - begin > kChunk) m.raise(row_max<acc_t<T>>(z, b, e));
    m.sum += exponentials<T>(z, b, e - b, m.shift(), NoSink{});
  }
}

// Rows short enough are taken this many elements at a time, one step for all of them and then the next: the end of a
// row's maximum or sum is a chain of dependent operations, which then overlaps with the rows beside it.
constexpr int64_t kBatch = 2048, kBatchRows = 16;
inline int64_t batch_of_rows(int64_t cols) { return std::max<int64_t>(1, std::min(kBatchRows, kBatch / cols)); }

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
      const int64_t batch = batch_of_rows(cols);
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
