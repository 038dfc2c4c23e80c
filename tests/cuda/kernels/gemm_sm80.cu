// C (M, N, float) = A (M, K) B (K, N) through cp.async, ldmatrix and mma.m16n8k16: 64 x 64 tiles, two stages of 32 of
// K, four warps of 16 rows each. M, N multiples of 64, K of 32; rows padded by 16 bytes against bank conflicts.
#include "run.h"
#include "../../../csrc/cuda/sm80.h"

namespace {

constexpr int kTile = 64, kStep = 32, kPad = 8;

template <class T> struct Tiles {
  T a[2][kTile][kStep + kPad], b[2][kStep][kTile + kPad];
};

// Bug 1: the copies are not waited for. Bug 2: the threads do not wait for each other's copies. Bug 3: a stage is
// refilled while others still read it. Bug 4: the last copies are never waited for.
template <class T, int bug>
__global__ void __launch_bounds__(128) gemm(const T* a, const T* b, float* c, int n, int k) {
  FF_DYNAMIC_SHARED(Tiles<T>, tiles);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  const int64_t row0 = blockIdx.y * kTile, col0 = blockIdx.x * kTile;
  float sum[8][4] = {};

  const auto load = [&](int stage, int k0) {
    for (int i = t; i < kTile * kStep / 8; i += 128) {
      const int row = i / (kStep / 8), col = i % (kStep / 8) * 8;
      ff::cp_async16(&tiles->a[stage][row][col], a + (row0 + row) * k + k0 + col);
    }
    for (int i = t; i < kTile * kStep / 8; i += 128) {
      const int row = i / (kTile / 8), col = i % (kTile / 8) * 8;
      ff::cp_async16(&tiles->b[stage][row][col], b + int64_t(k0 + row) * n + col0 + col);
    }
  };
  load(0, 0);
  ff::cp_async_commit();
  for (int k0 = 0, stage = 0; k0 < k; k0 += kStep, stage ^= 1) {
    if (k0 + kStep < k || bug == 4) load(stage ^ 1, k0 + kStep < k ? k0 + kStep : 0);
    ff::cp_async_commit();
    if (bug == 1) ff::cp_async_wait<2>();
    else ff::cp_async_wait<1>();
    if (bug != 2) __syncthreads();
    for (int kk = 0; kk < kStep; kk += 16) {
      uint32_t af[4];
      ff::ldmatrix_x4<false>(af, &tiles->a[stage][warp * 16 + lane % 16][kk + lane / 16 * 8]);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint32_t bf[4];
        ff::ldmatrix_x4<true>(bf, &tiles->b[stage][kk + lane % 16][j * 16 + lane / 16 * 8]);
        ff::mma_m16n8k16<T>(sum[2 * j], af, bf[0], bf[1]);
        ff::mma_m16n8k16<T>(sum[2 * j + 1], af, bf[2], bf[3]);
      }
    }
    if (bug != 3) __syncthreads();
  }
#pragma unroll
  for (int j = 0; j < 8; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int64_t row = row0 + warp * 16 + lane / 4 + 8 * (i / 2), col = col0 + j * 8 + lane % 4 * 2 + i % 2;
      c[row * n + col] = sum[j][i];
    }
  }
}

template <class T, int bug> int run(const void* a, const void* b, float* c, int m, int n, int k) {
  return ff::launch("gemm_sm80", gemm<T, bug>, dim3(n / kTile, m / kTile), dim3(128), sizeof(Tiles<T>), nullptr,
                    static_cast<const T*>(a), static_cast<const T*>(b), c, n, k);
}

}  // namespace

extern "C" FF_API int run_gemm_sm80(int bug, bool bf16, const void* a, const void* b, float* c, int m, int n, int k) {
#ifdef FF_EMULATE
  if (bug == 1) return run<__nv_bfloat16, 1>(a, b, c, m, n, k);
  if (bug == 2) return run<__nv_bfloat16, 2>(a, b, c, m, n, k);
  if (bug == 3) return run<__nv_bfloat16, 3>(a, b, c, m, n, k);
  if (bug == 4) return run<__nv_bfloat16, 4>(a, b, c, m, n, k);
#endif
  return bf16 ? run<__nv_bfloat16, 0>(a, b, c, m, n, k) : run<__half, 0>(a, b, c, m, n, k);
}
