// Hopper's primitives by name: mbarriers, bulk tensor copies (TMA), warpgroup products (wgmma), named barriers.
//
// On a GPU each function is one PTX instruction (a loop, for waiting); with -DFF_EMULATE csrc/emulation/sm90.h does the
// same on a CPU. Tiles in shared memory have 128-byte rows (64 elements of 16 bits) in the 128-byte swizzle: the
// 16-byte pieces of row r are stored in the order piece ^ (r % 8), which TMA writes and wgmma reads; a tile starts at a
// multiple of 1024 bytes. Needs sm_90a.
#pragma once
#include "common.cuh"

// Kernels that use wgmma exist for sm_90a alone; other architectures of a build get empty ones.
#if defined(FF_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FF_HOPPER 1
#endif

#ifdef FF_EMULATE
#include "../emulation/sm90.h"
#else
#include <cuda.h>

namespace ff {

using TensorMap = CUtensorMap;

FF_DEVICE uint32_t shared_address_of(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// ---- mbarriers ------------------------------------------------------------------------------------------------------
// A phase ends when `count` arrivals and all announced bytes have come; waiting for parity p waits for the end of a
// phase of that parity, the first being 0. So a wait for parity 1 on a fresh barrier returns at once.
FF_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address_of(barrier)), "r"(count) : "memory");
}
FF_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address_of(barrier)) : "memory");
}
// Arrives and announces `bytes` that copies will bring.
FF_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address_of(barrier)), "r"(bytes)
               : "memory");
}
FF_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra out;\nbra again;\nout:\n}" ::"r"(shared_address_of(barrier)),
      "r"(parity)
      : "memory");
}
// Makes this thread's writes to shared memory visible to TMA and wgmma; every writer calls it before the barrier.
FF_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- bulk copies: one thread issues them ----------------------------------------------------------------------------
// The map's box at column x, row y, into shared memory; what lies outside the tensor reads as 0 and counts as bytes.
FF_DEVICE void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address_of(shared)),
      "l"(map), "r"(shared_address_of(barrier)), "r"(x), "r"(y)
      : "memory");
}
// The same of a four-dimensional map, at (w, z) of its outer dimensions.
FF_DEVICE void tma_load_4d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address_of(shared)),
      "l"(map), "r"(shared_address_of(barrier)), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// `bytes`, a multiple of 16, from memory aligned to 16.
FF_DEVICE void bulk_load(void* shared, const void* global, uint64_t* barrier, uint32_t bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address_of(shared)),
               "l"(global), "r"(bytes), "r"(shared_address_of(barrier))
               : "memory");
}
// The other way; what lies outside the tensor is dropped.
FF_DEVICE void tma_store_2d(const TensorMap* map, const void* shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address_of(shared)), "r"(x), "r"(y)
               : "memory");
}
// global[i] += shared[i] over `bytes`, a multiple of 16, in no particular order.
FF_DEVICE void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address_of(shared)), "r"(bytes)
               : "memory");
}
FF_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups have not read their shared memory (wait_read) or are not complete (wait).
template <int N> FF_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N> FF_DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }

// ---- turns: blocks that add to the same memory one after another ----------------------------------------------------
// Waits until *turn is `mine`; bulk operations issued after it come after those its writer had waited for.
FF_DEVICE void wait_for_turn(const int* turn, int mine) {
  int now;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  while (now != mine);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
// Adds 1 to *turn after everything this thread did, bulk operations that it has waited for (bulk_wait) included.
FF_DEVICE void end_turn(int* turn) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
}

// ---- wgmma: four warps together -------------------------------------------------------------------------------------
// Before the first product, and again after writing to registers that the next one uses.
FF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
FF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups are under way; the registers of the others may be touched again.
template <int N> FF_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving uses of accumulators above a wait.
template <int N> FF_DEVICE void pin(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
}

// An operand in shared memory, in the 128-byte swizzle. K in rows of the tile (K-major): `leading` is unused, `stride`
// is from 8 rows of M or N to the next 8 (1024 where they are dense). M or N in the rows: `leading` is from 64 elements
// of them to the next 64, `stride` from 8 elements of K to the next 8. In bytes.
FF_DEVICE uint64_t shared_descriptor(const void* tile, uint32_t leading, uint32_t stride) {
  return uint64_t((shared_address_of(tile) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

#define FF_WGMMA_OUT8(i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FF_WGMMA_OUT32 FF_WGMMA_OUT8(0), FF_WGMMA_OUT8(8), FF_WGMMA_OUT8(16), FF_WGMMA_OUT8(24)
#define FF_WGMMA_OUT48 FF_WGMMA_OUT32, FF_WGMMA_OUT8(32), FF_WGMMA_OUT8(40)
#define FF_WGMMA_OUT64 FF_WGMMA_OUT48, FF_WGMMA_OUT8(48), FF_WGMMA_OUT8(56)
#define FF_WGMMA_OUT128                                                                                        \
  FF_WGMMA_OUT64, FF_WGMMA_OUT8(64), FF_WGMMA_OUT8(72), FF_WGMMA_OUT8(80), FF_WGMMA_OUT8(88), FF_WGMMA_OUT8(96), \
      FF_WGMMA_OUT8(104), FF_WGMMA_OUT8(112), FF_WGMMA_OUT8(120)
#define FF_WGMMA_D32                                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FF_WGMMA_D48 \
  FF_WGMMA_D32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FF_WGMMA_D64 \
  FF_WGMMA_D48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FF_WGMMA_D128                                                                                              \
  FF_WGMMA_D64                                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
  "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "     \
  "%125, %126, %127"
// accumulate, a, b, transpose flags: the operands after d.
#define FF_WGMMA_SHARED(n, type, D, OUT, s, a_, b_, ta, tb)                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" s ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." \
               type "." type " {" D "}, %" a_ ", %" b_ ", p, 1, 1, %" ta ", %" tb ";\n}"                     \
               : OUT                                                                                        \
               : "r"(int(accumulate)), "l"(a), "l"(b), "n"(transpose_a), "n"(transpose_b))
#define FF_WGMMA_REGISTERS(n, type, D, OUT, s, a0, a1, a2, a3, b_, tb)                                      \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" s ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." \
               type "." type " {" D "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b_ ", p, 1, 1, %" tb ";\n}" \
               : OUT                                                                                        \
               : "r"(int(accumulate)), "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(transpose_b))

// d (64 x N, float; N / 2 values in each of 128 threads) = a (64 x 16) b (16 x N), added to d if `accumulate`. N is 64,
// 96, 128 or 256, T __nv_bfloat16 or __half. transpose_*: the operand has M or N in its rows. d[i] of thread t is row
// 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), column 8 * (i / 4) + 2 * (t % 4) + i % 2.
template <class T, int transpose_a, int transpose_b, int half_n>
FF_DEVICE void wgmma_m64k16(float (&d)[half_n], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(half_n == 32 || half_n == 48 || half_n == 64 || half_n == 128, "N is 64, 96, 128 or 256");
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (half_n == 32 && bf16)
    FF_WGMMA_SHARED("64", "bf16", FF_WGMMA_D32, FF_WGMMA_OUT32, "32", "33", "34", "35", "36");
  else if constexpr (half_n == 32)
    FF_WGMMA_SHARED("64", "f16", FF_WGMMA_D32, FF_WGMMA_OUT32, "32", "33", "34", "35", "36");
  else if constexpr (half_n == 48 && bf16)
    FF_WGMMA_SHARED("96", "bf16", FF_WGMMA_D48, FF_WGMMA_OUT48, "48", "49", "50", "51", "52");
  else if constexpr (half_n == 48)
    FF_WGMMA_SHARED("96", "f16", FF_WGMMA_D48, FF_WGMMA_OUT48, "48", "49", "50", "51", "52");
  else if constexpr (half_n == 64 && bf16)
    FF_WGMMA_SHARED("128", "bf16", FF_WGMMA_D64, FF_WGMMA_OUT64, "64", "65", "66", "67", "68");
  else if constexpr (half_n == 64)
    FF_WGMMA_SHARED("128", "f16", FF_WGMMA_D64, FF_WGMMA_OUT64, "64", "65", "66", "67", "68");
  else if constexpr (bf16)
    FF_WGMMA_SHARED("256", "bf16", FF_WGMMA_D128, FF_WGMMA_OUT128, "128", "129", "130", "131", "132");
  else FF_WGMMA_SHARED("256", "f16", FF_WGMMA_D128, FF_WGMMA_OUT128, "128", "129", "130", "131", "132");
}
// The same, N up to 128, with a in registers: each warp's 16 rows as mma_m16n8k16 has them (sm80.h).
template <class T, int transpose_b, int half_n>
FF_DEVICE void wgmma_m64k16(float (&d)[half_n], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(half_n == 32 || half_n == 48 || half_n == 64, "N is 64, 96 or 128");
  constexpr bool bf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (half_n == 32 && bf16)
    FF_WGMMA_REGISTERS("64", "bf16", FF_WGMMA_D32, FF_WGMMA_OUT32, "32", "33", "34", "35", "36", "37", "38");
  else if constexpr (half_n == 32)
    FF_WGMMA_REGISTERS("64", "f16", FF_WGMMA_D32, FF_WGMMA_OUT32, "32", "33", "34", "35", "36", "37", "38");
  else if constexpr (half_n == 48 && bf16)
    FF_WGMMA_REGISTERS("96", "bf16", FF_WGMMA_D48, FF_WGMMA_OUT48, "48", "49", "50", "51", "52", "53", "54");
  else if constexpr (half_n == 48)
    FF_WGMMA_REGISTERS("96", "f16", FF_WGMMA_D48, FF_WGMMA_OUT48, "48", "49", "50", "51", "52", "53", "54");
  else if constexpr (bf16)
    FF_WGMMA_REGISTERS("128", "bf16", FF_WGMMA_D64, FF_WGMMA_OUT64, "64", "65", "66", "67", "68", "69", "70");
  else FF_WGMMA_REGISTERS("128", "f16", FF_WGMMA_D64, FF_WGMMA_OUT64, "64", "65", "66", "67", "68", "69", "70");
}

// ---- warps with different roles -------------------------------------------------------------------------------------
// Barriers 1 to 15; `threads` counts those who sync and those who only arrive.
FF_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
FF_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Moves registers between warpgroups; N is a multiple of 8 from 24 to 256.
template <int N> FF_DEVICE void increase_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> FF_DEVICE void decrease_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- host -----------------------------------------------------------------------------------------------------------
// Describes a tensor of 16-bit elements: sizes from the innermost dimension, whose elements are dense, outwards;
// strides of the others in elements, multiples of 8. Boxes of (box_rows, 64) are copied from the two innermost,
// swizzled. `bf16`: the element type. FF_DEVICE_ERROR where the driver refuses.
template <int rank>
int make_tensor_map(TensorMap* map, bool bf16, const void* data, const int64_t (&sizes)[rank],
                    const int64_t (&strides)[rank - 1], int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static Encode encode = [] {  // from the driver, through the runtime: nothing to link
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<Encode>(function);
  }();
  if (!encode) return fail(FF_DEVICE_ERROR, "the driver has no cuTensorMapEncodeTiled (CUDA 12 or newer is needed)");
  cuuint64_t extents[rank], bytes[rank - 1];
  cuuint32_t box[rank], steps[rank];
  for (int i = 0; i < rank; i++) extents[i] = cuuint64_t(sizes[i]), box[i] = steps[i] = 1;
  for (int i = 0; i + 1 < rank; i++) bytes[i] = cuuint64_t(strides[i]) * 2;
  box[0] = 64, box[1] = cuuint32_t(box_rows);
  const CUresult result =
      encode(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, rank,
             const_cast<void*>(data), extents, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? FF_OK : fail(FF_DEVICE_ERROR, "cuTensorMapEncodeTiled: error %d", int(result));
}

}  // namespace ff

#endif

namespace ff {

// Operands of a product: 16 of K from `k` on. K along the rows (a row is one of M or N), or M or N along the rows. The
// tile is `Rows` high, in panels of 64 columns.
template <int Rows, class T> FF_DEVICE uint64_t k_in_rows(const T* tile, int k) {
  return shared_descriptor(tile + k / 64 * Rows * 64 + k % 64, 16, 1024);
}
template <int Rows, class T> FF_DEVICE uint64_t k_across_rows(const T* tile, int k) {
  return shared_descriptor(tile + k * 64, Rows * 128, 1024);
}

// A (rows, cols) matrix with rows `stride` elements apart.
inline int make_tensor_map(TensorMap* map, bool bf16, const void* data, int64_t rows, int64_t cols, int64_t stride,
                           int box_rows) {
  return make_tensor_map<2>(map, bf16, data, {cols, rows}, {stride}, box_rows);
}

}  // namespace ff
