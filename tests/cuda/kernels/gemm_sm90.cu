// C (M, N, float) = A (M, K) B (N, K)^T through TMA, mbarriers and wgmma: a producer warp fills two stages of 64 of K,
// a warpgroup multiplies 64 x 64 tiles. Any sizes with K a multiple of 8: TMA fills what lies outside with zeros.
#include "run.h"
#include "../../../csrc/cuda/sm90.h"

namespace {

constexpr int kTile = 64, kStep = 64, kStages = 2;
using T = __nv_bfloat16;

struct Tiles {
  T a[kStages][kTile * kStep], b[kStages][kTile * kStep];
  uint64_t full[kStages], empty[kStages];
};

// Bug 1: a stage is read without waiting for it. 2: a stage is released before the products that read it are done. 3:
// the accumulators are read without waiting. 4: one arrival too many is expected. 5: half the bytes are announced. 6:
// no fence. 7: the first warp releases the stage for all four. 8: the producer does not wait for a free stage.
template <int bug>
__global__ void __launch_bounds__(160, 1)
    gemm(const __grid_constant__ ff::TensorMap map_a, const __grid_constant__ ff::TensorMap map_b, float* c, int m,
         int n, int k) {
  FF_DYNAMIC_SHARED(Tiles, tiles);
  const int t = threadIdx.x, row0 = blockIdx.y * kTile, col0 = blockIdx.x * kTile, steps = (k + kStep - 1) / kStep;
  if (t == 0) {
    for (int s = 0; s < kStages; s++) {
      ff::mbarrier_init(&tiles->full[s], 1);
      ff::mbarrier_init(&tiles->empty[s], bug == 4 ? 5 : bug == 7 ? 1 : 4);
    }
    ff::fence_async_proxy();
  }
  __syncthreads();
  if (t >= 128) {
    if (t > 128) return;
    for (int i = 0; i < steps; i++) {
      const int s = i % kStages, round = i / kStages;
      if (bug != 8) ff::mbarrier_wait(&tiles->empty[s], round % 2 ^ 1);
      ff::mbarrier_arrive_expect(&tiles->full[s], sizeof tiles->a[s] * (bug == 5 ? 1 : 2));
      ff::tma_load_2d(tiles->a[s], &map_a, &tiles->full[s], i * kStep, row0);
      ff::tma_load_2d(tiles->b[s], &map_b, &tiles->full[s], i * kStep, col0);
    }
    return;
  }
  float sum[32];
#pragma unroll
  for (float& v : sum) v = 0;
  for (int i = 0; i < steps; i++) {
    const int s = i % kStages, round = i / kStages;
    if (bug != 1) ff::mbarrier_wait(&tiles->full[s], round % 2);
    if (bug != 6) ff::wgmma_fence();
#pragma unroll
    for (int kk = 0; kk < kStep; kk += 16)
      ff::wgmma_m64k16<T, 0, 0>(sum, ff::shared_descriptor(tiles->a[s] + kk, 16, 1024),
                                ff::shared_descriptor(tiles->b[s] + kk, 16, 1024), true);
    ff::wgmma_commit();
    if (bug != 2 && bug != 3) ff::wgmma_wait<0>();
    if (bug == 7 ? t == 0 : t % 32 == 0) ff::mbarrier_arrive(&tiles->empty[s]);
    if (bug == 2) ff::wgmma_wait<0>();
  }
  ff::pin(sum);
#pragma unroll
  for (int i = 0; i < 32; i++) {
    const int row = row0 + t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2), col = col0 + 8 * (i / 4) + 2 * (t % 4) + i % 2;
    if (row < m && col < n) c[int64_t(row) * n + col] = sum[i];
  }
  if (bug == 3) ff::wgmma_wait<0>();
}

template <int bug> int run(const void* a, const void* b, float* c, int m, int n, int k) {
  ff::TensorMap map_a, map_b;
  if (int status = ff::make_tensor_map(&map_a, true, a, m, k, k, kTile)) return status;
  if (int status = ff::make_tensor_map(&map_b, true, b, n, k, k, kTile)) return status;
  return ff::launch("gemm_sm90", gemm<bug>, dim3((n + kTile - 1) / kTile, (m + kTile - 1) / kTile), dim3(160),
                    sizeof(Tiles), nullptr, map_a, map_b, c, m, n, k);
}

}  // namespace

extern "C" FF_API int run_gemm_sm90(int bug, const void* a, const void* b, float* c, int m, int n, int k) {
#ifdef FF_EMULATE
  switch (bug) {
    case 1: return run<1>(a, b, c, m, n, k);
    case 2: return run<2>(a, b, c, m, n, k);
    case 3: return run<3>(a, b, c, m, n, k);
    case 4: return run<4>(a, b, c, m, n, k);
    case 5: return run<5>(a, b, c, m, n, k);
    case 6: return run<6>(a, b, c, m, n, k);
    case 7: return run<7>(a, b, c, m, n, k);
    case 8: return run<8>(a, b, c, m, n, k);
  }
#endif
  return run<0>(a, b, c, m, n, k);
}
