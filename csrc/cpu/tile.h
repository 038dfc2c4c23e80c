// Small matrix products on packed operands: the arithmetic of CPU attention.
//
// C (M x N) = or += A (M x K) B (K x N), computed in register tiles of kMR rows by kNR columns. B is packed in column
// panels of kNR, each (K, kNR) contiguous, so that the inner loop streams it; A is read one broadcast element at a time,
// from rows (A[i][k]) or, for products with a transposed left side, from columns (A[k][i]) of a row-major buffer.
// M and N are rounded up to whole tiles: the buffers have room for that, and the extra rows and columns mean nothing.
// K is exact, or rounded up to whole steps of kKR.
#pragma once
#include "cpu.h"

#ifndef FF_BF16_DOT
#define FF_BF16_DOT 0
#endif

namespace ff {
namespace FF_ISA {

// What type of operands a product of T takes: bfloat16 has products of its own in the instruction sets of tile_bf16.h.
template <class T> struct operand { using type = acc_t<T>; };
template <class T> using operand_t = typename operand<T>::type;

// Tile shape: as many accumulators as the register file holds beside two panel vectors and a broadcast. K advances in steps
// of kKR: operands have room for whole steps, and are zero beyond K.
template <class E> struct tile_shape {
  static constexpr int kMR = FF_VEC_BYTES == 64 ? 12 : 6;
  static constexpr int kNV = 2;
  static constexpr int kNR = kNV * vec<E>::W;
  static constexpr int kKR = 1;
};

template <class A, int MR, bool AColumns>
FF_INLINE void tile(int64_t K, const A* a, int64_t lda, const A* b, A* c, int64_t ldc, bool accumulate,
                    int64_t ldb = tile_shape<A>::kNR) {
  constexpr int NV = tile_shape<A>::kNV, W = vec<A>::W;
  vec_t<A> acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[i][v] = accumulate ? load(c + i * ldc + v * W) : vec_t<A>{};
  for (int64_t k = 0; k < K; k++) {
    vec_t<A> bv[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) bv[v] = load(b + k * ldb + v * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++) {
      A s = AColumns ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[i][v] += s * bv[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(c + i * ldc + v * W, acc[i][v]);
}

// One tile of kMR by kNR of a product of operands of type E, and what a thread has to hold while it computes any.
template <class E> struct Product {
  struct Session {};
  template <bool AColumns>
  static FF_INLINE void strip(int64_t K, const E* a, int64_t lda, const E* b, E* c, int64_t ldc, bool accumulate) {
    tile<E, tile_shape<E>::kMR, AColumns>(K, a, lda, b, c, ldc, accumulate);
  }
};

// What a strip of kMR rows of C needs of a product: its first `columns`, and the terms k in [first, last). The rest is
// known to be zero, or is not read.
struct Extent {
  int64_t columns, first, last;
};

// C (M x N) (+)= A B, panels outermost so that each stays in L1 while every row strip passes it. `panel_stride` is the
// distance between B's panels; strips[i] belongs to the rows from i kMR on. What a strip does not need is not written.
template <class E, bool AColumns>
FF_INLINE void matmul(int64_t M, int64_t N, const Extent* strips, const E* a, int64_t lda, const E* b,
                      int64_t panel_stride, acc_t<E>* c, int64_t ldc, bool accumulate) {
  constexpr int MR = tile_shape<E>::kMR, NR = tile_shape<E>::kNR, KR = tile_shape<E>::kKR;
  for (int64_t n = 0; n < N; n += NR)
    for (int64_t m = 0; m < M; m += MR) {
      const Extent need = strips[m / MR];
      if (n >= need.columns || need.first >= need.last) continue;
      const int64_t first = need.first / KR * KR, last = round_up(need.last, KR);
      Product<E>::template strip<AColumns>(last - first, a + (AColumns ? m + first * lda : m * lda + first), lda,
                                           b + n / NR * panel_stride + first * NR, c + m * ldc + n, ldc, accumulate);
    }
}

// ---- packing: storage type -> acc, any row stride --------------------------------------------------------------------

// One row of n elements times `scale`.
template <class T> FF_INLINE void copy_row(const T* from, acc_t<T>* to, int64_t n, acc_t<T> scale) {
  constexpr int W = vec<acc_t<T>>::W;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i) * scale);
  for (; i < n; i++) to[i] = to_float(from[i]) * scale;
}

// (rows, cols) -> row-major with leading dimension `ld`.
template <class T>
void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t cols, acc_t<T>* to, int64_t ld, acc_t<T> scale) {
  for (int64_t r = 0; r < rows; r++) copy_row(from + r * stride, to + r * ld, cols, scale);
}

// (rows, cols) -> column panels [cols / NR][rows][NR], columns beyond `cols` zero: B of a product over rows.
template <class T>
void pack_panels(const T* from, int64_t stride, int64_t rows, int64_t cols, acc_t<T>* to, int64_t rows_capacity,
                 acc_t<T> scale) {
  using A = acc_t<T>;
  constexpr int NR = tile_shape<A>::kNR;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < cols; c += NR) {
      A* panel = to + c / NR * rows_capacity * NR + r * NR;
      int64_t n = std::min<int64_t>(NR, cols - c);
      copy_row(from + r * stride + c, panel, n, scale);
      for (int64_t i = n; i < NR; i++) panel[i] = 0;
    }
}

// Transposes W vectors of W lanes by swapping ever larger off-diagonal blocks: log2(W) steps of W shuffles.
template <class A> FF_INLINE void transpose(vec_t<A>* r) {
  constexpr int W = vec<A>::W;
  using index_t = typename std::conditional<sizeof(A) == 8, i64v, i32v>::type;
#pragma GCC unroll 4
  for (int s = 1; s < W; s *= 2) {
    index_t low, high;  // lanes of (a, b), b's from W on
#pragma GCC unroll 16
    for (int l = 0; l < W; l++) low[l] = l & s ? W + l - s : l, high[l] = l & s ? W + l : l + s;
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & s)) {
        const vec_t<A> a = r[i], b = r[i + s];
        r[i] = __builtin_shuffle(a, b, low), r[i + s] = __builtin_shuffle(a, b, high);
      }
  }
}

// (rows, cols) -> panels of its transpose [rows / NR][cols][NR], rows beyond `rows` zero: B of a product over columns.
template <class T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t cols, acc_t<T>* to) {
  using A = acc_t<T>;
  constexpr int NR = tile_shape<A>::kNR, W = vec<A>::W;
  for (int64_t r = 0; r < rows; r += NR) {
    A* panel = to + r * cols;
    int64_t n = std::min<int64_t>(NR, rows - r), whole = 0;
    for (; n == NR && whole + W <= cols; whole += W)
      for (int64_t j = 0; j < NR; j += W) {
        vec_t<A> block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) block[i] = load(from + (r + j + i) * stride + whole);
        transpose<A>(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(panel + (whole + i) * NR + j, block[i]);
      }
    for (int64_t j = 0; j < n; j++) {
      const T* row = from + (r + j) * stride;
      for (int64_t c = whole; c < cols; c++) panel[c * NR + j] = to_float(row[c]);
    }
    if (n < NR)
      for (int64_t c = 0; c < cols; c++)
        for (int64_t j = n; j < NR; j++) panel[c * NR + j] = 0;
  }
}

}  // namespace FF_ISA
}  // namespace ff

#if FF_BF16_DOT
#include "tile_bf16.h"
#endif
