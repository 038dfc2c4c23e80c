// softmax(scale * x) over rows on the CPU, its logarithm, and their gradients.
//
// Forward: maximum, then exponentials and their sum, then the division; a row is read from memory once. The
// exponentials of a row that fits on the stack are kept in float between the last two steps, those of a longer one are
// computed twice. Backward needs the output only: dx = scale * y * (dy - sum(dy * y)), for the logarithm
// dx = scale * (dy - exp(y) * sum(dy)). Floor: one read and one write forward, two reads and one write backward.
#include "softmax.h"

FF_DECLARE_IMPL(softmax_forward)
FF_DECLARE_IMPL(softmax_backward)

namespace ff {
namespace FF_ISA {

constexpr int64_t kKeep = 4096;  // elements of a row kept on the stack

template <class T> static void forward_rows(const ff_softmax_args* a) {
  using A = acc_t<T>;
  const int64_t n = a->cols;
  const A scale = A(a->scale);
  const bool keep = !a->log && n <= kKeep;
  auto x = [&](int64_t r) { return (const T*)a->x + r * a->x_stride; };
  auto out = [&](int64_t r) { return (T*)a->out + r * n; };
  if (keep)
    return parallel_for(a->rows, n, [&](int64_t begin, int64_t end, int) {
      constexpr int W = vec<A>::W;
      const int64_t stride = (n + W - 1) / W * W, batch = std::max<int64_t>(1, std::min(kBatchRows, kKeep / stride));
      alignas(FF_VEC_BYTES) A e[kKeep + W];
      for (int64_t r = begin; r < end; r += batch) {
        MaxSum<A> m[kBatchRows];
        const int64_t count = std::min(batch, end - r);
        for (int64_t j = 0; j < count; j++) m[j].max = row_max(x(r + j), n, scale);
        for (int64_t j = 0; j < count; j++) {
          const T* from = x(r + j);
          A* to = e + j * stride;
          const A shift = m[j].shift();
          m[j].sum = reduce_row<A>(n, [&](int64_t i, int k) FF_LAMBDA {
            vec_t<A> v = vexp_nonpositive(load_n(from + i, k) * scale - shift);
            store(to + i, v);
            return k == W ? v : keep_first(v, k, A(0));
          });
        }
        for (int64_t j = 0; j < count; j++) {
          const A inverse = m[j].sum == 0 ? A(0) : A(1 / m[j].sum);
          const A* from = e + j * stride;
          T* to = out(r + j);
          for_row<A>(n, [&](int64_t i, int k) FF_LAMBDA { store_n(to + i, load(from + i) * inverse, k); });
        }
      }
    });
  auto first = [&](int64_t r, int64_t begin, int64_t end, MaxSum<A>& m) {
    find_max(x(r) + begin, end - begin, scale, m);
  };
  auto second = [&](int64_t r, int64_t begin, int64_t end, MaxSum<A>& m) {
    add_exponentials(x(r) + begin, end - begin, scale, m);
  };
  auto finish = [&](int64_t r, int64_t begin, int64_t end, const MaxSum<A>& m) {
    const T* from = x(r) + begin;
    T* to = out(r) + begin;
    const A shift = m.shift(), inverse = m.sum == 0 ? A(0) : A(1 / m.sum);
    const A log_sum = m.sum == 0 ? A(0) : A(std::log(m.sum));
    for_row<A>(end - begin, [&](int64_t i, int k) FF_LAMBDA {
      vec_t<A> z = load_n(from + i, k) * scale - shift;
      store_n(to + i, a->log ? z - log_sum : vexp_nonpositive(z) * inverse, k);
    });
  };
  reduce_rows<MaxSum<A>>(a->rows, n, first, second, finish);
}

int softmax_forward(const ff_softmax_args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) { return forward_rows<decltype(t)>(a), FF_OK; });
}

struct Sum {
  double value = 0;
  void merge(const Sum& other) { value += other.value; }
};

template <bool Log, class T> static void backward_rows(const ff_softmax_args* a) {
  using A = acc_t<T>;
  const int64_t n = a->cols;
  const A scale = A(a->scale);
  auto out = [&](int64_t r) { return (const T*)a->out + r * n; };
  auto dout = [&](int64_t r) { return (const T*)a->dout + r * a->dout_stride; };
  auto first = [&](int64_t r, int64_t begin, int64_t end, Sum& sum) {
    const T *y = out(r) + begin, *dy = dout(r) + begin;
    sum.value = reduce_row<A>(end - begin, [&](int64_t i, int k) FF_LAMBDA {
      vec_t<A> d = load_n(dy + i, k);
      return Log ? d : d * load_n(y + i, k);
    });
  };
  auto finish = [&](int64_t r, int64_t begin, int64_t end, Sum sum) {
    const T *y = out(r) + begin, *dy = dout(r) + begin;
    T* dx = (T*)a->dx + r * n + begin;
    const A s = A(sum.value);
    // The logarithm's row of only -inf: its first element tells almost every other row apart.
    const bool masked = Log && to_float(out(r)[0]) == kNegInf<A> && row_max(out(r), n, A(1)) == kNegInf<A>;
    for_row<A>(end - begin, [&](int64_t i, int k) FF_LAMBDA {
      vec_t<A> d = load_n(dy + i, k), v = load_n(y + i, k);
      if (Log) d = masked ? vec_t<A>{} : d - vexp_nonpositive(v) * s;
      else d = v * (d - s);
      store_n(dx + i, d * scale, k);
    });
  };
  reduce_rows<Sum>(a->rows, n, first, [](int64_t, int64_t, int64_t, Sum&) {}, finish);
}

int softmax_backward(const ff_softmax_args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) {
    using T = decltype(t);
    for_bool(a->log, [&](auto log) { backward_rows<decltype(log)::value, T>(a); });
    return FF_OK;
  });
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
static int check(const ff_softmax_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 0, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->out || a->rows * a->cols == 0, "out: must not be NULL");
  return FF_OK;
}

extern "C" int ff_cpu_softmax_forward(const ff_softmax_args* a, void* stream) {
  if (int status = check(a)) return status;
  if (a->rows == 0 || a->cols == 0) return FF_OK;
  FF_REQUIRE(a->x, "x: must not be NULL");
  return FF_DISPATCH(softmax_forward)(a, stream);
}

extern "C" int ff_cpu_softmax_backward(const ff_softmax_args* a, void* stream) {
  if (int status = check(a)) return status;
  if (a->rows == 0 || a->cols == 0) return FF_OK;
  FF_REQUIRE(a->dout && a->dx, "dout, dx: must not be NULL");
  return FF_DISPATCH(softmax_backward)(a, stream);
}
#endif
