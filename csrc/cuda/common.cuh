// What every CUDA kernel file shares: the compiler's side (nvcc or the emulator), launching, dtypes.
//
// A kernel uses shared memory through FF_SHARED and FF_DYNAMIC_SHARED and is started by ff::launch: then the same text
// is CUDA for nvcc and, with -DFF_EMULATE, C++ for csrc/emulation.
#pragma once
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "../checks.h"

#ifdef FF_EMULATE
#include "../emulation/cuda_builtins.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FF_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define FF_DYNAMIC_SHARED(type, name)                    \
  extern __shared__ __align__(1024) char ff_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(ff_dynamic_shared)
#endif
#define FF_DEVICE __device__ __forceinline__

namespace ff {

inline bool is_half_precision(int dtype) { return dtype == FF_BFLOAT16 || dtype == FF_FLOAT16; }

// FF_OK if there is a CUDA kernel for data of `dtype` with parameters of `param_dtype`.
inline int check_dtypes(int dtype, int param_dtype) {
  FF_REQUIRE(dtype >= FF_FLOAT32 && dtype <= FF_FLOAT64, "dtype: %d is not an ff_dtype", dtype);
  FF_REQUIRE(param_dtype >= FF_FLOAT32 && param_dtype <= FF_FLOAT64, "param_dtype: %d is not an ff_dtype", param_dtype);
  if (dtype == FF_FLOAT64)
    return fail(FF_UNSUPPORTED, "dtype: float64 has no CUDA kernel; accepted: float32, bfloat16, float16");
  if (param_dtype != dtype && !(is_half_precision(dtype) && param_dtype == FF_FLOAT32))
    return fail(FF_UNSUPPORTED, "param_dtype: %s beside %s data; accepted: the same, or float32 beside half precision",
                dtype_name(param_dtype), dtype_name(dtype));
  return FF_OK;
}

// Calls f(T{}, P{}) with the storage types of data and parameters, which have passed check_dtypes.
template <class F> int for_dtypes(int dtype, int param_dtype, F f) {
  const bool float_params = param_dtype == FF_FLOAT32;
  if (dtype == FF_FLOAT32) return f(float{}, float{});
  if (dtype == FF_BFLOAT16) return float_params ? f(__nv_bfloat16{}, float{}) : f(__nv_bfloat16{}, __nv_bfloat16{});
  return float_params ? f(__half{}, float{}) : f(__half{}, __half{});
}
inline size_t dtype_bytes(int dtype) { return dtype == FF_FLOAT64 ? 8 : dtype == FF_FLOAT32 ? 4 : 2; }

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether a kernel may go through this data 16 bytes at a time: all sizes and strides (in elements of `dtype`) are
// whole vectors, and all pointers are aligned to them.
inline bool whole_vectors(int dtype, std::initializer_list<int64_t> sizes,
                          std::initializer_list<const void*> pointers) {
  for (int64_t n : sizes)
    if (n * int64_t(dtype_bytes(dtype)) % 16) return false;
  for (const void* p : pointers)
    if (!aligned16(p)) return false;
  return true;
}

// FF_OK, or the launch error the CUDA runtime holds, as FF_DEVICE_ERROR.
inline int check_cuda(const char* name) {
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? FF_OK : fail(FF_DEVICE_ERROR, "%s: %s", name, cudaGetErrorString(error));
}

// Enqueues kernel(arguments...) on `stream`. Errors of its execution surface in a later call, as CUDA has it.
template <class... P, class... A>
int launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const A&... arguments) {
  if (shared_bytes > (48 << 10) &&  // more than a kernel may have unasked
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)) != cudaSuccess)
    return check_cuda(name);
#ifdef FF_EMULATE
  (void)stream;
  emulation::launch(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [=] { kernel(arguments...); });
#else
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
#endif
  return check_cuda(name);
}

// Streaming multiprocessors of the current device; 0 if the runtime cannot tell.
inline int multiprocessors() {
#ifdef FF_EMULATE
  return emulation::settings.multiprocessors;
#else
  static int counts[64];  // a repeated first query is harmless
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) return 0;
  if (counts[device] == 0) cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device);
  return counts[device];
#endif
}

}  // namespace ff
