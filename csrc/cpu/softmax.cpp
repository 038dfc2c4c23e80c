// softmax(scale * x + bias + mask) over rows on the CPU, its logarithm, and their gradients.
//
// Forward: maximum, then exponentials and their sum, then the division; a row is read from memory once. The exponentials
// are kept between the last two steps, those of float and double in the output itself, others in a buffer of the thread;
// only rows longer than kKeep, and few long rows, which are cut into parts, compute them twice. Scores with a mask, a bias
// or the causal bound go through such a buffer first, so that the steps after are the same; columns past the bound are
// filled, not computed. Backward needs the output only: dx = scale * y * (dy - sum(dy * y)), for the logarithm
// dx = scale * (dy - exp(y) * sum(dy)), 0 where a column takes no part.
//
// Floor: one read and one write of the tensor forward, and one read of what is added; two reads and one write backward.
#include "softmax.h"

FF_DECLARE_IMPL(softmax_forward)
FF_DECLARE_IMPL(softmax_backward)

namespace ff {
namespace FF_ISA {

constexpr int64_t kKeep = 1 << 17;  // columns whose exponentials are kept: 512 KiB of float, about an L2

template <class T> static const T* row_of(const void* x, int64_t r, int64_t stride) { return (const T*)x + r * stride; }

// Where a row's scores are in memory already.
template <class T, bool Scaled> struct PlainRows {
  using A = acc_t<T>;
  static constexpr bool kInPlace = std::is_same<T, A>::value;  // nothing is kept before the exponentials
  const ff_softmax_args* a;

  Scores<T, Scaled> scores(int64_t r, const A*) const { return {row_of<T>(a->x, r, a->x_stride), A(a->scale)}; }
  A begin(int64_t r, A* kept, int64_t& visible) const {
    visible = a->cols;
    return row_max<A>(scores(r, kept), 0, visible);
  }
};

// What is added to row r of the scores, and how many of its columns take part at all.
template <class T, class B> struct Extras {
  using A = acc_t<T>;
  int64_t visible;
  const uint8_t* mask = nullptr;
  const B* bias = nullptr;
  A constant = 0;  // a bias that is one number for the whole row

  Extras(const ff_softmax_args* a, int64_t r) : visible(a->cols) {
    const int64_t k = r % a->row_shape[2], ij = r / a->row_shape[2];
    auto offset = [&](const int64_t* stride) {
      return ij / a->row_shape[1] * stride[0] + ij % a->row_shape[1] * stride[1] + k * stride[2];
    };
    if (a->causal) visible = std::max<int64_t>(0, std::min(visible, k + a->cols - a->row_shape[2] + 1));
    if (a->mask) {
      mask = a->mask + offset(a->mask_stride);
      if (a->mask_stride[3] == 0) visible = *mask ? visible : 0, mask = nullptr;
    }
    if (a->bias) {
      bias = (const B*)a->bias + offset(a->bias_stride);
      if (a->bias_stride[3] == 0) constant = to_float(*bias), bias = nullptr;
    }
  }
};

template <class T, class B> struct MaskedRows {
  using A = acc_t<T>;
  static constexpr bool kInPlace = false;
  const ff_softmax_args* a;

  KeptScores<A> scores(int64_t, const A* kept) const { return {kept}; }
  // The row's scores, in the order of T's pairs and in whole vectors, into kept; returns the largest.
  FF_NOINLINE A begin(int64_t r, A* kept, int64_t& visible) const {
    constexpr int W = vec<A>::W;
    const Extras<T, B> extras(a, r);
    const T* const x = row_of<T>(a->x, r, a->x_stride);
    const A scale = A(a->scale);
    vec_t<A> highest = splat(kNegInf<A>);
    visible = extras.visible;
    for_row<A>(
        visible,
        [&](int64_t i) FF_LAMBDA {
          Pair<A> v = load_pair(x + i) * scale;
          if (extras.bias) v += load_pair_as<T>(extras.bias + i);
          v = {v.first + extras.constant, v.second + extras.constant};
          if (extras.mask) v = hide_unless<T>(v, extras.mask + i);
          store(kept + i, v.first), store(kept + i + W, v.second);
          highest = vmax(v.first, vmax(v.second, highest));
        },
        [&](int64_t i, int k) FF_LAMBDA {
          vec_t<A> v = load_n(x + i, k) * scale + extras.constant;
          if (extras.bias) v += load_n(extras.bias + i, k);
          if (extras.mask) v = hide_unless<A>(v, extras.mask + i, k);
          store(kept + i, v);
          highest = vmax(k == W ? v : keep_first(v, k, kNegInf<A>), highest);
        });
    return hmax(highest);
  }
};

// Keeps a row's exponentials in whole vectors, or, in place, no further than the row reaches; and asks for the lines that
// come next, which this longest of the three steps leaves time for.
template <class T, bool InPlace> struct Keep {
  using A = acc_t<T>;
  A* e;
  const T* next;
  T* out;
  FF_INLINE void operator()(int64_t i, Pair<A> v) const {
    constexpr int W = vec<A>::W;
    __builtin_prefetch(next + i);
    if (!InPlace) __builtin_prefetch(out + i, 1);
    store(e + i, v.first), store(e + i + W, v.second);
  }
  FF_INLINE void operator()(int64_t i, vec_t<A> v, int k) const {
    if (InPlace) store_n(e + i, v, k);
    else store(e + i, v);
  }
};

// Writes exponentials times a factor.
template <class T> struct Scale {
  using A = acc_t<T>;
  T* out;
  A factor;
  FF_INLINE void operator()(int64_t i, Pair<A> v) const { store_pair(out + i, v * factor); }
  FF_INLINE void operator()(int64_t i, vec_t<A> v, int k) const { store_n(out + i, v * factor, k); }
};

template <class T, class Z>
FF_NOINLINE void write_logarithm(Z z, int64_t begin, int64_t end, acc_t<T> shift, acc_t<T> log_sum, T* out) {
  using A = acc_t<T>;
  for_row<A>(
      end - begin, [&](int64_t i) FF_LAMBDA { store_pair(out + i, z(begin + i) - shift - log_sum); },
      [&](int64_t i, int k) FF_LAMBDA { store_n(out + i, z(begin + i, k) - shift - log_sum, k); });
}

// out = e * factor, e in the order of T's pairs.
template <class T> FF_NOINLINE void write_scaled(const acc_t<T>* e, acc_t<T> factor, T* out, int64_t n) {
  for_row<acc_t<T>>(
      n, [&](int64_t i) FF_LAMBDA { store_pair(out + i, load_pair(e + i) * factor); },
      [&](int64_t i, int k) FF_LAMBDA { store_n(out + i, load_n(e + i, k) * factor, k); });
}

template <class A> static A inverse_of_sum(const MaxSum<A>& m) { return m.sum == 0 ? A(0) : A(1 / m.sum); }

// Whole rows, with what the steps leave for each other kept beside them.
template <class T, class Rows> static void forward_kept(const ff_softmax_args* a, Rows rows) {
  using A = acc_t<T>;
  const int64_t n = a->cols;
  parallel_for(a->rows, n, [&](int64_t begin, int64_t end, int) {
    const int64_t batch = batch_of_rows(n), stride = round_up(n, vec<A>::W);
    A* const buffer = Rows::kInPlace ? nullptr : thread_buffer<A>(batch * stride);
    auto out = [&](int64_t r) { return (T*)a->out + r * n; };
    auto kept = [&](int64_t r, int64_t j) -> A* {
      if constexpr (Rows::kInPlace) return out(r);
      else return buffer + j * stride;
    };
    for (int64_t r = begin; r < end; r += batch) {
      MaxSum<A> m[kBatchRows];
      int64_t visible[kBatchRows];
      const int64_t count = std::min(batch, end - r);
      for (int64_t j = 0; j < count; j++) m[j].max = rows.begin(r + j, kept(r + j, j), visible[j]);
      for (int64_t j = 0; j < count; j++) {
        A* const e = kept(r + j, j);
        const A shift = m[j].shift();
        const Keep<T, Rows::kInPlace> keep{e, row_of<T>(a->x, r + j + batch, a->x_stride), out(r + j)};
        if (a->log) m[j].sum = exponentials<T>(rows.scores(r + j, e), 0, visible[j], shift, NoSink{});
        else m[j].sum = exponentials<T>(rows.scores(r + j, e), 0, visible[j], shift, keep);
      }
      for (int64_t j = 0; j < count; j++) {
        A* const e = kept(r + j, j);
        T* const to = out(r + j);
        if (a->log) write_logarithm(rows.scores(r + j, e), 0, visible[j], m[j].shift(), A(m[j].log_sum()), to);
        else write_scaled(e, inverse_of_sum(m[j]), to, visible[j]);
        std::fill(to + visible[j], to + n, from_float<T>(a->log ? kNegInf<A> : A(0)));
      }
    }
  });
}

// Rows whose exponentials are not kept, in parts where rows are few.
template <class T, bool Scaled> static void forward_again(const ff_softmax_args* a) {
  using A = acc_t<T>;
  const PlainRows<T, Scaled> rows{a};
  auto z = [&](int64_t r) { return rows.scores(r, nullptr); };
  auto first = [&](int64_t r, int64_t begin, int64_t end, MaxSum<A>& m) { find_max<A>(z(r), begin, end, m); };
  auto second = [&](int64_t r, int64_t begin, int64_t end, MaxSum<A>& m) { add_exponentials<T>(z(r), begin, end, m); };
  auto finish = [&](int64_t r, int64_t begin, int64_t end, const MaxSum<A>& m) {
    T* const to = (T*)a->out + r * a->cols + begin;
    if (a->log) return write_logarithm(z(r), begin, end, m.shift(), A(m.log_sum()), to);
    const A factor = inverse_of_sum(m);
    exponentials<T>(z(r), begin, end - begin, m.shift(), Scale<T>{to, factor});
  };
  reduce_rows<MaxSum<A>>(a->rows, a->cols, first, second, finish);
}

template <class T> static void forward_rows(const ff_softmax_args* a) {
  for_bool(a->scale != 1, [&](auto scaled) {
    constexpr bool kScaled = decltype(scaled)::value;
    if (a->log || a->cols > kKeep || parts_per_row(a->rows, a->cols) > 1) forward_again<T, kScaled>(a);
    else forward_kept<T>(a, PlainRows<T, kScaled>{a});
  });
}

int softmax_forward(const ff_softmax_args* a, void*) {
  if (!a->mask && !a->bias && !a->causal)
    return for_dtype(a->dtype, [&](auto t) { return forward_rows<decltype(t)>(a), FF_OK; });
  return for_dtypes(a->dtype, a->bias ? a->bias_dtype : a->dtype, [&](auto t, auto b) {
    using T = decltype(t);
    return forward_kept<T>(a, MaskedRows<T, decltype(b)>{a}), FF_OK;
  });
}

struct Sum {
  double value = 0;
  void merge(const Sum& other) { value += other.value; }
};

// Both passes of backward ask for what comes after: the first for the lines of dx, the second for the next row.
template <bool Log, class T> FF_NOINLINE double sum_of_row(const T* y, const T* dy, const T* dx, int64_t n) {
  using A = acc_t<T>;
  return reduce_row<A>(
      n,
      [&](int64_t i) FF_LAMBDA {
        __builtin_prefetch(dx + i, 1);
        return Log ? load_pair(dy + i) : load_pair(dy + i) * load_pair(y + i);
      },
      [&](int64_t i, int k) FF_LAMBDA { return Log ? load_n(dy + i, k) : load_n(dy + i, k) * load_n(y + i, k); });
}

template <bool Log, class T>
FF_NOINLINE void gradient_of_row(const T* y, const T* dy, T* dx, int64_t n, acc_t<T> sum, acc_t<T> scale,
                                 int64_t to_next_y, int64_t to_next_dy) {
  using A = acc_t<T>;
  for_row<A>(
      n,
      [&](int64_t i) FF_LAMBDA {
        __builtin_prefetch(y + to_next_y + i), __builtin_prefetch(dy + to_next_dy + i);
        const Pair<A> d = load_pair(dy + i), v = load_pair(y + i);
        store_pair(dx + i, Log ? (d - vexp_score<T>(v) * sum) * scale : v * scale * (d - sum));
      },
      [&](int64_t i, int k) FF_LAMBDA {
        const vec_t<A> d = load_n(dy + i, k), v = load_n(y + i, k);
        store_n(dx + i, Log ? (d - vexp_score<T>(v) * sum) * scale : v * scale * (d - sum), k);
      });
}

template <bool Log, class T> static void backward_rows(const ff_softmax_args* a) {
  using A = acc_t<T>;
  const int64_t n = a->cols;
  const int64_t batch = batch_of_rows(n);
  const bool partly = a->mask || a->causal;
  auto out = [&](int64_t r) { return row_of<T>(a->out, r, n); };
  auto dout = [&](int64_t r) { return row_of<T>(a->dout, r, a->dout_stride); };
  auto first = [&](int64_t r, int64_t begin, int64_t end, Sum& sum) {
    sum.value = sum_of_row<Log>(out(r) + begin, dout(r) + begin, (const T*)a->dx + r * n + begin, end - begin);
  };
  auto finish = [&](int64_t r, int64_t begin, int64_t end, Sum sum) {
    T* const dx = (T*)a->dx + r * n;
    // The logarithm's row of only -inf: its first element tells almost every other row apart.
    if (Log && to_float(out(r)[0]) == kNegInf<A> && row_max<A>(Scores<T>{out(r)}, 0, n) == kNegInf<A>)
      return std::fill(dx + begin, dx + end, T{});
    gradient_of_row<Log>(out(r) + begin, dout(r) + begin, dx + begin, end - begin, A(sum.value), A(a->scale), batch * n,
                         batch * a->dout_stride);
    if (!Log || !partly) return;  // softmax's outputs there are 0
    const Extras<T, T> extras(a, r);
    for (int64_t c = begin; c < end; c++)
      if (c >= extras.visible || (extras.mask && !extras.mask[c])) dx[c] = T{};
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
  if (a->mask || a->bias || a->causal)
    FF_REQUIRE(a->row_shape[0] * a->row_shape[1] * a->row_shape[2] == a->rows,
               "row_shape: %lld x %lld x %lld is not rows (%lld)", (long long)a->row_shape[0],
               (long long)a->row_shape[1], (long long)a->row_shape[2], (long long)a->rows);
  FF_REQUIRE(!a->mask || a->mask_stride[3] == 0 || a->mask_stride[3] == 1, "mask_stride: the last is neither 0 nor 1");
  FF_REQUIRE(!a->bias || a->bias_stride[3] == 0 || a->bias_stride[3] == 1, "bias_stride: the last is neither 0 nor 1");
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
