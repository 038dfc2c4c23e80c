// relu, gelu, gelu_tanh and silu with their derivatives, for one number in float32.
//
// All but relu cost one exponential of a non-positive number and one division, for the value, the slope or both.
//   gelu       Phi(-a) = exp(-a^2 / 2) * R(a) for a = |x|, with R (the Mills ratio over sqrt(2 pi)) as a quotient of
//              two polynomials with positive coefficients: nothing cancels in the left tail, as it does in 1 + erf, and
//              the same exponential is the density.
//   gelu_tanh  0.5 * (1 + tanh(u)) = sigmoid(2u), from e = exp(-|2u|), 2u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
//   silu       x * sigmoid(x), from e = exp(-|x|).
#pragma once
#include "common.cuh"

namespace ff {

constexpr float kInvSqrt2Pi = 0.3989422804f, kSqrt2OverPi = 0.7978845608f, kCubic = 0.044715f;

// Phi(x) and e = exp(-x^2 / 2).
FF_DEVICE float normal_cdf(float x, float& e) {
  const float a = fminf(fabsf(x), 14.5f);  // there and beyond, e is 0
  e = __expf(-0.5f * a * a);
  // Minimax in relative error (5.9e-9) on [0, 14.5], fitted to 40-digit values of erfc.
  float p = a * 4.116354576816291e-3f + 4.0633522025520674e-2f;
  float q = a * 1.0318051033181808e-2f + 1.0185958199008528e-1f;
  p = p * a + 1.83235997110514e-1f;
  q = q * a + 4.6947290327977476e-1f;
  p = p * a + 4.3829608227874994e-1f;
  q = q * a + 1.2025066655938044f;
  p = p * a + 0.5f;
  q = q * a + 1.674477145879388f;
  q = q * a + 1.f;
  const float tail = e * __fdividef(p, q);
  return x < 0 ? tail : 1.f - tail;
}

// The value and the slope at x; what is not used is not computed. NaN passes.
template <ff_activation K> FF_DEVICE void evaluate(float x, float& value, float& slope) {
  float e;
  if constexpr (K == FF_RELU) {
    value = x <= 0 ? 0.f : x;
    slope = x <= 0 ? 0.f : 1.f;
  } else if constexpr (K == FF_GELU) {
    const float cdf = normal_cdf(x, e);
    value = x * cdf;
    slope = cdf + x * e * kInvSqrt2Pi;
  } else {  // x sigmoid(t): slope = s + x s (1 - s) t'
    float rate = 1;
    if constexpr (K == FF_SILU) {
      e = __expf(-fabsf(x));
    } else {
      const float a = fminf(fabsf(x), 11.f), square = a * a;  // there and beyond, e is 0
      e = __expf(-2 * kSqrt2OverPi * a * (1 + kCubic * square));
      rate = 2 * kSqrt2OverPi * (1 + 3 * kCubic * square);
    }
    const float r = __fdividef(1.f, 1.f + e), xe = x * e;  // x * 0 first: no x is large enough for NaN
    value = (x < 0 ? xe : x) * r;
    slope = (x < 0 ? e : 1.f) * r + (xe * rate) * (r * r);
  }
}

// The same with a kind that only the call knows: K is kAnyKind.
constexpr int kAnyKind = -1;
template <int K> FF_DEVICE void evaluate(ff_activation kind, float x, float& value, float& slope) {
  if constexpr (K != kAnyKind) return evaluate<ff_activation(K)>(x, value, slope);
  switch (kind) {
    case FF_RELU: return evaluate<FF_RELU>(x, value, slope);
    case FF_GELU: return evaluate<FF_GELU>(x, value, slope);
    case FF_GELU_TANH: return evaluate<FF_GELU_TANH>(x, value, slope);
    case FF_SILU: return evaluate<FF_SILU>(x, value, slope);
  }
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

}  // namespace ff
