// Cross-entropy of class indices on the CPU; the formula is in fastformer.h.
//
// Forward reads the logits once and keeps one number per row, lse = log(sum(exp(z))): maximum and sum are taken block by
// block while a block is in L1, the sum rescaled when the maximum rises. Backward reads the logits again and writes
// softmax(z) - onehot, scaled, once. Floor: one read forward, one read and one write backward.
// Rows go to threads in contiguous parts; of few long rows each thread takes a part of every row.
#include "softmax.h"

FF_DECLARE_IMPL(cross_entropy_forward)
FF_DECLARE_IMPL(cross_entropy_backward)

namespace ff {
namespace FF_ISA {

template <class A> static double sum_of_weights(const ff_cross_entropy_args* a) {
  if (!a->weight) return double(a->cols);
  return reduce_row<A>(a->cols, [&](int64_t i, int k) FF_LAMBDA { return load_n((const A*)a->weight + i, k); });
}

// What the loss needs of the logits: their statistics, and for label smoothing sum_j w[j] * (z[j] - origin).
template <class A> struct Summary {
  MaxSum<A> exp;
  double smooth = 0;
  void merge(const Summary& other) { exp.merge(other.exp), smooth += other.smooth; }
};

template <class T> static void forward_rows(const ff_cross_entropy_args* a) {
  using A = acc_t<T>;
  const A* const weight = (const A*)a->weight;
  const double s = a->label_smoothing, total_weight = s > 0 ? sum_of_weights<A>(a) : 0;
  auto logits = [&](int64_t r) { return (const T*)a->logits + r * a->logits_stride; };
  // Logits are compared with the target's, so that the loss keeps its digits when they share a large offset.
  auto origin = [&](int64_t r) {
    A z = to_float(logits(r)[a->target[r]]);
    return std::isfinite(z) ? z : A(0);
  };
  auto first = [&](int64_t r, int64_t begin, int64_t end, Summary<A>& part) {
    find_max(logits(r) + begin, end - begin, A(1), part.exp);
  };
  auto second = [&](int64_t r, int64_t begin, int64_t end, Summary<A>& part) {
    const T* z = logits(r) + begin;
    add_exponentials(z, end - begin, A(1), part.exp);
    if (s > 0 && a->target[r] != a->ignore_index) {
      const A o = origin(r);
      part.smooth = reduce_row<A>(end - begin, [&](int64_t i, int k) FF_LAMBDA {
        vec_t<A> d = (k == vec<A>::W ? load(z + i) : load_partial(z + i, k, o)) - o;
        return weight ? d * load_n(weight + begin + i, k) : d;
      });
    }
  };
  auto finish = [&](int64_t r, int64_t begin, int64_t, const Summary<A>& row) {
    if (begin) return;
    const double log_sum = std::log(row.exp.sum);
    ((A*)a->lse)[r] = A(double(row.exp.max) + log_sum);
    const int64_t target = a->target[r];
    double loss = 0;
    if (target != a->ignore_index) {
      const double z = double(to_float(logits(r)[target]));
      loss = (1 - s) * (weight ? double(weight[target]) : 1.0) * (double(row.exp.max) - z + log_sum);
      if (s > 0) {
        const double lse = double(row.exp.max) - double(origin(r)) + log_sum;
        loss += s / double(a->cols) * (total_weight * lse - row.smooth);
      }
    }
    ((A*)a->loss)[r] = A(loss);
  };
  reduce_rows<Summary<A>>(a->rows, a->cols, first, second, finish);
}

int cross_entropy_forward(const ff_cross_entropy_args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) { return forward_rows<decltype(t)>(a), FF_OK; });
}

// dlogits[j] = dloss * ((1 - s) * w[t] * (p[j] - [j == t]) + s / V * (sum(w) * p[j] - w[j])), p = exp(z - lse)
template <class T> static void backward_rows(const ff_cross_entropy_args* a) {
  using A = acc_t<T>;
  const A* const weight = (const A*)a->weight;
  const double s = a->label_smoothing, total_weight = s > 0 ? sum_of_weights<A>(a) : 0;
  auto part = [&](int64_t r, int64_t begin, int64_t end) {
    const T* z = (const T*)a->logits + r * a->logits_stride + begin;
    T* d = (T*)a->dlogits + r * a->cols + begin;
    const int64_t n = end - begin, target = a->target[r];
    if (target == a->ignore_index)
      return for_row<A>(n, [&](int64_t i, int k) FF_LAMBDA { store_n(d + i, vec_t<A>{}, k); });
    const double dloss = double(((const A*)a->dloss)[r * a->dloss_stride]);
    const double one_hot = dloss * (1 - s) * (weight ? double(weight[target]) : 1.0);
    const double uniform = dloss * s / double(a->cols);
    const A of_p = A(one_hot + uniform * total_weight), of_w = A(uniform), lse = ((const A*)a->lse)[r];
    auto gradient = [&](int64_t i, int k) FF_LAMBDA {
      vec_t<A> g = vexp_nonpositive(load_n(z + i, k) - lse) * of_p;
      if (s > 0) g -= weight ? load_n(weight + begin + i, k) * of_w : splat(of_w);
      return g;
    };
    // Taken before the row is written: dlogits may be the logits' own memory.
    const bool here = target >= begin && target < end;
    const T of_target = here ? from_float<T>(gradient(target - begin, 1)[0] - A(one_hot)) : T();
    for_row<A>(n, [&](int64_t i, int k) FF_LAMBDA { store_n(d + i, gradient(i, k), k); });
    if (here) d[target - begin] = of_target;
  };
  const int64_t parts = parts_per_row(a->rows, a->cols);
  parallel_for(a->rows * parts, a->cols / parts, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; i++) {
      const int64_t p = i % parts;
      part(i / parts, part_begin(a->cols, p, parts), part_begin(a->cols, p + 1, parts));
    }
  });
}

int cross_entropy_backward(const ff_cross_entropy_args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) { return backward_rows<decltype(t)>(a), FF_OK; });
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
static int check(const ff_cross_entropy_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->label_smoothing >= 0 && a->label_smoothing <= 1, "label_smoothing: %g is not in [0, 1]",
             a->label_smoothing);
  FF_REQUIRE(a->rows == 0 || (a->logits && a->target && a->lse), "logits, target, lse: must not be NULL");
  for (int64_t r = 0; r < a->rows; r++) {
    const int64_t t = a->target[r];
    FF_REQUIRE((t >= 0 && t < a->cols) || t == a->ignore_index,
               "target: row %lld is %lld, not in [0, %lld) and not ignore_index (%lld)", (long long)r, (long long)t,
               (long long)a->cols, (long long)a->ignore_index);
  }
  return FF_OK;
}

extern "C" int ff_cpu_cross_entropy_forward(const ff_cross_entropy_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->loss || a->rows == 0, "loss: must not be NULL");
  return FF_DISPATCH(cross_entropy_forward)(a, stream);
}

extern "C" int ff_cpu_cross_entropy_backward(const ff_cross_entropy_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->rows == 0 || (a->dloss && a->dlogits), "dloss, dlogits: must not be NULL");
  return FF_DISPATCH(cross_entropy_backward)(a, stream);
}
#endif
