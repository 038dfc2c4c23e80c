// One warpgroup product in every layout of its operands; TMA stores, bulk reductions and named barriers.
#include "run.h"
#include "../../../csrc/cuda/sm80.h"
#include "../../../csrc/cuda/sm90.h"

namespace {

template <class T, int N> struct ProductTiles {
  T a[64 * 64], b[(N + 63) / 64 * 64 * 64];
  uint64_t ready;
};

// d (64, N) = a b for one K of 64. a is given as (64, 64), or (K, 64) when transpose_a; from_registers: read into
// fragments first. b is given as (N, 64), or (K, N) when transpose_b, in panels of 64 columns.
template <class T, int N, bool from_registers, int transpose_a, int transpose_b>
__global__ void __launch_bounds__(128, 1)
    product(const __grid_constant__ ff::TensorMap map_a, const __grid_constant__ ff::TensorMap map_b, const T* a,
            float* d) {
  constexpr int kPanels = (N + 63) / 64;
  using Tiles = ProductTiles<T, N>;
  FF_DYNAMIC_SHARED(Tiles, tiles);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  if (t == 0) {
    ff::mbarrier_init(&tiles->ready, 1);
    ff::fence_async_proxy();
    ff::mbarrier_arrive_expect(&tiles->ready, (64 + (transpose_b ? kPanels * 64 : N)) * 128);
    ff::tma_load_2d(tiles->a, &map_a, &tiles->ready, 0, 0);
    if (transpose_b)
      for (int panel = 0; panel < kPanels; panel++)
        ff::tma_load_2d(tiles->b + panel * 64 * 64, &map_b, &tiles->ready, panel * 64, 0);
    else ff::tma_load_2d(tiles->b, &map_b, &tiles->ready, 0, 0);
  }
  __syncthreads();
  ff::mbarrier_wait(&tiles->ready, 0);
  float sum[N / 2];
  uint32_t fragments[4][4];
  if (from_registers) {
#pragma unroll
    for (int kk = 0; kk < 4; kk++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = warp * 16 + lane / 4 + 8 * (i % 2), col = kk * 16 + 2 * (lane % 4) + 8 * (i / 2);
        memcpy(&fragments[kk][i], a + row * 64 + col, 4);
      }
    }
  }
  ff::wgmma_fence();
#pragma unroll
  for (int kk = 0; kk < 4; kk++) {
    // 16 of K further on: 32 bytes along a row, or 16 rows down.
    const uint64_t b = transpose_b ? ff::shared_descriptor(tiles->b + kk * 16 * 64, 64 * 128, 1024)
                                   : ff::shared_descriptor(tiles->b + kk * 16, 16, 1024);
    if constexpr (from_registers) {
      ff::wgmma_m64k16<T, transpose_b>(sum, fragments[kk], b, kk > 0);
    } else {
      const uint64_t a_tile = transpose_a ? ff::shared_descriptor(tiles->a + kk * 16 * 64, 16, 1024)
                                          : ff::shared_descriptor(tiles->a + kk * 16, 16, 1024);
      ff::wgmma_m64k16<T, transpose_a, transpose_b>(sum, a_tile, b, kk > 0);
    }
  }
  ff::wgmma_commit();
  ff::wgmma_wait<0>();
  ff::pin(sum);
#pragma unroll
  for (int i = 0; i < N / 2; i++)
    d[(warp * 16 + lane / 4 + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = sum[i];
}

// y (rows, 64) = x, by way of a tile in shared memory; sums[i] += 1 for 64 values. Bug 1: the tile is overwritten while
// it is being stored. Bug 2: the copies are not waited for. Bug 3: two warps hand over without a barrier.
template <int bug>
__global__ void __launch_bounds__(64)
    bulk(const __grid_constant__ ff::TensorMap map_y, const __nv_bfloat16* x, float* sums) {
  struct Tiles {
    __nv_bfloat16 tile[8 * 64];
    float ones[64];
  };
  FF_DYNAMIC_SHARED(Tiles, s);
  const int t = threadIdx.x;
  if (t < 32) {  // the first warp writes, the second stores
    for (int i = t; i < 64; i += 32) {
      const int row = i / 8, piece = i % 8;
      memcpy(&s->tile[row * 64 + (piece ^ row) * 8], x + blockIdx.x * 8 * 64 + row * 64 + piece * 8, 16);
    }
    s->ones[t] = s->ones[t + 32] = 1.f;
    ff::fence_async_proxy();
    if (bug != 3) ff::named_barrier_arrive(1, 64);
    return;
  }
  if (bug != 3) ff::named_barrier_sync(1, 64);
  if (t > 32) return;
  ff::tma_store_2d(&map_y, s->tile, 0, blockIdx.x * 8);
  ff::bulk_reduce_add(sums, s->ones, sizeof s->ones);
  ff::bulk_commit();
  if (bug != 1 && bug != 2) ff::bulk_wait_read<0>();
  s->ones[5] = 7.f;
  if (bug == 1) ff::bulk_wait<0>();
}

template <class T, int N, bool from_registers, int ta, int tb> int run(const void* a, const void* b, float* d) {
  ff::TensorMap map_a, map_b;
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  if (int status = ff::make_tensor_map(&map_a, bf16, a, 64, 64, 64, 64)) return status;
  const int rows = tb ? 64 : N, cols = tb ? N : 64;
  if (int status = ff::make_tensor_map(&map_b, bf16, b, rows, cols, cols, rows)) return status;
  return ff::launch("product", product<T, N, from_registers, ta, tb>, dim3(1), dim3(128), sizeof(ProductTiles<T, N>),
                    nullptr, map_a, map_b, static_cast<const T*>(a), d);
}
template <class T, int N> int run_layout(int layout, const void* a, const void* b, float* d) {
  switch (layout) {
    case 0: return run<T, N, false, 0, 0>(a, b, d);
    case 1: return run<T, N, false, 0, 1>(a, b, d);
    case 2: return run<T, N, false, 1, 0>(a, b, d);
    case 3: return run<T, N, false, 1, 1>(a, b, d);
  }
  if constexpr (N <= 128) return layout == 4 ? run<T, N, true, 0, 0>(a, b, d) : run<T, N, true, 0, 1>(a, b, d);
  return ff::fail(FF_UNSUPPORTED, "layout: of 256 columns, a is in shared memory");
}

}  // namespace

// layout: transpose_b + 2 * transpose_a, + 4 for a in registers (then a is not transposed).
extern "C" FF_API int run_product(int layout, bool bf16, int n, const void* a, const void* b, float* d) {
  if (n == 64)
    return bf16 ? run_layout<__nv_bfloat16, 64>(layout, a, b, d) : run_layout<__half, 64>(layout, a, b, d);
  if (n == 96)
    return bf16 ? run_layout<__nv_bfloat16, 96>(layout, a, b, d) : run_layout<__half, 96>(layout, a, b, d);
  if (n == 128)
    return bf16 ? run_layout<__nv_bfloat16, 128>(layout, a, b, d) : run_layout<__half, 128>(layout, a, b, d);
  return bf16 ? run_layout<__nv_bfloat16, 256>(layout, a, b, d) : run_layout<__half, 256>(layout, a, b, d);
}

extern "C" FF_API int run_bulk(int bug, const void* x, void* y, float* sums, int rows) {
  ff::TensorMap map;
  if (int status = ff::make_tensor_map(&map, true, y, rows, 64, 64, 8)) return status;
  const auto kernel = bug == 1 ? bulk<1> : bug == 2 ? bulk<2> : bug == 3 ? bulk<3> : bulk<0>;
  return ff::launch("bulk", kernel, dim3((rows + 7) / 8), dim3(64), 8 * 128 + 256, nullptr, map,
                    static_cast<const __nv_bfloat16*>(x), sums);
}
