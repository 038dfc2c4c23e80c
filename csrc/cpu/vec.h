// Short vectors of float or double with loads and stores that convert from the storage type.
//
// Built on the compiler's vector extension, so one source serves every width: each kernel file is compiled once per
// instruction set with its own FF_ISA (a namespace) and FF_VEC_BYTES. The 64-byte build also compiles without AVX-512
// (the compiler splits each operation), which is how its tail handling is tested on machines that lack it. Intrinsics
// appear only where the extension produces poor code: half-precision conversion and 32 x 32 -> 64 bit products.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FF_ISA
#define FF_ISA generic
#endif
#ifndef FF_VEC_BYTES
#define FF_VEC_BYTES 16
#endif
#define FF_INLINE inline __attribute__((always_inline))

namespace ff {
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

namespace FF_ISA {

// The type a kernel computes in for data of type T.
template <class T> struct acc { using type = float; };
template <> struct acc<double> { using type = double; };
template <class T> using acc_t = typename acc<T>::type;

// A is float or double; W lanes.
template <class A> struct vec {
  static constexpr int W = FF_VEC_BYTES / sizeof(A);
  typedef A type __attribute__((vector_size(FF_VEC_BYTES)));
};
template <class A> using vec_t = typename vec<A>::type;
typedef uint32_t u32v __attribute__((vector_size(FF_VEC_BYTES)));
typedef int32_t i32v __attribute__((vector_size(FF_VEC_BYTES)));
typedef int64_t i64v __attribute__((vector_size(FF_VEC_BYTES)));
typedef uint16_t u16v __attribute__((vector_size(FF_VEC_BYTES / 2)));
using f32v = vec_t<float>;
using f64v = vec_t<double>;
constexpr int kW = vec<float>::W;

template <class A> FF_INLINE vec_t<A> splat(A a) { return a - vec_t<A>{}; }

// ---- scalar conversion -----------------------------------------------------------------------------------------------
FF_INLINE float to_float(float x) { return x; }
FF_INLINE double to_float(double x) { return x; }
FF_INLINE float to_float(bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
FF_INLINE float to_float(fp16 x) {
  // Shift the exponent into place and multiply by 2^112, which also normalises subnormals.
  uint32_t u = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  float f;
  memcpy(&f, &u, 4);
  f *= 0x1p112f;
  memcpy(&u, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) u |= 0x7f800000u;
  u |= sign;
  memcpy(&f, &u, 4);
  return f;
}
template <class T> FF_INLINE T from_float(acc_t<T> x);
template <> FF_INLINE float from_float<float>(float x) { return x; }
template <> FF_INLINE double from_float<double>(double x) { return x; }
template <> FF_INLINE bf16 from_float<bf16>(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40)};  // quiet NaN
  return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};                   // round to nearest even
}
template <> FF_INLINE fp16 from_float<fp16>(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  uint16_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
  if (u >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
  if (u < 0x38800000u) {                                   // below 2^-14: subnormal; the float adder does the rounding
    float f;
    memcpy(&f, &u, 4);
    f += 0.5f;  // ulp of [0.5, 1) is 2^-24, the spacing of half subnormals
    memcpy(&u, &f, 4);
    return {uint16_t(sign | (u - 0x3f000000u))};
  }
  return {uint16_t(sign | ((u + 0xfff + ((u >> 13) & 1) - 0x38000000u) >> 13))};
}

// ---- vector loads and stores -----------------------------------------------------------------------------------------
FF_INLINE f32v load(const float* p) { f32v v; memcpy(&v, p, sizeof v); return v; }
FF_INLINE f64v load(const double* p) { f64v v; memcpy(&v, p, sizeof v); return v; }
FF_INLINE f32v load(const bf16* p) {
  u16v h;
  memcpy(&h, p, sizeof h);
  return (f32v)(__builtin_convertvector(h, u32v) << 16);
}
FF_INLINE f32v load(const fp16* p) {
#if defined(__AVX512F__) && FF_VEC_BYTES == 64
  return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && FF_VEC_BYTES == 32
  return (f32v)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  f32v v;
  for (int i = 0; i < kW; i++) v[i] = to_float(p[i]);
  return v;
#endif
}

FF_INLINE void store(float* p, f32v v) { memcpy(p, &v, sizeof v); }
FF_INLINE void store(double* p, f64v v) { memcpy(p, &v, sizeof v); }
FF_INLINE u16v to_bf16(f32v v) {
  u32v u = (u32v)v;
  u32v rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  u32v quiet = (u >> 16) | 0x40;
  u32v nan = (u32v)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (quiet & nan), u16v);
}
FF_INLINE void store(bf16* p, f32v v) {
#if defined(__AVX2__) && FF_VEC_BYTES == 32
  // Two rounding shifts, one pack, one cross-lane permute: half the instructions of the generic narrowing.
  __m256i u = (__m256i)v;
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)),
                               _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1)));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)),
                         (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
  r = _mm256_srli_epi32(r, 16);
  r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(r));
#else
  u16v h = to_bf16(v);
  memcpy(p, &h, sizeof h);
#endif
}
FF_INLINE void store(fp16* p, f32v v) {
#if defined(__AVX512F__) && FF_VEC_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && FF_VEC_BYTES == 32
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kW; i++) p[i] = from_float<fp16>(v[i]);
#endif
}

// The first n of a vector's lanes, n < W; the others read as `fill`.
template <class T> FF_INLINE vec_t<acc_t<T>> load_partial(const T* p, int n, acc_t<T> fill = 0) {
  vec_t<acc_t<T>> v = splat<acc_t<T>>(fill);
  for (int i = 0; i < n; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T> FF_INLINE void store_partial(T* p, vec_t<acc_t<T>> v, int n) {
  for (int i = 0; i < n; i++) p[i] = from_float<T>(v[i]);
}

// ---- arithmetic ------------------------------------------------------------------------------------------------------
FF_INLINE f32v vmax(f32v a, f32v b) { return a > b ? a : b; }
FF_INLINE f64v vmax(f64v a, f64v b) { return a > b ? a : b; }
FF_INLINE f32v vmin(f32v a, f32v b) { return a < b ? a : b; }
FF_INLINE f64v vmin(f64v a, f64v b) { return a < b ? a : b; }

// Sum and maximum over lanes, by halving: the same tree at every call, so results repeat bit for bit.
template <class V> FF_INLINE auto hsum(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  decltype(v[0] + v[0]) t[n];
  memcpy(t, &v, sizeof v);
  for (int s = n / 2; s; s /= 2)
    for (int i = 0; i < s; i++) t[i] += t[i + s];
  return t[0];
}
template <class V> FF_INLINE auto hmax(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  decltype(v[0] + v[0]) t[n];
  memcpy(t, &v, sizeof v);
  for (int s = n / 2; s; s /= 2)
    for (int i = 0; i < s; i++) t[i] = t[i] > t[i + s] ? t[i] : t[i + s];
  return t[0];
}

// exp(x) to about 1 ulp: x = n ln2 + r with |r| <= ln2 / 2, a degree-6 polynomial in r, and 2^n built in two factors so
// that results down to the smallest subnormal are right. exp(-inf) = 0, exp(large) = inf, NaN stays NaN.
FF_INLINE f32v vexp(f32v x) {
  f32v c = vmin(vmax(x, splat(-104.f)), splat(89.f));
  c = x == x ? c : x;
  const f32v magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  f32v t = c * 1.44269504088896341f + magic;
  i32v n = (i32v)t - (i32v)magic;
  f32v nf = t - magic;
  f32v r = c - nf * 0.693145751953125f;   // ln2 in two parts: the first has trailing zeros, so nf times it is exact
  r = r - nf * 1.42860682030941723e-6f;
  f32v p = splat(1.9875691500e-4f);       // coefficients: Cephes expf (Moshier)
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  f32v y = p * (r * r) + r + 1.f;
  i32v half = n >> 1;
  f32v s1 = (f32v)((half + 127) << 23), s2 = (f32v)((n - half + 127) << 23);
  return y * s1 * s2;
}
// exp for arguments known to be <= 0 (softmax numerators): one scale factor, results below 2^-126 are 0, NaN stays NaN.
FF_INLINE f32v vexp_nonpositive(f32v x) {
  f32v c = vmax(splat(-87.3365447505f), x);  // in this order NaN passes
  const f32v magic = splat(12582912.f);
  f32v t = c * 1.44269504088896341f + magic;
  f32v nf = t - magic;
  f32v r = c - nf * 0.693145751953125f;
  r = r - nf * 1.42860682030941723e-6f;
  f32v p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  f32v y = p * (r * r) + r + 1.f;
  y *= (f32v)(((i32v)t << 23) + 0x3f800000);  // 2^n: magic's own bits shift out, only n reaches the exponent
  return x < -87.3365447505f ? f32v{} : y;
}
// 2^x for x <= 0 and not NaN, results below 2^-126 flushed to 0: attention folds log2(e) into the softmax scale, which
// leaves one multiplication less and an exact range reduction.
FF_INLINE f32v vexp2_nonpositive(f32v x) {
  f32v c = vmax(splat(-126.f), x);        // in this order a NaN comes through
  const f32v magic = splat(12582912.f);
  f32v t = c + magic;
  f32v r = c - (t - magic);               // |r| <= 1/2, exact
  f32v p = splat(1.535336188319500e-4f);  // Taylor-like minimax of 2^r (Cephes exp2f)
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  f32v y = p * r + 1.f;
  y = (f32v)((i32v)y + ((i32v)t << 23));
  return x < -126.f ? f32v{} : y;
}
// double exists for gradient checks, not for speed.
FF_INLINE f64v vexp2_nonpositive(f64v x) {
  for (int i = 0; i < vec<double>::W; i++) x[i] = std::exp2(x[i]);
  return x;
}
FF_INLINE f64v vexp(f64v x) {
  for (int i = 0; i < vec<double>::W; i++) x[i] = std::exp(x[i]);
  return x;
}
FF_INLINE f64v vexp_nonpositive(f64v x) { return vexp(x); }

// ---- dropout ---------------------------------------------------------------------------------------------------------
#if defined(__AVX2__)
FF_INLINE void mulhilo(u32v a, uint32_t b, u32v& hi, u32v& lo) {
#if FF_VEC_BYTES == 64 && defined(__AVX512F__)
  __m512i va = (__m512i)a, vb = _mm512_set1_epi32(int(b));
  __m512i even = _mm512_mul_epu32(va, vb), odd = _mm512_mul_epu32(_mm512_srli_epi64(va, 32), vb);
  hi = (u32v)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  lo = (u32v)_mm512_mullo_epi32(va, vb);
#elif FF_VEC_BYTES == 32
  __m256i va = (__m256i)a, vb = _mm256_set1_epi32(int(b));
  __m256i even = _mm256_mul_epu32(va, vb), odd = _mm256_mul_epu32(_mm256_srli_epi64(va, 32), vb);
  hi = (u32v)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  lo = (u32v)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#else
  for (int i = 0; i < kW; i++) hi[i] = uint32_t(uint64_t(a[i]) * b >> 32);
  lo = a * b;
#endif
}
#else
FF_INLINE void mulhilo(u32v a, uint32_t b, u32v& hi, u32v& lo) {
  for (int i = 0; i < kW; i++) hi[i] = uint32_t(uint64_t(a[i]) * b >> 32);
  lo = a * b;
}
#endif

// Philox4x32-10 (Salmon et al. 2011) for kW counters (c0, row, 0); r[w] is word w of each.
FF_INLINE void philox(u32v c0, uint64_t row, uint64_t seed, u32v r[4]) {
  u32v c1 = u32v{} + uint32_t(row), c2 = u32v{} + uint32_t(row >> 32), c3 = u32v{};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int i = 0; i < 10; i++) {
    u32v h0, l0, h1, l1;
    mulhilo(c0, 0xD2511F53u, h0, l0);
    mulhilo(c2, 0xCD9E8D57u, h1, l1);
    c0 = h1 ^ c1 ^ k0;
    c2 = h0 ^ c3 ^ k1;
    c1 = l1;
    c3 = l0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  r[0] = c0, r[1] = c1, r[2] = c2, r[3] = c3;
}

// Fills keep[0 .. cols) with 1 / (1 - p) where the element survives dropout and 0 where it does not (see fastformer.h).
// keep needs room for cols rounded up to 64.
inline void dropout_scales(float* keep, int64_t cols, uint64_t row, uint64_t seed, double p) {
  const uint32_t threshold = uint32_t(std::min(p * 4294967296.0, 4294967295.0));
  const float scale = p < 1 ? float(1.0 / (1.0 - p)) : 0.f;
  u32v lane;
  for (int i = 0; i < kW; i++) lane[i] = i;
  if constexpr (kW >= 8) {
    for (int64_t c = 0; c < cols; c += 4 * kW) {  // kW counters, 4 * kW columns
      u32v r[4];
      philox(lane + uint32_t(c / 4), row, seed, r);
      for (int w = 0; w < 4; w++) {
        f32v s = r[w] >= threshold ? splat(scale) : f32v{};
        for (int b = 0; b < kW / 8; b++) memcpy(keep + c + b * 32 + w * 8, (const float*)&s + b * 8, 32);
      }
    }
  } else {
    for (int64_t c = 0; c < cols; c += 32)
      for (int h = 0; h < 8; h += kW) {
        u32v r[4];
        philox(lane + uint32_t(c / 4 + h), row, seed, r);
        for (int w = 0; w < 4; w++)
          for (int i = 0; i < kW; i++) keep[c + w * 8 + h + i] = r[w][i] >= threshold ? scale : 0.f;
      }
  }
}

}  // namespace FF_ISA
}  // namespace ff
