// The CUDA types kernels use, for a compiler that has no CUDA headers: vectors, dim3, half and bfloat16, runtime codes.
//
// Only what csrc/cuda needs is here, with CUDA's names, sizes, alignments and rounding (to nearest even), so that a .cu
// file is the same text for nvcc and for g++.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

// ---- vectors --------------------------------------------------------------------------------------------------------
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- half precision -------------------------------------------------------------------------------------------------
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
struct alignas(4) __half2 { __half x, y; };

namespace ff::emulation {
inline uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
}  // namespace ff::emulation

inline float __bfloat162float(__nv_bfloat16 h) { return ff::emulation::bits_float(uint32_t(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t u = ff::emulation::float_bits(x);
  if (x != x) return {0x7fff};  // CUDA's canonical NaN
  u += 0x7fff + ((u >> 16) & 1);
  return {uint16_t(u >> 16)};
}

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 0x3ff;
  float magnitude;
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  else if (exponent == 0) magnitude = float(fraction) * 0x1p-24f;  // subnormal or zero
  else magnitude = ff::emulation::bits_float(uint32_t(exponent + 112) << 23 | uint32_t(fraction) << 13);
  return h.bits & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = ff::emulation::float_bits(x) >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.f) return {uint16_t(sign | 0x7c00)};  // half way to the number after the largest
  if (magnitude < 0x1p-14f) return {uint16_t(sign | int(nearbyintf(magnitude * 0x1p24f)))};
  uint32_t u = ff::emulation::float_bits(magnitude);
  u += 0xfff + (u >> 13 & 1);
  return {uint16_t(sign | ((u >> 13) - (112 << 10)))};
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

// ---- the runtime's codes --------------------------------------------------------------------------------------------
typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorInvalidClusterSize = 912
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14
};
