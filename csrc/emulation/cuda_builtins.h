// What a .cu file may use besides plain C++, on the emulator: keywords, built-in variables, warp functions, atomics,
// cache-hinted loads and stores, arithmetic intrinsics, and the few calls of the CUDA runtime that launchers make.
#pragma once
#include <algorithm>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) alignas(n)

#define threadIdx (::ff::emulation::block.thread_index[::ff::emulation::block.current])
#define blockIdx (::ff::emulation::block.index)
#define blockDim (::ff::emulation::block.block_size)
#define gridDim (::ff::emulation::block.grid_size)

// FF_SHARED(float, partial, [2][32]) declares a shared array; FF_DYNAMIC_SHARED(T, name) a T* to the dynamic part.
#define FF_SHARED(type, name, ...)                        \
  static const char name##_key = 0;                       \
  typedef type name##_type __VA_ARGS__;                   \
  name##_type& name = *static_cast<name##_type*>(         \
      ::ff::emulation::shared_variable(&name##_key, sizeof(name##_type), alignof(name##_type)))
#define FF_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::ff::emulation::block.shared)

// ---- barriers and warps ---------------------------------------------------------------------------------------------
inline void __syncthreads() {
  ff::emulation::arrive_and_wait(ff::emulation::named_barrier(0), ff::emulation::block.size, "__syncthreads");
}
inline void __syncwarp(unsigned mask = ~0u) { ff::emulation::warp_barrier(mask, "__syncwarp"); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace ff::emulation {
template <class T> T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  if (!(mask >> source & 1)) fault("shuffle: lane %d reads lane %d, which mask %08x lacks", lane(), source, mask);
  const uint64_t* slots = warp_exchange(mask, bits, "shuffle");
  memcpy(&value, &slots[source], sizeof value);
  return value;
}
}  // namespace ff::emulation

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return ff::emulation::shuffle(mask, value, (ff::emulation::lane() & -width) | (source & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = ff::emulation::lane(), source = lane ^ bits;
  return ff::emulation::shuffle(mask, value, source / width <= lane / width ? source : lane);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ff::emulation::lane(), inside = lane & (width - 1);
  return ff::emulation::shuffle(mask, value, inside + int(delta) < width ? lane + int(delta) : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = ff::emulation::lane(), inside = lane & (width - 1);
  return ff::emulation::shuffle(mask, value, inside >= int(delta) ? lane - int(delta) : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* slots = ff::emulation::warp_exchange(mask, predicate != 0, "__ballot_sync");
  unsigned result = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) result |= unsigned(slots[i]) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

// ---- memory ---------------------------------------------------------------------------------------------------------
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T value) { *p = value; }
template <class T> void __stcg(T* p, T value) { *p = value; }

template <class T> T atomicAdd(T* p, T value) {
  T old = *p;
  *p = old + value;
  return old;
}
template <class T> T atomicMax(T* p, T value) {
  T old = *p;
  if (value > old) *p = value;
  return old;
}
template <class T> T atomicExch(T* p, T value) {
  T old = *p;
  *p = value;
  return old;
}
template <class T> T atomicCAS(T* p, T expected, T value) {
  T old = *p;
  if (old == expected) *p = value;
  return old;
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------
using std::max;
using std::min;
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __float_as_uint(float x) { return ff::emulation::float_bits(x); }
inline float __uint_as_float(unsigned x) { return ff::emulation::bits_float(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }

// ---- runtime --------------------------------------------------------------------------------------------------------
inline cudaError_t cudaGetLastError() { return ff::emulation::take_error(); }
inline const char* cudaGetErrorString(cudaError_t) { return ff::emulation::error_message(); }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = ff::emulation::settings.multiprocessors;
  return cudaSuccess;
}
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  const void* key = reinterpret_cast<const void*>(kernel);
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize
             ? ff::emulation::allow_dynamic_shared(key, size_t(value))
             : ff::emulation::allow_large_clusters(key);
}
