// Cross-entropy of class indices or probabilities on the CPU; the formula is in fastformer.h.
//
// Forward reads the logits once: maximum and sum are taken block by block while a block is in L1, the sum rescaled when
// the maximum rises. With dlogits it writes the gradient of the row right after, while the row is still in L2: the
// exponentials are computed twice as by a backward pass, but the logits come from memory once instead of twice, and need
// not be kept. That is faster as long as a row stays in the cache (Python decides, backends/cpu/cross_entropy.py) and
// dloss is known beforehand, which it is for the mean and the sum. Backward reads the logits again and writes
// softmax(z) - onehot, scaled. With probabilities it needs sums over the row again and is the forward's passes.
// Floor: one read forward; one read and one write forward with the gradient, or in backward; probabilities are read too.
// dlogits may be the logits themselves: an element is read for the last time before it is written.
//
// Rows go to threads in contiguous parts; of few long rows each thread takes a part of every row.
#include "softmax.h"

FF_DECLARE_IMPL(cross_entropy_forward)
FF_DECLARE_IMPL(cross_entropy_backward)

namespace ff {
namespace FF_ISA {

// What the loss needs of a row: its statistics, and sums over the classes of q' and q' (z - origin), where q' are the
// weighted, smoothed probabilities. Beside indices q' is label smoothing's part, w s / V, and its sum known beforehand.
template <class A> struct Summary {
  MaxSum<A> exp;
  double total = 0, moment = 0;
  A target = 0, origin = 0;  // the target's logit, and what logits are compared with
  void merge(const Summary& other) { exp.merge(other.exp), total += other.total, moment += other.moment; }
};

template <class T> struct Loss {
  using A = acc_t<T>;
  const ff_cross_entropy_args* a;
  const A* weight;
  double smoothing, uniform;  // s, s / V
  double uniform_total = 0;   // sum_j w[j] s / V

  explicit Loss(const ff_cross_entropy_args* args)
      : a(args), weight((const A*)a->weight), smoothing(a->label_smoothing), uniform(smoothing / double(a->cols)) {
    if (smoothing > 0)
      uniform_total = uniform * (weight ? reduce_row<A>(a->cols, [&](int64_t i, int k) FF_LAMBDA {
                        return load_n(weight + i, k);
                      }) : double(a->cols));
  }

  Scores<T> logits(int64_t r) const { return {(const T*)a->logits + r * a->logits_stride}; }
  const T* probabilities(int64_t r) const {
    return a->probabilities ? (const T*)a->probabilities + r * a->probabilities_stride : nullptr;
  }
  bool ignored(int64_t r) const { return !a->probabilities && a->target[r] == a->ignore_index; }
  double target_weight(int64_t r) const { return (1 - smoothing) * (weight ? double(weight[a->target[r]]) : 1.0); }
  double dloss(int64_t r) const { return double(((const A*)a->dloss)[r * a->dloss_stride]); }

  // q' of a row times `factor`, as a function of the column like the scores.
  struct Targets {
    const T* q;
    const A* w;
    A of_q, constant;
    FF_INLINE Pair<A> operator()(int64_t i) const {
      Pair<A> v{splat(constant), splat(constant)};
      if (q) v += load_pair(q + i) * of_q;
      return w ? v * load_pair_as<T>(w + i) : v;
    }
    FF_INLINE vec_t<A> operator()(int64_t i, int k) const {
      vec_t<A> v = splat(constant);
      if (q) v += load_n(q + i, k) * of_q;
      return w ? v * load_n(w + i, k) : v;
    }
  };
  Targets targets(int64_t r, double factor) const {
    return {probabilities(r), weight, A(factor * (1 - smoothing)), A(factor * uniform)};
  }

  void sums(int64_t r, int64_t begin, int64_t end, Summary<A>& row) const {
    const Scores<T> z = logits(r);
    const Targets q = targets(r, 1);
    const A o = row.origin;
    auto keep = [](vec_t<A> v, int k) FF_LAMBDA { return k == vec<A>::W ? v : keep_first(v, k, A(0)); };
    row.moment = reduce_row<A>(
        end - begin, [&](int64_t i) FF_LAMBDA { return q(begin + i) * (z(begin + i) - o); },
        [&](int64_t i, int k) FF_LAMBDA { return keep(q(begin + i, k) * (z(begin + i, k) - o), k); });
    if (!q.q) return;
    row.total = reduce_row<A>(
        end - begin, [&](int64_t i) FF_LAMBDA { return q(begin + i); },
        [&](int64_t i, int k) FF_LAMBDA { return keep(q(begin + i, k), k); });
  }

  double loss(int64_t r, const Summary<A>& row) const {
    if (ignored(r)) return 0;
    const double log_sum = std::log(row.exp.sum), max = double(row.exp.max), lse = max + log_sum;
    double loss = a->z_loss != 0 ? a->z_loss * lse * lse : 0;
    // Differences of logits first, so that the loss keeps its digits when they share a large offset.
    if (!a->probabilities) loss += target_weight(r) * (max - double(row.target) + log_sum);
    if (a->probabilities || smoothing > 0) {
      const double total = a->probabilities ? row.total : uniform_total;
      loss += total * (max - double(row.origin) + log_sum) - row.moment;
    }
    return loss;
  }

  // d[j] = exp(z[j] - shift) * of_p - q'[j] * dloss - [j == t] * one_hot, where a row's p is exp(z - shift) / sum and
  // of_p = dloss * (sum of q' and of the target's weight + 2 z_loss lse) / sum.
  void gradient(int64_t r, int64_t begin, int64_t end, A shift, double sum, double lse, double total, A target) const {
    T* const d = (T*)a->dlogits + r * a->cols;
    if (ignored(r)) return std::fill(d + begin, d + end, T{});
    const double dl = dloss(r), one_hot = a->probabilities ? 0 : dl * target_weight(r);
    const A of_p = A((one_hot + dl * (total + (a->z_loss != 0 ? 2 * a->z_loss * lse : 0))) / sum);
    const Scores<T> z = logits(r);
    const Targets q = targets(r, dl);
    auto pass = [&](auto with_targets) {
      for_row<A>(
          end - begin,
          [&](int64_t i) FF_LAMBDA {
            const int64_t c = begin + i;
            const Pair<A> below = z(c) - shift, zero{};
            Pair<A> g = vexp_score<T>(Pair<A>{vmin(zero.first, below.first), vmin(zero.second, below.second)}) * of_p;
            if (decltype(with_targets)::value) g = g - q(c);
            store_pair(d + c, g);
          },
          [&](int64_t i, int k) FF_LAMBDA {
            const int64_t c = begin + i;
            vec_t<A> g = vexp_score<T>(vmin(vec_t<A>{}, z(c, k) - shift)) * of_p;
            if (decltype(with_targets)::value) g -= q(c, k);
            store_n(d + c, g, k);
          });
    };
    for_bool(a->probabilities || smoothing > 0, pass);
    if (a->probabilities) return;
    const int64_t t = a->target[r];
    if (t < begin || t >= end) return;
    const A p = vexp_score<A>(vmin(vec_t<A>{}, splat(target - shift)))[0] * of_p;
    const A uniform_part = smoothing > 0 ? A(dl * uniform) * (weight ? weight[t] : A(1)) : A(0);
    d[t] = from_float<T>(p - uniform_part - A(one_hot));
  }

  // The gradient of the probabilities, dloss * (1 - s) * w * (lse - z).
  void gradient_of_probabilities(int64_t r, int64_t begin, int64_t end, const Summary<A>& row) const {
    T* const d = (T*)a->dprobabilities + r * a->cols + begin;
    const Scores<T> z = logits(r);
    const A shift = row.exp.shift(), log_sum = A(row.exp.log_sum()), factor = A(dloss(r) * (1 - smoothing));
    for_row<A>(end - begin, [&](int64_t i, int k) FF_LAMBDA {
      vec_t<A> g = (log_sum - (z(begin + i, k) - shift)) * factor;
      if (weight) g *= load_n(weight + begin + i, k);
      store_n(d + i, g, k);
    });
  }
};

template <class T> static void forward_rows(const ff_cross_entropy_args* a) {
  using A = acc_t<T>;
  const Loss<T> of(a);
  const bool sums = a->probabilities || a->label_smoothing > 0;
  // Where the log-sum-exp is not wanted, an ignored row is not even read.
  auto skipped = [&](int64_t r) { return !a->lse && of.ignored(r); };
  auto first = [&](int64_t r, int64_t begin, int64_t end, Summary<A>& row) {
    if (skipped(r)) return;
    const T* const z = of.logits(r).x;
    if (!a->probabilities && !of.ignored(r)) row.target = to_float(z[a->target[r]]);
    row.origin = a->probabilities ? to_float(z[0]) : row.target;
    if (!std::isfinite(row.origin)) row.origin = 0;
    find_max<A>(of.logits(r), begin, end, row.exp);
  };
  auto second = [&](int64_t r, int64_t begin, int64_t end, Summary<A>& row) {
    if (skipped(r)) return;
    add_exponentials<A>(of.logits(r), begin, end, row.exp);
    if (sums && !of.ignored(r)) of.sums(r, begin, end, row);
  };
  auto finish = [&](int64_t r, int64_t begin, int64_t end, const Summary<A>& row) {
    const double lse = double(row.exp.max) + std::log(row.exp.sum);
    if (begin == 0) {
      if (a->lse) ((A*)a->lse)[r] = A(lse);
      if (a->loss) ((A*)a->loss)[r] = A(of.loss(r, row));
    }
    if (a->dprobabilities) of.gradient_of_probabilities(r, begin, end, row);
    if (a->dlogits)
      of.gradient(r, begin, end, row.exp.shift(), row.exp.sum, lse, a->probabilities ? row.total : of.uniform_total,
                  row.target);
  };
  reduce_rows<Summary<A>>(a->rows, a->cols, first, second, finish);
}

int cross_entropy_forward(const ff_cross_entropy_args* a, void*) {
  return for_dtype(a->dtype, [&](auto t) { return forward_rows<decltype(t)>(a), FF_OK; });
}

template <class T> static void backward_rows(const ff_cross_entropy_args* a) {
  using A = acc_t<T>;
  const Loss<T> of(a);
  const int64_t parts = parts_per_row(a->rows, a->cols);
  parallel_for(a->rows * parts, a->cols / parts, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; i++) {
      const int64_t r = i / parts, p = i % parts, begin = part_begin(a->cols, p, parts), t = a->target[r];
      const A lse = ((const A*)a->lse)[r];
      const int64_t end = part_begin(a->cols, p + 1, parts);
      // Only the part that holds the target uses it: another may have overwritten it, where dlogits are the logits.
      const A target = t >= begin && t < end ? to_float(of.logits(r).x[t]) : A(0);
      of.gradient(r, begin, end, lse, 1, double(lse), of.uniform_total, target);
    }
  });
}

int cross_entropy_backward(const ff_cross_entropy_args* a, void*) {
  if (a->probabilities) {
    ff_cross_entropy_args again = *a;
    again.loss = again.lse = nullptr;
    return cross_entropy_forward(&again, nullptr);
  }
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
  FF_REQUIRE(a->rows == 0 || a->logits, "logits: must not be NULL");
  FF_REQUIRE(a->rows == 0 || a->target || a->probabilities, "target, probabilities: one must not be NULL");
  FF_REQUIRE(!a->target || !a->probabilities, "target, probabilities: one must be NULL");
  FF_REQUIRE(!a->dprobabilities || a->probabilities, "dprobabilities: there are no probabilities");
  for (int64_t r = 0; a->target && r < a->rows; r++) {
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
  FF_REQUIRE(a->dloss || !a->dlogits || a->rows == 0, "dloss: must not be NULL beside dlogits");
  FF_REQUIRE(!a->dprobabilities, "dprobabilities: are written in backward");
  return FF_DISPATCH(cross_entropy_forward)(a, stream);
}

extern "C" int ff_cpu_cross_entropy_backward(const ff_cross_entropy_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->rows == 0 || (a->dloss && a->dlogits), "dloss, dlogits: must not be NULL");
  FF_REQUIRE(a->rows == 0 || a->lse || a->probabilities, "lse: must not be NULL");
  return FF_DISPATCH(cross_entropy_backward)(a, stream);
}
#endif
