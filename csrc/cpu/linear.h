// Products of a few rows with a large matrix, x (R, K) times W, which is read once and converted as it is: what a linear
// layer is while tokens are generated. Shared by linear and decoder_step.
//
// W lies either way. In rows, (N, K), every result is a dot product of two rows in memory; several of W's rows and up to
// four of x's take part at a time. In columns, (K, N), eight of its rows are added to all results at once. bfloat16 is
// taken in pairs of vectors (vec.h), which have the even elements in one and the odd ones in the other: pack_row puts
// x in this order for the first form, results of the second come in it. A row's results do not depend on how many there
// are beside it: all are added up in the same order.
#pragma once
#include "cpu.h"

namespace ff {
namespace FF_ISA {

constexpr int kPair = 2 * kW;
constexpr int kRowsAtOnce = 4;  // of x

// Calls f(std::integral_constant<int, R>{}, r) for groups of R <= kRowsAtOnce rows from row r on.
template <class F> FF_INLINE void for_row_groups(int64_t rows, F f) {
  int64_t r = 0;
  for (; r + kRowsAtOnce <= rows; r += kRowsAtOnce) f(std::integral_constant<int, kRowsAtOnce>{}, r);
  switch (rows - r) {
    case 3: return f(std::integral_constant<int, 3>{}, r);
    case 2: return f(std::integral_constant<int, 2>{}, r);
    case 1: return f(std::integral_constant<int, 1>{}, r);
  }
}

// n elements as the float32 that a dot product with a row of T takes: whole pairs in load_pair's order, then the rest.
template <class T> void pack_row(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const auto v = load_pair(from + i);
    store(to + i, v.first), store(to + i + kW, v.second);
  }
  for (; i < n; i++) to[i] = to_float(from[i]);
}

// ---- W in rows -------------------------------------------------------------------------------------------------------

// put(r, n, x[r] . w[n]) for R rows of x, packed, and C rows of w. So many short streams at once are more than the
// processor foresees: it is told the rows `ahead` of these.
template <int R, int C, class T, class Put>
FF_INLINE void dot_tile(int64_t K, const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t ahead, Put put) {
  f32v acc[C][R] = {};
  int64_t k = 0;
  for (; k + kPair <= K; k += kPair) {
    f32v xs[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) xs[r][0] = load(x + r * ldx + k), xs[r][1] = load(x + r * ldx + k + kW);
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const auto v = load_pair(w + c * ldw + k);
      __builtin_prefetch(w + (c + ahead) * ldw + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[c][r] += xs[r][0] * v.first, acc[c][r] += xs[r][1] * v.second;
    }
  }
  for (; k < K; k += kW) {
    const int n = int(std::min<int64_t>(kW, K - k));
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      const T* p = w + c * ldw + k;
      const f32v v = n == kW ? load(p) : load_partial(p, n);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const float* q = x + r * ldx + k;
        acc[c][r] += (n == kW ? load(q) : load_partial(q, n)) * v;
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < C; c++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) put(r, c, hsum(acc[c][r]));
}

// put(r, n, x[r] . w[n]) for every row r and n in [begin, end).
template <class T, class Put>
void dot_rows(int64_t rows, int64_t K, const float* x, int64_t ldx, const T* w, int64_t ldw, int64_t begin, int64_t end,
              Put put) {
  constexpr int C = 8;
  int64_t n = begin;
  for (; n + C <= end; n += C)
    for_row_groups(rows, [&](auto count, int64_t r) {
      constexpr int R = decltype(count)::value, S = R == 3 ? 2 : C / R;  // some 8 sums: none waits for the one before
      for (int c = 0; c < C; c += S)
        dot_tile<R, S>(K, x + r * ldx, ldx, w + (n + c) * ldw, ldw, C,
                       [&](int i, int j, float sum) FF_LAMBDA { put(r + i, n + c + j, sum); });
    });
  for (; n < end; n++)
    for_row_groups(rows, [&](auto count, int64_t r) {
      dot_tile<decltype(count)::value, 1>(K, x + r * ldx, ldx, w + n * ldw, ldw, 0,
                                          [&](int i, int, float sum) FF_LAMBDA { put(r + i, n, sum); });
    });
}

// ---- W in columns ----------------------------------------------------------------------------------------------------

// y[r][c] += sum over `depth` <= 8 rows k of x[r][k] w[k][c], for c in [begin, end): whole pairs from begin on have their
// results in load_pair's order.
template <int R, int Depth, class T>
FF_INLINE void add_few(const float* x, int64_t ldx, const T* w, int64_t ldw, float* y, int64_t ldy, int64_t begin,
                       int64_t end) {
  int64_t c = begin;
  for (; c + kPair <= end; c += kPair) {
    f32v sum[R][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sum[r][0] = load(y + r * ldy + c), sum[r][1] = load(y + r * ldy + c + kW);
#pragma GCC unroll 8
    for (int k = 0; k < Depth; k++) {
      const auto v = load_pair(w + k * ldw + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum[r][0] += x[r * ldx + k] * v.first, sum[r][1] += x[r * ldx + k] * v.second;
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) store(y + r * ldy + c, sum[r][0]), store(y + r * ldy + c + kW, sum[r][1]);
  }
  for (int r = 0; r < R; r++)
    for (int64_t i = c; i < end; i++)
      for (int k = 0; k < Depth; k++) y[r * ldy + i] += x[r * ldx + k] * to_float(w[k * ldw + i]);
}

// y[r][c] += x[r] . w[:, c] for every row r and c in [begin, end), results in the order of add_few.
template <class T>
void add_columns(int64_t rows, int64_t K, const float* x, int64_t ldx, const T* w, int64_t ldw, float* y, int64_t ldy,
                 int64_t begin, int64_t end) {
  constexpr int64_t kColumns = 1024;  // of eight rows of W: they stay in L1 for the next group of rows of x
  auto add = [&](auto depth, int64_t k) {
    for (int64_t c = begin; c < end; c += kColumns)
      for_row_groups(rows, [&](auto count, int64_t r) {
        add_few<decltype(count)::value, decltype(depth)::value>(x + r * ldx + k, ldx, w + k * ldw, ldw, y + r * ldy, ldy,
                                                                c, std::min(end, c + kColumns));
      });
  };
  int64_t k = 0;
  for (; k + 8 <= K; k += 8) add(std::integral_constant<int, 8>{}, k);
  for (; k < K; k++) add(std::integral_constant<int, 1>{}, k);
}

}  // namespace FF_ISA
}  // namespace ff
