// relu, gelu, gelu_tanh and silu with their derivatives, on vectors.
//
// All but relu cost one exponential of a non-positive number and one division per element, for the value, the slope or
// both.
//   gelu       Phi(-a) = exp(-a^2 / 2) * R(a) for a = |x|, with R (the Mills ratio over sqrt(2 pi)) as a quotient of two
//              polynomials with positive coefficients. Nothing cancels, so the left tail is right to a few units in the
//              last place of its own size, where 0.5 * (1 + erf) has lost every digit. The same exponential is the density.
//   gelu_tanh  0.5 * (1 + tanh(u)) = sigmoid(2u), from e = exp(-|2u|), 2u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
//   silu       x * sigmoid(x), from e = exp(-|x|).
#pragma once
#include "cpu.h"

namespace ff {
namespace FF_ISA {

constexpr double kInvSqrt2Pi = 0.398942280401432677940, kSqrt2OverPi = 0.797884560802865355880;
constexpr double kCubic = 0.044715, kLog2e = 1.44269504088896340736;

FF_INLINE f32v vabs(f32v x) { return (f32v)((i32v)x & 0x7fffffff); }

// Phi(x) and e = exp(-x^2 / 2).
FF_INLINE f32v normal_cdf(f32v x, f32v& e) {
  const f32v a = vmin(splat(13.26f), vabs(x));  // there and beyond, e is 0
  e = vexp2_bounded(a * a * float(-0.5 * kLog2e));
  // Minimax in relative error (5.9e-9) on [0, 14.5], fitted to 40-digit values of erfc.
  f32v p = a * 4.116354576816291e-3f + 4.0633522025520674e-2f;
  f32v q = a * 1.0318051033181808e-2f + 1.0185958199008528e-1f;
  p = p * a + 1.83235997110514e-1f;
  q = q * a + 4.6947290327977476e-1f;
  p = p * a + 4.3829608227874994e-1f;
  q = q * a + 1.2025066655938044f;
  p = p * a + 0.5f;
  q = q * a + 1.674477145879388f;
  q = q * a + 1.f;
  f32v tail = e * (p / q);
  return x < 0 ? tail : 1.f - tail;
}

// The value and the slope at x; what is not used is not computed.
template <ff_activation K> FF_INLINE void evaluate(f32v x, f32v& value, f32v& slope) {
  f32v e;
  if constexpr (K == FF_RELU) {
    value = vmax(f32v{}, x);  // in this order NaN passes
    slope = x <= 0 ? f32v{} : splat(1.f);
  } else if constexpr (K == FF_GELU) {
    const f32v cdf = normal_cdf(x, e);
    value = x * cdf;
    slope = cdf + x * e * float(kInvSqrt2Pi);
  } else {  // x sigmoid(t): slope = s + x s (1 - s) t'
    f32v rate;
    if constexpr (K == FF_SILU) {
      e = vexp2_bounded(vmin(splat(88.02f), vabs(x)) * float(-kLog2e));  // there and beyond, e is 0
      rate = splat(1.f);
    } else {
      const f32v a = vmin(splat(10.03f), vabs(x));  // likewise
      const f32v square = a * a;
      e = vexp2_bounded(a * (square * float(-2 * kSqrt2OverPi * kCubic * kLog2e) - float(2 * kSqrt2OverPi * kLog2e)));
      rate = square * float(6 * kSqrt2OverPi * kCubic) + float(2 * kSqrt2OverPi);
    }
    // As little as possible waits for the division.
    const f32v r = 1.f / (1.f + e), xe = x * e;  // x * 0 first: no x is large enough for NaN
    value = (x < 0 ? xe : x) * r;
    slope = (x < 0 ? e : splat(1.f)) * r + (xe * rate) * (r * r);
  }
}

// double exists for gradient checks, not for speed.
template <ff_activation K> FF_INLINE void evaluate(double x, double& value, double& slope) {
  if constexpr (K == FF_RELU) {
    value = x < 0 ? 0 : x, slope = x <= 0 ? 0 : 1;
  } else if constexpr (K == FF_GELU) {
    const double cdf = 0.5 * std::erfc(-x * std::sqrt(0.5));
    value = x * cdf, slope = cdf + x * kInvSqrt2Pi * std::exp(-0.5 * x * x);
  } else {
    const double square = K == FF_SILU ? 0 : x * x, scale = K == FF_SILU ? 1 : 2 * kSqrt2OverPi;
    const double e = std::exp(-scale * std::fabs(x) * (1 + kCubic * square)), r = 1 / (1 + e), s = x < 0 ? e * r : r;
    value = x * s, slope = s + x * scale * (1 + 3 * kCubic * square) * (e * r * r);
  }
}
template <ff_activation K> FF_INLINE void evaluate(f64v x, f64v& value, f64v& slope) {
  for (int i = 0; i < vec<double>::W; i++) {
    double v, s;
    evaluate<K>(double(x[i]), v, s);
    value[i] = v, slope[i] = s;
  }
}
template <ff_activation K, class A> FF_INLINE void evaluate(Pair<A> x, Pair<A>& value, Pair<A>& slope) {
  evaluate<K>(x.first, value.first, slope.first);
  evaluate<K>(x.second, value.second, slope.second);
}
template <ff_activation K, class V> FF_INLINE V activate(V x) {
  V value, slope;
  evaluate<K>(x, value, slope);
  return value;
}

// Calls f with the kind as a std::integral_constant.
template <class F> int for_activation(ff_activation kind, F f) {
  switch (kind) {
    case FF_RELU: return f(std::integral_constant<ff_activation, FF_RELU>{});
    case FF_GELU: return f(std::integral_constant<ff_activation, FF_GELU>{});
    case FF_GELU_TANH: return f(std::integral_constant<ff_activation, FF_GELU_TANH>{});
    case FF_SILU: return f(std::integral_constant<ff_activation, FF_SILU>{});
  }
  return fail(FF_INVALID_ARGUMENT, "kind: %d is not an ff_activation", int(kind));
}

}  // namespace FF_ISA
}  // namespace ff
