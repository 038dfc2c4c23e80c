// The gradient of an embedding's table: each of its rows is written once, by the warp that owns it, with the sum over
// the output's rows that took it.
//
// The indices are sorted (sort.cuh), so a row's takers are one run of them. Most runs are short; those that are not (a
// common word, one of two segments) are summed in parts: a first kernel adds up every aligned group of kGroup takers
// that lies within one run, and the owner adds the groups' float32 sums to the few takers beside them. Which terms form
// a group hangs on nothing but the indices: no atomics, and results repeat bit for bit.
// Floor: dout read once, the gradient written once.
#pragma once
#include "row.cuh"

namespace ff {

constexpr int kGroup = 32, kOwners = 8;  // takers of a group; warps of a block

// Terms of all sums in a row, fewer than 2^31: term t is taker t / repeats, the t % repeats-th row of dout that used
// its index.
template <class T> struct TableGradient {
  const T* dout;          // (period * repeats, cols), rows dout_stride apart
  int64_t dout_stride, cols;
  int64_t rows;           // of the table
  int64_t period, repeats;
  int64_t offset;         // without keys: index i names row offset + i
  int64_t padding_idx;
  const uint32_t* keys;   // (period) sorted, or null
  const uint32_t* order;  // (period), with keys
  const uint32_t* start;  // (rows + 1), with keys
  float scale;
  float* groups;          // (period * repeats / kGroup, cols): sums of the groups within a run; null if there are none
  T* dweight;             // (rows, cols)

  FF_DEVICE int64_t first_term(int64_t v) const {
    if (keys) return start[v] * repeats;
    const int64_t i = v - offset;
    return (i < 0 ? 0 : i < period ? i : period) * repeats;
  }
  FF_DEVICE int64_t row_named(int64_t taker) const { return keys ? int64_t(keys[taker]) : offset + taker; }
  FF_DEVICE int64_t taker_of(int64_t t) const { return uint32_t(t) / uint32_t(repeats); }
  FF_DEVICE const T* term(int64_t t) const {
    const int64_t taker = taker_of(t), again = t - taker * repeats;
    return dout + ((order ? int64_t(order[taker]) : taker) + again * period) * dout_stride;
  }
};

// sum += terms begin .. end - 1, E columns from `col` on; a few loads in flight.
template <class T, int E>
FF_DEVICE void add_terms(float (&sum)[E], const TableGradient<T>& a, int64_t begin, int64_t end, int64_t col) {
  constexpr int kAhead = 4;
  int64_t t = begin;
  for (; t + kAhead <= end; t += kAhead) {
    Pack<T, E> packs[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; k++) packs[k] = load_streaming<T, E>(a.term(t + k) + col);
#pragma unroll
    for (int k = 0; k < kAhead; k++) {
#pragma unroll
      for (int e = 0; e < E; e++) sum[e] += packs[k][e];
    }
  }
  for (; t < end; t++) {
    const Pack<T, E> pack = load_streaming<T, E>(a.term(t) + col);
#pragma unroll
    for (int e = 0; e < E; e++) sum[e] += pack[e];
  }
}

// A warp per group and 32 * E columns.
template <class T, int E>
__global__ void __launch_bounds__(32 * kOwners) sum_groups(const TableGradient<T> a) {
  const int64_t group = int64_t(blockIdx.x) * kOwners + threadIdx.y, begin = group * kGroup, end = begin + kGroup;
  const int64_t col = (int64_t(blockIdx.y) * 32 + threadIdx.x) * E;
  if (end > a.period * a.repeats || col >= a.cols) return;
  const int64_t v = a.row_named(a.taker_of(begin));
  if (v != a.row_named(a.taker_of(end - 1)) || v < 0 || v >= a.rows || v == a.padding_idx) return;
  float sum[E] = {};
  add_terms<T, E>(sum, a, begin, end, col);
  store_floats<E>(a.groups + group * a.cols + col, sum);
}

// A warp per row of the table; where the table has few rows, per row and some of the columns.
template <class T, int E>
__global__ void __launch_bounds__(32 * kOwners) sum_takers(const TableGradient<T> a) {
  const int64_t v = int64_t(blockIdx.x) * kOwners + threadIdx.y;
  if (v >= a.rows) return;
  int64_t begin = a.first_term(v), end = a.first_term(v + 1);
  if (v == a.padding_idx) end = begin;
  const int64_t first = (begin + kGroup - 1) / kGroup, last = end / kGroup;
  const bool grouped = a.groups && first < last;
  const int64_t step = int64_t(gridDim.y) * 32 * E;
  for (int64_t col = (int64_t(blockIdx.y) * 32 + threadIdx.x) * E; col < a.cols; col += step) {
    float sum[E] = {};
    add_terms<T, E>(sum, a, begin, grouped ? first * kGroup : end, col);
    if (grouped) {
#pragma unroll 4
      for (int64_t g = first; g < last; g++) {
        const Pack<float, E> part = load_cached<float, E>(a.groups + g * a.cols + col);
#pragma unroll
        for (int e = 0; e < E; e++) sum[e] += part[e];
      }
      add_terms<T, E>(sum, a, last * kGroup, end, col);
    }
#pragma unroll
    for (int e = 0; e < E; e++) sum[e] *= a.scale;
    store_streaming(a.dweight + v * a.cols + col, make_pack<T, E>(sum));
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------
inline int64_t group_count(int64_t terms) { return terms / kGroup; }

template <class T, int E> int launch_table_gradient(const char* name, const TableGradient<T>& a, void* stream) {
  const int64_t slices = (a.cols + 32 * E - 1) / (32 * E);
  if (a.groups) {
    const int64_t blocks = (group_count(a.period * a.repeats) + kOwners - 1) / kOwners;
    if (int status = launch(name, sum_groups<T, E>, dim3(unsigned(blocks), unsigned(slices)), dim3(32, kOwners), 0,
                            stream, a))
      return status;
  }
  const int64_t blocks = (a.rows + kOwners - 1) / kOwners;
  const bool many = blocks >= 4 * multiprocessors();  // then a warp reads its row's takers once for all columns
  return launch(name, sum_takers<T, E>, dim3(unsigned(blocks), many ? 1 : unsigned(slices)), dim3(32, kOwners), 0,
                stream, a);
}

}  // namespace ff
