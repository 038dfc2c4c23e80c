// Ampere's primitives by name: asynchronous copies to shared memory, matrix fragments from it, tensor-core products.
//
// On a GPU each function is one PTX instruction; with -DFF_EMULATE csrc/emulation/sm80.h does the same on a CPU.
// Layouts of the fragments are PTX's (ISA manual, "Matrix Fragments for mma.m16n8k16"): lane l of a warp holds
//   a[i]: rows l / 4 + 8 * (i % 2), columns 2 * (l % 4) + 8 * (i / 2) and the next
//   b0, b1: column l / 4, rows 2 * (l % 4) and the next, + 8 for b1
//   d[i]: row l / 4 + 8 * (i / 2), column 2 * (l % 4) + i % 2
#pragma once
#include "common.cuh"

#ifdef FF_EMULATE
#include "../emulation/sm80.h"
#else

namespace ff {

FF_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Starts copying 16 bytes; they are there for this thread after commit and wait, for others after a barrier as well.
FF_DEVICE void cp_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same, or zeros if not valid (global is not read then).
FF_DEVICE void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Ends a group of copies, empty ones included.
FF_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups, the latest, are under way.
template <int N> FF_DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. `transposed` delivers
// each matrix's transpose.
template <bool transposed> FF_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  if constexpr (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d (16 x 8, float) += a (16 x 16) b (16 x 8), a and b of T: __nv_bfloat16 or __half.
template <class T> FF_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FF_MMA(type)                                                                                   \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                  \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                  \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) FF_MMA("bf16");
  else FF_MMA("f16");
#undef FF_MMA
}

}  // namespace ff

#endif
