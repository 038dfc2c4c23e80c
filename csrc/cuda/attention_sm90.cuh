// Pieces of the Hopper attention kernels: tensors as TMA maps, tiles in shared memory, products of tiles by wgmma.
//
// A tile is rows of D 16-bit elements in panels of 64 columns, each panel rows of 128 bytes in the 128-byte swizzle of
// sm90.h; of 96 columns the second panel is half empty. TMA fills it, with zeros beyond the tensor's last position and
// column: head dimensions between the buckets 64, 96, 128 and 256 cost time, no copies. In a packed tensor the rows after a sequence's last are its neighbour's: they
// are overwritten with zeros where a product sums over them, since 0 times NaN is NaN, and else hidden or not stored.
#pragma once
#include "attention.cuh"
#include "sm90.h"

namespace ff {

// A (batch, head, position, dim) tensor; packed: (head, position, dim).
struct Operand {
  TensorMap map;
  int batch_step, head_step;  // 0 where the tensor is broadcast (or packed)
};

inline int make_operand(Operand* o, const ff_attention_args* a, const void* data, const int64_t (&stride)[3],
                        int64_t heads, int64_t positions, int64_t dim, int box_rows) {
  const bool batched = !a->cu_seqlens_q && stride[0] > 0, by_head = stride[1] > 0;
  o->batch_step = batched, o->head_step = by_head;
  const auto or_dense = [&](int64_t stride, int64_t size) { return stride > 0 && size > 1 ? stride : 8; };
  return make_tensor_map<4>(&o->map, a->dtype == FF_BFLOAT16, data,
                            {dim, positions, by_head ? heads : 1, batched ? a->batch : 1},
                            {or_dense(stride[2], positions), or_dense(stride[1], heads), or_dense(stride[0], a->batch)},
                            box_rows);
}
inline int64_t positions_q(const ff_attention_args* a) { return a->cu_seqlens_q ? a->total_q : a->seqlen_q; }
inline int64_t positions_k(const ff_attention_args* a) { return a->cu_seqlens_q ? a->total_k : a->seqlen_k; }

// ---- tiles ----------------------------------------------------------------------------------------------------------
template <int D> constexpr int kPanels = (D + 63) / 64;
template <int D> constexpr int kRowElements = 64 * kPanels<D>;  // of shared memory, for a row

// One thread starts copying `Rows` rows from `row` on; the map's boxes have as many.
template <int Rows, int D, class T>
FF_DEVICE void load_tile(T* tile, const Operand& o, uint64_t* barrier, int batch, int head, int row) {
#pragma unroll
  for (int panel = 0; panel < kPanels<D>; panel++)
    tma_load_4d(tile + panel * Rows * 64, &o.map, barrier, panel * 64, row, head * o.head_step, batch * o.batch_step);
}

// A warp zeroes the rows from `first` on.
template <int Rows, int D, class T> FF_DEVICE void clear_rows(T* tile, int first) {
#pragma unroll 1
  for (int i = max(first, 0) * 8 + int(threadIdx.x % 32); i < Rows * 8; i += 32) {
#pragma unroll
    for (int panel = 0; panel < kPanels<D>; panel++)
      reinterpret_cast<uint4*>(tile + panel * Rows * 64)[i] = make_uint4(0, 0, 0, 0);
  }
}

// The element of panel column `col` (of 64) in row `row`.
FF_DEVICE int swizzled(int row, int col) { return row * 64 + ((col / 8 ^ row % 8) * 8 + col % 8); }

// Keeps the conversion of a product's left operand where it is: left to itself the compiler moves it into the time in
// which the previous product still reads the registers, and has to serialise the two.
FF_DEVICE void pin(uint32_t& word) {
#ifndef FF_EMULATE
  asm volatile("" : "+r"(word)::"memory");
#else
  (void)word;
#endif
}
// A product's fragment (64 x 2 N) as the left operand of the next.
template <class T, int N> FF_DEVICE void as_left_operand(const float (&values)[N], uint32_t (&left)[N / 8][4]) {
#pragma unroll
  for (int step = 0; step < N / 8; step++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      left[step][i] = pack_two<T>(values[step * 8 + 2 * i], values[step * 8 + 2 * i + 1]);
      pin(left[step][i]);
    }
  }
}

// A warpgroup's 64 rows, rounded to T, through a tile that it alone uses (panels of 64 rows) to rows first .. of a
// matrix with `end` rows and `cols` columns. values[c] has columns W c .. W c + W - 1.
template <class T, int Count, int N>
FF_DEVICE void store_tile(const float (&values)[Count][N], T* tile, int barrier, T* matrix, int64_t stride, int first,
                          int end, int cols) {
  constexpr int D = Count * N * 2;
  const int t = threadIdx.x % 128, lane = t % 32, warp_row = t / 32 * 16;
  named_barrier_sync(barrier, 128);  // the products of all four warps have read the tile
#pragma unroll
  for (int c = 0; c < Count; c++) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const uint32_t bits = pack_two<T>(values[c][i], values[c][i + 1]);
      const int row = warp_row + lane / 4 + i / 2 % 2 * 8, col = c * N * 2 + i / 4 * 8 + lane % 4 * 2;
      memcpy(tile + col / 64 * 64 * 64 + swizzled(row, col % 64), &bits, 4);
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < 16 * D / 8; i += 32) {
    const int row = warp_row + i / (D / 8), col = i % (D / 8) * 8;
    if (first + row < end && col < cols)
      *reinterpret_cast<uint4*>(matrix + int64_t(first + row) * stride + col) =
          *reinterpret_cast<const uint4*>(tile + col / 64 * 64 * 64 + swizzled(row, col % 64));
  }
}

// ---- which calls ----------------------------------------------------------------------------------------------------
// The tensor can be read by TMA and written 16 bytes at a time.
inline bool in_whole_vectors(const void* data, const int64_t (&stride)[3], int64_t positions) {
  bool whole = aligned16(data) && (stride[2] > 0 || positions <= 1);
  for (int i = 0; i < 3; i++) whole &= stride[i] % 8 == 0 && stride[i] >= 0 && stride[i] < int64_t(1) << 38;
  return whole;
}

}  // namespace ff
