// Rows that start anywhere, in 16-byte packs all the same.
//
// The packs start at the last multiple of 16 bytes before the row, so that only its first and last go element by
// element. Tensors read together must be off by the same amount (same_offsets).
#pragma once
#include "row.cuh"

namespace ff {

// Elements between p and the multiple of 16 bytes before it.
template <class T, int E> FF_DEVICE int offset_of(const T* p) {
  return E == 1 ? 0 : int(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// Whether rows of these tensors (address, elements between rows) are off by the same amount, row by row.
struct RowTensor {
  const void* data;
  int64_t stride;
};
inline bool same_offsets(int dtype, std::initializer_list<RowTensor> tensors) {
  const RowTensor* first = nullptr;
  const int64_t bytes = int64_t(dtype_bytes(dtype));
  for (const RowTensor& t : tensors) {
    if (!t.data) continue;
    if (!first) first = &t;
    const int64_t apart = int64_t(reinterpret_cast<uintptr_t>(t.data) - reinterpret_cast<uintptr_t>(first->data));
    if (apart % 16 || (t.stride - first->stride) * bytes % 16) return false;
  }
  return true;
}

// E elements from column `col` on, which may lie before or reach beyond the row: 0 there.
template <class T, int E> FF_DEVICE Pack<T, E> load_window(const T* row, int64_t col, int64_t cols) {
  if (col >= 0 && col + E <= cols) return load_streaming<T, E>(row + col);
  Pack<T, E> pack = zero_pack<T, E>();
#pragma unroll
  for (int e = 0; e < E; e++)
    if (uint64_t(col + e) < uint64_t(cols)) pack.value[e] = row[col + e];
  return pack;
}
template <class T, int E> FF_DEVICE void store_window(T* row, int64_t col, int64_t cols, const float (&x)[E]) {
  const Pack<T, E> pack = make_pack<T, E>(x);
  if (col >= 0 && col + E <= cols) return store_streaming(row + col, pack);
#pragma unroll
  for (int e = 0; e < E; e++)
    if (uint64_t(col + e) < uint64_t(cols)) row[col + e] = pack.value[e];
}

}  // namespace ff
