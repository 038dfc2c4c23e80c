// Rows whose exponentials are summed, for softmax and cross_entropy: rows that start anywhere, (max, sum) over them.
//
// A row of, say, 50257 halves starts at a multiple of 16 bytes only now and then: it is read in windows (window.cuh),
// and "virtual" columns count from the first one's start.
// The sum follows the maximum of what a thread has seen, and both are merged over threads, warps and clusters in one
// step (Milakov, Gimelshein 2018, arXiv:1805.02867), so each exponential is computed once.
#pragma once
#include "cluster.cuh"
#include "window.cuh"

namespace ff {

constexpr float kNegInf = -INFINITY;

// Packs that cover a row, wherever it starts.
inline int64_t virtual_columns(int64_t cols, int64_t stride, const void* data, int E, size_t bytes) {
  const bool aligned = aligned16(data) && stride * int64_t(bytes) % 16 == 0;
  return E == 1 || aligned ? cols : cols + E - 1;
}

// The same of data at any alignment, `step` elements apart (1, or 0: one for all columns), through the cache.
template <class T, int E>
FF_DEVICE void load_any(T (&x)[E], const T* row, int64_t step, int64_t col, int64_t cols) {
  constexpr int kBytes = sizeof(T) * E < 16 ? int(sizeof(T)) * E : 16;
  if constexpr (E > 1) {
    if (step == 1 && col >= 0 && col + E <= cols && reinterpret_cast<uintptr_t>(row + col) % kBytes == 0) {
      using Word = typename word<kBytes>::type;
#pragma unroll
      for (int i = 0; i < int(sizeof x) / kBytes; i++) {
        const Word w = __ldg(reinterpret_cast<const Word*>(row + col) + i);
        memcpy(reinterpret_cast<char*>(&x) + i * kBytes, &w, kBytes);
      }
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < E; e++) x[e] = uint64_t(col + e) < uint64_t(cols) ? row[(col + e) * step] : T{};
}
template <class T, int E> FF_DEVICE void store_any(T* row, int64_t col, int64_t cols, const float (&x)[E]) {
#pragma unroll
  for (int e = 0; e < E; e++)
    if (uint64_t(col + e) < uint64_t(cols)) row[col + e] = from_float<T>(x[e]);
}

// ---- maximum and sum ------------------------------------------------------------------------------------------------
// sum = sum_i exp(x_i - max) over what was seen. NaN in x makes the sum NaN.
struct MaxSum {
  float max = kNegInf, sum = 0;
};
// What to subtract: of only -inf there is no maximum to subtract, and the exponentials are 0 without.
FF_DEVICE float shift_of(float max) { return max == kNegInf ? 0.f : max; }
// The sum is at least 1 if there is anything. log1p, because --use_fast_math leaves it its digits near 1.
FF_DEVICE float log_of_sum(float sum) { return sum == 0 ? 0.f : log1pf(sum - 1); }

FF_DEVICE void merge(MaxSum& into, const MaxSum& other) {
  const float max = fmaxf(into.max, other.max), shift = shift_of(max);
  into.sum = into.sum * __expf(into.max - shift) + other.sum * __expf(other.max - shift);
  into.max = max;
}

// Adds E more numbers to the running result of one thread.
template <int E> FF_DEVICE void add_numbers(MaxSum& m, const float (&x)[E]) {
  float max = m.max;
#pragma unroll
  for (int e = 0; e < E; e++) max = fmaxf(max, x[e]);
  const float shift = shift_of(max);
  float sum = m.sum * __expf(m.max - shift);
#pragma unroll
  for (int e = 0; e < E; e++) sum += __expf(x[e] - shift);
  m.max = max, m.sum = sum;
}

FF_DEVICE MaxSum merge_lanes(MaxSum m, int lanes) {
  float max = m.max;
  for (int other = lanes / 2; other; other /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, other));
  float sum = m.sum * __expf(m.max - shift_of(max));
  for (int other = lanes / 2; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
  return {max, sum};
}

// Merges the results of a row's threads; see RowSum (row.cuh) for the turns.
struct RowMaxSum {
  float (&partial)[2][32][2];
  int turn = 0;
  FF_DEVICE explicit RowMaxSum(float (&shared)[2][32][2]) : partial(shared) {}

  FF_DEVICE MaxSum operator()(MaxSum m) {
    const int threads = blockDim.x;
    m = merge_lanes(m, threads < 32 ? threads : 32);
    if (threads <= 32) return m;
    const int warps = threads / 32, first = threadIdx.y * warps, lane = threadIdx.x % 32;
    if (lane == 0) {
      partial[turn][first + threadIdx.x / 32][0] = m.max;
      partial[turn][first + threadIdx.x / 32][1] = m.sum;
    }
    __syncthreads();
    m = MaxSum{};
    if (lane < warps) m = {partial[turn][first + lane][0], partial[turn][first + lane][1]};
    turn ^= 1;
    return merge_lanes(m, 32);
  }
};

// ---- launching ------------------------------------------------------------------------------------------------------
// Chooses how a's rows of virtual_cols are covered: with `packs` of E columns in each thread of a cluster, or by blocks
// of at most `threads`. run(packs of each thread, in clusters?, blocks of a cluster, grid, block), or beyond() where no
// cluster holds a row.
template <int packs, int threads, int E, class A, class Run, class Beyond>
int launch_rows(A& a, Run run, Beyond beyond) {
  if (const RowPlan* plan = forward_plan((a.virtual_cols + E - 1) / E, threads)) {
    const dim3 block = forward_block(*plan), grid = forward_grid(a.rows, block);
    if (plan->per_thread == 1) return run(std::integral_constant<int, 1>{}, std::false_type{}, 1, grid, block);
    return run(std::integral_constant<int, 4>{}, std::false_type{}, 1, grid, block);
  }
  const int cluster = cluster_for(a.virtual_cols, kClusterThreads * packs * E);
  if (!cluster) return beyond();
  a.slice = cluster_slice(a.virtual_cols, cluster);
  return run(std::integral_constant<int, packs>{}, std::true_type{}, cluster, grid_of_clusters(a.rows, cluster),
             dim3(kClusterThreads));
}

}  // namespace ff
