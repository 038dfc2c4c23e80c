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
#include <type_traits>
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
// A function of its own: its loops then have the registers to themselves, which is worth a call per row.
#define FF_NOINLINE __attribute__((noinline))
// After a lambda's parameters: loop bodies that are called for whole vectors and for tails would otherwise become calls.
#define FF_LAMBDA __attribute__((always_inline))

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
typedef uint8_t bytes_of_f32v __attribute__((vector_size(FF_VEC_BYTES / 4)));
typedef uint8_t bytes_of_f64v __attribute__((vector_size(FF_VEC_BYTES / 8)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int64_t i64x2 __attribute__((vector_size(16)));
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
#if defined(__AVX2__) && FF_VEC_BYTES == 32
FF_INLINE f32v widen(bf16, __m128i h) { return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16); }
FF_INLINE f32v widen(fp16, __m128i h) { return (f32v)_mm256_cvtph_ps(h); }
FF_INLINE f32v load(const bf16* p) { return widen(bf16{}, _mm_loadu_si128((const __m128i*)p)); }
FF_INLINE f32v load(const fp16* p) { return widen(fp16{}, _mm_loadu_si128((const __m128i*)p)); }
#else
FF_INLINE f32v load(const bf16* p) {
  u16v h;
  memcpy(&h, p, sizeof h);
  return (f32v)(__builtin_convertvector(h, u32v) << 16);
}
FF_INLINE f32v load(const fp16* p) {
#if defined(__AVX512F__) && FF_VEC_BYTES == 64
  return (f32v)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  f32v v;
  for (int i = 0; i < kW; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
#endif

FF_INLINE void store(float* p, f32v v) { memcpy(p, &v, sizeof v); }
FF_INLINE void store(double* p, f64v v) { memcpy(p, &v, sizeof v); }
#if defined(__AVX2__) && FF_VEC_BYTES == 32
FF_INLINE __m128i narrow(bf16, f32v v) {
  // Two rounding shifts, one pack, one cross-lane permute: half the instructions of the generic narrowing.
  __m256i u = (__m256i)v;
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)),
                               _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1)));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)),
                         (__m256i)_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
  r = _mm256_srli_epi32(r, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
FF_INLINE __m128i narrow(fp16, f32v v) { return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
FF_INLINE void store(bf16* p, f32v v) { _mm_storeu_si128((__m128i*)p, narrow(bf16{}, v)); }
FF_INLINE void store(fp16* p, f32v v) { _mm_storeu_si128((__m128i*)p, narrow(fp16{}, v)); }
#else
FF_INLINE u16v to_bf16(f32v v) {
  u32v u = (u32v)v;
  u32v rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  u32v quiet = (u >> 16) | 0x40;
  u32v nan = (u32v)(v != v);
  return __builtin_convertvector((rounded & ~nan) | (quiet & nan), u16v);
}
FF_INLINE void store(bf16* p, f32v v) {
  u16v h = to_bf16(v);
  memcpy(p, &h, sizeof h);
}
FF_INLINE void store(fp16* p, f32v v) {
#if defined(__AVX512F__) && FF_VEC_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kW; i++) p[i] = from_float<fp16>(v[i]);
#endif
}
#endif

// v in the first n lanes, `fill` in the others.
FF_INLINE f32v keep_first(f32v v, int n, float fill) {
  i32v lane;
  for (int i = 0; i < kW; i++) lane[i] = i;
  return lane < n ? v : splat(fill);
}
FF_INLINE f64v keep_first(f64v v, int n, double fill) {
  i64v lane;
  for (int i = 0; i < vec<double>::W; i++) lane[i] = i;
  return lane < int64_t(n) ? v : splat(fill);
}

// The first n of a vector's lanes, n < W; the others read as `fill`. Tails are every row's last step where the row is
// short, so they avoid lane by lane copies where the instruction set can.
template <class T> FF_INLINE vec_t<acc_t<T>> load_partial(const T* p, int n, acc_t<T> fill = 0) {
#if defined(__AVX512F__) && FF_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) return (f32v)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), __mmask16((1u << n) - 1), p);
  else if constexpr (sizeof(T) == 8) return (f64v)_mm512_mask_loadu_pd(_mm512_set1_pd(fill), __mmask8((1u << n) - 1), p);
  else {
    T h[kW];
    _mm256_storeu_si256((__m256i*)h, _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p));
    return keep_first(load(h), n, fill);
  }
#elif defined(__AVX2__) && FF_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    const __m256i first = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return (f32v)_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps((const float*)p, first), (__m256)first);
  } else if constexpr (sizeof(T) == 2) {
    uint64_t low = 0, high = 0;  // in at most two reads, which may overlap
    const uint16_t* h = (const uint16_t*)p;
    if (n >= 4) {
      memcpy(&low, h, 8);
      memcpy(&high, h + n - 4, 8);
      high = n == 4 ? 0 : high >> (16 * (8 - n));
    } else if (n >= 2) {
      uint32_t first, last;
      memcpy(&first, h, 4);
      memcpy(&last, h + n - 2, 4);
      low = first | uint64_t(n == 2 ? 0 : last >> 16) << 32;
    } else if (n == 1) {
      low = h[0];
    }
    return keep_first(widen(T{}, _mm_set_epi64x(int64_t(high), int64_t(low))), n, fill);
  }
#endif
  vec_t<acc_t<T>> v = splat<acc_t<T>>(fill);
  for (int i = 0; i < n; i++) v[i] = to_float(p[i]);
  return v;
}
template <class T> FF_INLINE void store_partial(T* p, vec_t<acc_t<T>> v, int n) {
#if defined(__AVX512F__) && FF_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  else if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
  else {
    T h[kW];
    store(h, v);
    return _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), _mm256_loadu_si256((const __m256i*)h));
  }
#elif defined(__AVX2__) && FF_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    const __m256i first = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_maskstore_ps((float*)p, first, (__m256)v);
  } else if constexpr (sizeof(T) == 2) {
    const __m128i h = narrow(T{}, v);
    uint64_t bits = uint64_t(_mm_cvtsi128_si64(h));
    if (n & 4) memcpy(p, &bits, 8), p += 4, bits = uint64_t(_mm_extract_epi64(h, 1));
    if (n & 2) memcpy(p, &bits, 4), p += 2, bits >>= 32;
    if (n & 1) memcpy(p, &bits, 2);
    return;
  }
#endif
  for (int i = 0; i < n; i++) p[i] = from_float<T>(v[i]);
}

// ---- pairs -----------------------------------------------------------------------------------------------------------
// 2 W elements as two vectors, in an order of the storage type's own. bfloat16's are the even and the odd elements: a
// shift and a mask take them apart, a shift and an or put them together, half the instructions of widening in order.
template <class A> struct Pair { vec_t<A> first, second; };
template <class T> constexpr bool kInOrder = !std::is_same<T, bf16>::value;

template <class T> FF_INLINE Pair<acc_t<T>> load_pair(const T* p) {
  if constexpr (kInOrder<T>) return {load(p), load(p + vec<acc_t<T>>::W)};
  else {
    u32v both;
    memcpy(&both, p, sizeof both);
    return {(f32v)(both << 16), (f32v)(both & 0xffff0000u)};
  }
}
// The values a T holds after rounding to nearest even. A NaN of bfloat16's own, or one an operation made, stays NaN; one
// with all upper mantissa bits set and more below, which only a float32 can hold, would not.
template <class T> FF_INLINE Pair<acc_t<T>> round_pair(Pair<acc_t<T>> v) {
  if constexpr (std::is_same<T, bf16>::value) {
    u32v even = (u32v)v.first, odd = (u32v)v.second;
    even += ((even >> 16) & 1) + 0x7fff, odd += ((odd >> 16) & 1) + 0x7fff;
    return {(f32v)(even & 0xffff0000u), (f32v)(odd & 0xffff0000u)};
  } else if constexpr (std::is_same<T, fp16>::value) {
    T both[2 * vec<acc_t<T>>::W];
    store(both, v.first), store(both + vec<acc_t<T>>::W, v.second);
    return load_pair(both);
  } else return v;
}
// Stores values that are rounded already.
template <class T> FF_INLINE void store_rounded(T* p, Pair<acc_t<T>> v) {
  if constexpr (kInOrder<T>) store(p, v.first), store(p + vec<acc_t<T>>::W, v.second);
  else {
    u32v both = ((u32v)v.first >> 16) | (u32v)v.second;
    memcpy(p, &both, sizeof both);
  }
}
template <class T> FF_INLINE void store_pair(T* p, Pair<acc_t<T>> v) {
  if constexpr (kInOrder<T>) store_rounded(p, v);
  else store_rounded(p, round_pair<T>(v));
}
template <class A> FF_INLINE Pair<A> operator+(Pair<A> x, Pair<A> y) { return {x.first + y.first, x.second + y.second}; }
template <class A> FF_INLINE Pair<A> operator-(Pair<A> x, Pair<A> y) { return {x.first - y.first, x.second - y.second}; }
template <class A> FF_INLINE Pair<A> operator*(Pair<A> x, Pair<A> y) { return {x.first * y.first, x.second * y.second}; }
template <class A> FF_INLINE Pair<A> operator-(Pair<A> x, A y) { return {x.first - y, x.second - y}; }
template <class A> FF_INLINE Pair<A> operator*(Pair<A> x, A y) { return {x.first * y, x.second * y}; }
template <class A> FF_INLINE Pair<A>& operator+=(Pair<A>& x, Pair<A> y) { return x = x + y; }

// ---- arithmetic ------------------------------------------------------------------------------------------------------
// a > b ? a : b: where either is NaN the result is b. GCC does not turn the expression into the one instruction it is.
#if defined(__AVX512F__) && FF_VEC_BYTES == 64
FF_INLINE f32v vmax(f32v a, f32v b) { return (f32v)_mm512_max_ps((__m512)a, (__m512)b); }
FF_INLINE f32v vmin(f32v a, f32v b) { return (f32v)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__) && FF_VEC_BYTES == 32
FF_INLINE f32v vmax(f32v a, f32v b) { return (f32v)_mm256_max_ps((__m256)a, (__m256)b); }
FF_INLINE f32v vmin(f32v a, f32v b) { return (f32v)_mm256_min_ps((__m256)a, (__m256)b); }
#else
FF_INLINE f32v vmax(f32v a, f32v b) { return a > b ? a : b; }
FF_INLINE f32v vmin(f32v a, f32v b) { return a < b ? a : b; }
#endif
FF_INLINE f64v vmax(f64v a, f64v b) { return a > b ? a : b; }
FF_INLINE f64v vmin(f64v a, f64v b) { return a < b ? a : b; }

// Sum and maximum over lanes, by halving: the same tree at every call, so results repeat bit for bit.
template <class V, class F> FF_INLINE auto fold_lanes(V v, F f) {
  using A = std::decay_t<decltype(v[0])>;
  if constexpr (sizeof(V) > 16) {
    typedef A half __attribute__((vector_size(sizeof(V) / 2)));
    half low, high;
    memcpy(&low, &v, sizeof low);
    memcpy(&high, (const char*)&v + sizeof low, sizeof high);
    return fold_lanes(f(low, high), f);
  } else if constexpr (sizeof(A) == 4) {
    v = f(v, __builtin_shuffle(v, i32x4{2, 3, 0, 1}));
    return f(v, __builtin_shuffle(v, i32x4{1, 0, 3, 2}))[0];
  } else {
    return f(v, __builtin_shuffle(v, i64x2{1, 0}))[0];
  }
}
template <class V> FF_INLINE auto hsum(V v) {
  return fold_lanes(v, [](auto a, auto b) FF_LAMBDA { return a + b; });
}
template <class V> FF_INLINE auto hmax(V v) {
  return fold_lanes(v, [](auto a, auto b) FF_LAMBDA { return a > b ? a : b; });
}

// Exponentials. An argument is split as n ln2 + r (n + f for powers of two) by adding 1.5 * 2^23, which rounds to an
// integer and leaves n in the low mantissa bits; e^r and 2^f are polynomials fitted to a relative error of 3e-9, evaluated
// by halves (Estrin) because what bounds these loops is the length of the chain of operations.
constexpr float kRound = 12582912.f;
FF_INLINE f32v exp_reduced(f32v c, f32v t) {
  f32v nf = t - kRound;
  f32v r = c - nf * 0.693145751953125f;  // ln2 in two parts: the first has trailing zeros, so nf times it is exact
  r = r - nf * 1.42860682030941723e-6f;
  f32v r2 = r * r;
  f32v p = (r2 * 1.3818298e-3f + (r * 8.368532e-3f + 4.1668292e-2f)) * r2 + (r * 0.16666523f + 0.49999994f);
  return (p * r2 + r) + 1.f;
}
FF_INLINE f32v exp2_reduced(f32v f) {
  f32v f2 = f * f;
  f32v high = f2 * (f * 1.5326463e-4f + 1.3390806e-3f) + (f * 9.618506e-3f + 5.55036e-2f);
  f32v p = high * f2 + (f * 0.24022648f + 0.6931472f);
  return p * f + 1.f;
}
// 2^n for n in [-127, 127] from t = n + kRound, whose own bits shift out; 0 for n = -127. NaN must not be the result of
// adding to bits, so callers multiply by this.
FF_INLINE f32v exponent(f32v t) { return (f32v)(((i32v)t << 23) + 0x3f800000); }

// exp(x) to about 1 ulp for any x: 2^n in two factors, so that results down to the smallest subnormal are right.
// exp(-inf) = 0, exp(large) = inf, NaN stays NaN.
FF_INLINE f32v vexp(f32v x) {
  f32v c = vmin(splat(89.f), vmax(splat(-104.f), x));  // in this order NaN passes
  f32v t = c * 1.44269504088896341f + kRound;
  i32v n = (i32v)t - (i32v)splat(kRound);
  i32v half = n >> 1;
  f32v s1 = (f32v)((half + 127) << 23), s2 = (f32v)((n - half + 127) << 23);
  return exp_reduced(c, t) * s1 * s2;
}
// exp(x) for x <= 0 (softmax numerators): one factor, results below 2^-126 are 0. NaN stays NaN.
FF_INLINE f32v vexp_nonpositive(f32v x) {
  f32v c = vmax(splat(-88.f), x);  // gives n = -127
  f32v t = c * 1.44269504088896341f + kRound;
  return exp_reduced(c, t) * exponent(t);
}
// 2^x for -127 <= x <= 0, results below 2^-126 are 0. NaN stays NaN.
FF_INLINE f32v vexp2_bounded(f32v x) {
  f32v t = x + kRound;
  return exp2_reduced(x - (t - kRound)) * exponent(t);
}
// The same for any x <= 0, with an exact range reduction.
FF_INLINE f32v vexp2_nonpositive(f32v x) { return vexp2_bounded(vmax(splat(-127.f), x)); }
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
// exp(scale z - shift) where shift is at least scale z, but for a rounding error: at |scale z| over 10^8 that is not small.
template <class V, class A> FF_INLINE V vexp_below(V z, A scale, A shift) {
  return vexp2_nonpositive(vmin(V{}, (z * scale - shift) * A(1.4426950408889634)));
}

// tanh to about 2 ulp. Near 0 a polynomial, because 1 - 2 / (e^2x + 1) cancels there.
FF_INLINE f32v vtanh(f32v x) {
  const f32v magnitude = (f32v)((u32v)x & 0x7fffffffu), z = x * x;
  const f32v near = ((((z * -5.70498872745e-3f + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z -
                     3.33332819422e-1f) * z * x + x;
  const f32v far = 1.f - 2.f / (vexp(magnitude * 2.f) + 1.f);
  const f32v signed_far = (f32v)((u32v)far | ((u32v)x & 0x80000000u));
  return magnitude < 0.625f ? near : signed_far;
}
FF_INLINE f64v vtanh(f64v x) {
  for (int i = 0; i < vec<double>::W; i++) x[i] = std::tanh(x[i]);
  return x;
}

// z where the byte is not 0, -inf where it is, and beyond the first n.
template <class A> FF_INLINE vec_t<A> hide_unless(vec_t<A> z, const uint8_t* bytes, int n) {
  using bytes_t = typename std::conditional<sizeof(A) == 8, bytes_of_f64v, bytes_of_f32v>::type;
  using index_t = typename std::conditional<sizeof(A) == 8, i64v, i32v>::type;
  bytes_t b{};
  if (n == vec<A>::W) memcpy(&b, bytes, sizeof b);
  else
    for (int i = 0; i < n; i++) b[i] = bytes[i];
  return __builtin_convertvector(b, index_t) != 0 ? z : splat(-std::numeric_limits<A>::infinity());
}

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

// Fills keep[0 .. cols) with 1 / (1 - p) where the element survives dropout and 0 where it does not (see fastformer.h), for
// the columns from `first` on, a multiple of 32. keep needs room for cols rounded up to 64.
inline void dropout_scales(float* keep, int64_t cols, uint64_t row, uint64_t seed, double p, int64_t first = 0) {
  const uint32_t threshold = uint32_t(std::min(p * 4294967296.0, 4294967295.0));
  const float scale = p < 1 ? float(1.0 / (1.0 - p)) : 0.f;
  u32v lane;
  for (int i = 0; i < kW; i++) lane[i] = i;
  if constexpr (kW >= 8) {
    for (int64_t c = 0; c < cols; c += 4 * kW) {  // kW counters, 4 * kW columns
      u32v r[4];
      philox(lane + uint32_t((first + c) / 4), row, seed, r);
      for (int w = 0; w < 4; w++) {
        f32v s = r[w] >= threshold ? splat(scale) : f32v{};
        for (int b = 0; b < kW / 8; b++) memcpy(keep + c + b * 32 + w * 8, (const float*)&s + b * 8, 32);
      }
    }
  } else {
    for (int64_t c = 0; c < cols; c += 32)
      for (int h = 0; h < 8; h += kW) {
        u32v r[4];
        philox(lane + uint32_t((first + c) / 4 + h), row, seed, r);
        for (int w = 0; w < 4; w++)
          for (int i = 0; i < kW; i++) keep[c + w * 8 + h + i] = r[w][i] >= threshold ? scale : 0.f;
      }
  }
}

}  // namespace FF_ISA
}  // namespace ff
