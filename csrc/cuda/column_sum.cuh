// Second stage of gradients that are summed over rows: the first leaves one float32 row of sums per block, and this
// adds those in a fixed order, which makes the result the same in every run.
#pragma once
#include "row.cuh"

namespace ff {

// A block has 32 columns of the sums that grid.y names.
constexpr int kSumRows = 16;
template <class P>
__global__ void __launch_bounds__(32 * kSumRows)
    sum_partial_gradients(const float* partial, int blocks, int64_t cols, P* first, P* second) {
  FF_SHARED(float, sums, [kSumRows][32]);
  P* out = blockIdx.y == 0 ? first : second;
  const int64_t col = int64_t(blockIdx.x) * 32 + threadIdx.x;
  float sum = 0;
  if (out && col < cols) {
    const float* p = partial + int64_t(blockIdx.y) * blocks * cols + col;
    for (int b = threadIdx.y; b < blocks; b += kSumRows) sum += p[b * cols];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && out && col < cols) {
    for (int y = 1; y < kSumRows; y++) sum += sums[y][threadIdx.x];
    out[col] = from_float<P>(sum);
  }
}

// first, second (cols) or null: the sums over the blocks of partial (2, blocks, cols), of which second's half is not
// looked at where it is null.
template <class P>
int launch_column_sum(const char* name, const float* partial, int64_t blocks, int64_t cols, P* first, P* second,
                      void* stream) {
  return launch(name, sum_partial_gradients<P>, dim3(unsigned((cols + 31) / 32), second ? 2 : 1), dim3(32, kSumRows), 0,
                stream, partial, int(blocks), cols, first, second);
}

}  // namespace ff
