// Pieces of the sm_80 attention kernels: swizzled tiles in shared memory, products of tiles, tiles back to memory.
//
// A tile is rows of D 16-bit elements, zero-filled beyond the tensor's last row and column. The 16-byte pieces of a row
// are permuted so that the 8 rows ldmatrix reads at once lie in different banks. A warp owns 16 * M rows of the left
// operand; products stay in registers, and become the left operand of the next product there (FlashAttention-2, Dao
// 2023, arXiv:2307.08691, section 3.3): no score ever reaches shared memory.
#pragma once
#include "attention.cuh"
#include "sm80.h"

namespace ff {

constexpr int kSharedLimit = 99 << 10;  // of a block on sm_86 and sm_89, the least among the GPUs in question

// The element where piece `piece` of row `row` begins.
template <int D> FF_DEVICE int swizzled(int row, int piece) {
  static_assert(D % 64 == 0 || D == 96, "rows of whole 128-byte lines, or one and a half");
  return row * D + (piece ^ (D % 64 == 0 ? row % 8 : row / 2 % 4)) * 8;
}

// Starts copying rows first .. first + Rows - 1 of a matrix with `end` rows and `cols` columns; zeros for the others.
// Neighbouring threads take a line of a row, so that a thread's addresses, swizzled ones too, differ by constants and
// multiples of the stride: one pointer per tile in registers instead of one per piece.
template <int Rows, int D, int Threads, class T>
FF_DEVICE void load_tile(T* tile, const T* matrix, int64_t stride, int first, int end, int cols) {
  constexpr int kAcross = D % 64 == 0 ? 8 : 4, kDown = Threads / kAcross;
  const int row = int(threadIdx.x) / kAcross, col = int(threadIdx.x) % kAcross * 8;
  T* to = tile + swizzled<D>(row, int(threadIdx.x) % kAcross);
  const T* from = matrix + (first + row) * stride + col;
#pragma unroll
  for (int r = 0; r < Rows; r += kDown) {
    if (Rows % kDown && r + row >= Rows) break;
#pragma unroll
    for (int c = 0; c < D; c += kAcross * 8)
      cp_async16(to + r * D + c, from + r * stride + c, first + r + row < end && c + col < cols);
  }
}

// Where a warp takes 16 * M rows of a left operand from, 16 columns (one `step`) at a time.
// All addresses of a product in flight at once would not leave enough registers for the sums; 4 steps are a line.
template <class T, int D, int M, int Unroll = (D > 64 ? 4 : D / 16)> struct SharedRows {
  static constexpr int kUnroll = Unroll;
  const T* tile = nullptr;
  int row = 0;
  FF_DEVICE void fragment(int step, uint32_t (&a)[M][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < M; m++)
      ldmatrix_x4<false>(a[m], tile + swizzled<D>(row + m * 16 + lane % 16, step * 2 + lane / 16));
  }
};
template <class T, int D> struct RegisterRows {
  static constexpr int kUnroll = D / 16;
  uint32_t values[D / 16][4];
  FF_DEVICE void read(const T* tile, int row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < D / 16; step++)
      ldmatrix_x4<false>(values[step], tile + swizzled<D>(row + lane % 16, step * 2 + lane / 16));
  }
  FF_DEVICE void fragment(int step, uint32_t (&a)[1][4]) const {
#pragma unroll
    for (int i = 0; i < 4; i++) a[0][i] = values[step][i];
  }
};

template <int N> FF_DEVICE float (&four(float (&values)[N], int i))[4] {
  return *reinterpret_cast<float(*)[4]>(values + i);
}

// product (16 M x 2 N) = left (16 M x D) right^T, right: a tile of 2 N rows.
template <class T, int D, int M, int N, class Rows>
FF_DEVICE void multiply_transposed(float (&product)[M][N], const Rows& left, const T* right) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int i = 0; i < N; i++) product[m][i] = 0.f;
  }
#pragma unroll Rows::kUnroll
  for (int step = 0; step < D / 16; step++) {
    uint32_t a[M][4];
    left.fragment(step, a);
#pragma unroll
    for (int n = 0; n < N; n += 8) {
      uint32_t b[4];
      // addressed as in multiply_add, which then finds its addresses in the same registers
      ldmatrix_x4<false>(b, right + swizzled<D>(n * 2 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma_m16n8k16<T>(four(product[m], n), a[m], b[0], b[2]);
        mma_m16n8k16<T>(four(product[m], n + 4), a[m], b[1], b[3]);
      }
    }
  }
}

// sum (16 M x D) += left (16 M x 2 N, a product rounded to T) right, right: a tile of 2 N rows.
template <class T, int D, int M, int N>
FF_DEVICE void multiply_add(float (&sum)[M][D / 2], const float (&left)[M][N], const T* right) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < N / 8; step++) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[m][i] = pack_two<T>(left[m][step * 8 + 2 * i], left[m][step * 8 + 2 * i + 1]);
    }
#pragma unroll
    for (int n = 0; n < D / 2; n += 8) {
      uint32_t b[4];
      ldmatrix_x4<true>(b, right + swizzled<D>(step * 16 + lane % 16, n / 4 + lane / 16));
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma_m16n8k16<T>(four(sum[m], n), a[m], b[0], b[1]);
        mma_m16n8k16<T>(four(sum[m], n + 4), a[m], b[2], b[3]);
      }
    }
  }
}

// A warp's 16 M rows, rounded to T, through its rows of a tile in shared memory that no other warp uses: memory is then
// written 16 bytes at a time. `row`: of the tile; it is row first + row of the matrix.
template <class T, int D, int M>
FF_DEVICE void store_rows(const float (&values)[M][D / 2], T* tile, int row, T* matrix, int64_t stride, int first,
                          int end, int cols) {
  constexpr int kPieces = D / 8;
  const int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; m++) {
#pragma unroll
    for (int i = 0; i < D / 2; i += 2) {
      const uint32_t bits = pack_two<T>(values[m][i], values[m][i + 1]);
      const int to = row + m * 16 + lane / 4 + i / 2 % 2 * 8;
      memcpy(tile + swizzled<D>(to, i / 4) + lane % 4 * 2, &bits, 4);
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * M * kPieces; i += 32) {
    const int from = row + i / kPieces, piece = i % kPieces;
    if (first + from < end && piece * 8 < cols)
      *reinterpret_cast<uint4*>(matrix + (first + from) * stride + piece * 8) =
          *reinterpret_cast<const uint4*>(tile + swizzled<D>(from, piece));
  }
}

// Calls f(T{}, integral_constant<int, D>{}) for the dtype and the bucket of the head dimension.
template <class F> int for_tiles(int dtype, int64_t dim, F f) {
  const auto with_dim = [&](auto t) {
    if (dim <= 64) return f(t, std::integral_constant<int, 64>{});
    if (dim <= 96) return f(t, std::integral_constant<int, 96>{});
    if (dim <= 128) return f(t, std::integral_constant<int, 128>{});
    return f(t, std::integral_constant<int, 256>{});
  };
  return dtype == FF_BFLOAT16 ? with_dim(__nv_bfloat16{}) : with_dim(__half{});
}
// The same for attention, with bool_constant<Plain>{}: whether nothing is added to the scores.
template <class F> int for_attention_kernels(const ff_attention_args* a, bool plain, F f) {
  return for_tiles(a->dtype, std::max(a->head_dim, a->head_dim_v), [&](auto t, auto d) {
    return plain ? f(t, d, std::true_type{}) : f(t, d, std::false_type{});
  });
}

}  // namespace ff
