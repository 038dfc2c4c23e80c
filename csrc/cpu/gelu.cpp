// gelu(x + bias) and its gradients on the CPU: x * Phi(x) exactly, or by the tanh approximation.
//
// Both forms cost one exponential of a non-positive number and one division per element, forward and backward.
//   exact  Phi(-a) = exp(-a^2 / 2) * R(a) for a = |x|, with R (the Mills ratio over sqrt(2 pi)) as a quotient of two
//          polynomials with positive coefficients. Nothing cancels, so the left tail is right to a few units in the last
//          place of its own size, where 0.5 * (1 + erf) has lost every digit. The same exponential is the density.
//   tanh   0.5 * (1 + tanh(u)) = sigmoid(2u), from e = exp(-|2u|).
// Floor: one read and one write forward, two reads and one write backward. The bias gradient is summed in the pass that
// computes dx, one row at a time: several rows at once would spare loads of the sums, but 4096 bytes apart they compete
// for the same lines of the cache (measured: 1.7 times slower at 8192 x 1024).
#include "rows.h"

FF_DECLARE_IMPL(gelu_forward)
FF_DECLARE_IMPL(gelu_backward)

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

// exp(-|2u|) with 2u = 2 sqrt(2 / pi) (x + 0.044715 x^3); square = x^2, where it is not 0.
FF_INLINE f32v exp_minus_2u(f32v x, f32v& square) {
  const f32v a = vmin(splat(10.03f), vabs(x));  // there and beyond, e is 0
  square = a * a;
  return vexp2_bounded(a * (square * float(-2 * kSqrt2OverPi * kCubic * kLog2e) - float(2 * kSqrt2OverPi * kLog2e)));
}

template <bool Tanh> FF_INLINE f32v gelu(f32v x) {
  f32v square, e;
  if (!Tanh) return x * normal_cdf(x, e);
  e = exp_minus_2u(x, square);
  return (x < 0 ? x * e : x) / (1.f + e);
}
// d gelu / dx.
template <bool Tanh> FF_INLINE f32v gelu_slope(f32v x) {
  f32v square, e;
  if (!Tanh) {
    f32v cdf = normal_cdf(x, e);
    return cdf + x * e * float(kInvSqrt2Pi);
  }
  // s + x s (1 - s) (2u)'  with s = sigmoid(2u)
  e = exp_minus_2u(x, square);
  f32v r = 1.f / (1.f + e), s = x < 0 ? e * r : r;
  f32v rate = square * float(6 * kSqrt2OverPi * kCubic) + float(2 * kSqrt2OverPi);
  return s + x * (e * r * r) * rate;  // x * 0 first: no x is large enough for NaN
}

// double exists for gradient checks, not for speed.
template <bool Tanh> FF_INLINE double gelu(double x) {
  if (Tanh) return x / (1 + std::exp(-2 * kSqrt2OverPi * x * (1 + kCubic * x * x)));
  return x * 0.5 * std::erfc(-x * std::sqrt(0.5));
}
template <bool Tanh> FF_INLINE double gelu_slope(double x) {
  if (!Tanh) return 0.5 * std::erfc(-x * std::sqrt(0.5)) + x * kInvSqrt2Pi * std::exp(-0.5 * x * x);
  double e = std::exp(-2 * kSqrt2OverPi * std::fabs(x) * (1 + kCubic * x * x)), r = 1 / (1 + e);
  return (x < 0 ? e * r : r) + x * 2 * kSqrt2OverPi * (1 + 3 * kCubic * x * x) * (e * r * r);
}
template <bool Tanh> FF_INLINE f64v gelu(f64v x) {
  for (int i = 0; i < vec<double>::W; i++) x[i] = gelu<Tanh>(double(x[i]));
  return x;
}
template <bool Tanh> FF_INLINE f64v gelu_slope(f64v x) {
  for (int i = 0; i < vec<double>::W; i++) x[i] = gelu_slope<Tanh>(double(x[i]));
  return x;
}

// Without a bias the tensor is one long row.
static void flatten(int64_t& rows, int64_t& cols, bool has_bias) {
  if (!has_bias) cols *= rows, rows = 1;
}

template <bool Tanh, class T> static void forward_blocks(const ff_gelu_args* a) {
  using A = acc_t<T>;
  int64_t rows = a->rows, n = a->cols;
  flatten(rows, n, a->bias);
  parallel_blocks(rows, n, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, int) {
    for (int64_t r = r0; r < r1; r++) {
      const T *x = (const T*)a->x + r * n + c0, *bias = (const T*)a->bias + c0;
      T* out = (T*)a->out + r * n + c0;
      if (a->bias)
        for_row<A>(c1 - c0, [&](int64_t i, int k) FF_LAMBDA {
          store_n(out + i, gelu<Tanh>(load_n(x + i, k) + load_n(bias + i, k)), k);
        });
      else for_row<A>(c1 - c0, [&](int64_t i, int k) FF_LAMBDA { store_n(out + i, gelu<Tanh>(load_n(x + i, k)), k); });
    }
  });
}

int gelu_forward(const ff_gelu_args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) {
    using T = decltype(t);
    for_bool(a->tanh, [&](auto tanh) { forward_blocks<decltype(tanh)::value, T>(a); });
    return FF_OK;
  });
}

// A thread's running sums are emptied into its totals this often, so that long columns keep float accuracy.
constexpr int64_t kRowsPerSum = 32;

template <bool Tanh, class T> static void backward_blocks(const ff_gelu_args* a) {
  using A = acc_t<T>;
  int64_t rows = a->rows, n = a->cols;
  flatten(rows, n, a->bias || a->dbias);
  const int threads = num_threads(rows * n);
  A* const partial = a->dbias ? (A*)a->workspace : nullptr;  // (2, threads, cols): running sums, then totals
  if (partial) std::fill(partial, partial + 2 * threads * n, A(0));
  parallel_blocks(rows, n, [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1, int thread) {
    const T* bias = a->bias ? (const T*)a->bias + c0 : nullptr;
    A *sum = partial ? partial + thread * n + c0 : nullptr, *total = partial ? sum + threads * n : nullptr;
    for (int64_t r = r0; r < r1; r++) {
      const T *x = (const T*)a->x + r * n + c0, *dout = (const T*)a->dout + r * n + c0;
      T* dx = (T*)a->dx + r * n + c0;
      for_row<A>(c1 - c0, [&](int64_t i, int k) FF_LAMBDA {
        vec_t<A> z = load_n(x + i, k);
        if (bias) z += load_n(bias + i, k);
        vec_t<A> d = load_n(dout + i, k) * gelu_slope<Tanh>(z);
        if (sum) store_n(sum + i, load_n(sum + i, k) + d, k);
        store_n(dx + i, d, k);
      });
      if (sum && (r - r0) % kRowsPerSum == kRowsPerSum - 1)
        for (int64_t c = 0; c < c1 - c0; c++) total[c] += sum[c], sum[c] = 0;
    }
  });
  if (partial)
    for (int64_t c = 0; c < n; c++) {
      A sum = 0;
      for (int i = 2 * threads - 1; i >= 0; i--) sum += partial[i * n + c];
      ((T*)a->dbias)[c] = from_float<T>(sum);
    }
}

int gelu_backward(const ff_gelu_args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) {
    using T = decltype(t);
    for_bool(a->tanh, [&](auto tanh) { backward_blocks<decltype(tanh)::value, T>(a); });
    return FF_OK;
  });
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
static int check(const ff_gelu_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 0, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->x || a->rows * a->cols == 0, "x: must not be NULL");
  return FF_OK;
}

extern "C" int ff_cpu_gelu_forward(const ff_gelu_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->out || a->rows * a->cols == 0, "out: must not be NULL");
  return FF_DISPATCH(gelu_forward)(a, stream);
}

extern "C" int ff_cpu_gelu_backward(const ff_gelu_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE((a->dout && a->dx) || a->rows * a->cols == 0, "dout, dx: must not be NULL");
  FF_REQUIRE(!a->dbias || a->workspace, "workspace: must not be NULL when dbias is asked for");
  return FF_DISPATCH(gelu_backward)(a, stream);
}

extern "C" size_t ff_cpu_gelu_backward_workspace(const ff_gelu_args* a) {
  return size_t(ff::FF_ISA::num_threads(a->rows * a->cols)) * 2 * size_t(a->cols) * (a->dtype == FF_FLOAT64 ? 8 : 4);
}
#endif
