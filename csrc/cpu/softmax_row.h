// The running softmax of one attention row whose keys come block by block (Milakov & Gimelshein 2018, arXiv:1805.02867):
// with m the largest score so far and z the sum of exp(s - m), a block with maximum m' shrinks what came before by
// exp(m - max(m, m')).
#pragma once
#include <cmath>

#include "cpu.h"

namespace ff {
namespace FF_ISA {

// What a row has gathered so far: out = o / sum with scores relative to max.
template <class A> struct Row {
  A max = -std::numeric_limits<A>::infinity(), sum = 0;

  // Turns the scores s[begin, end), in whole vectors, into exp(scale s - max) in place and adds them to the sum; returns the
  // factor by which the row's earlier output has to shrink. `padding` is 0, or -inf where a key is ignored.
  FF_INLINE A add(A* s, A scale, int64_t begin, int64_t end, const A* padding = nullptr) {
    constexpr int W = vec<A>::W;
    constexpr A kInf = std::numeric_limits<A>::infinity();
    vec_t<A> m = splat(-kInf);
    if (padding)
      for (int64_t i = begin; i < end; i += W) {
        vec_t<A> v = load(s + i) + load(padding + i);  // the same before and after the scale
        store(s + i, v);
        m = vmax(m, v);
      }
    else
      for (int64_t i = begin; i < end; i += W) m = vmax(m, load(s + i));
    const A top = std::max(max, scale * hmax(m));
    const A shift = top == -kInf ? A(0) : top;  // a row that has seen no key yet: all terms exp(-inf) = 0
    vec_t<A> total{};
    for (int64_t i = begin; i < end; i += W) {
      const vec_t<A> p = vexp_below(load(s + i), scale, shift);
      store(s + i, p);
      total += p;
    }
    const A factor = max == -kInf ? A(0) : std::exp(max - shift);
    sum = sum * factor + hsum(total);
    max = top;
    return factor;
  }

  // out[0, n) = o / sum, and the log-sum-exp where that is asked for. A row without keys gives zeros and -inf.
  template <class T> FF_INLINE void write(const A* o, int64_t n, T* out, A* lse) const {
    constexpr int W = vec<A>::W;
    const bool nan = std::isnan(sum);  // a NaN among the inputs stays visible
    if (lse)
      *lse = nan ? sum : sum > 0 ? A(double(max) + std::log(double(sum))) : -std::numeric_limits<A>::infinity();
    const A inverse = nan ? sum : sum > 0 ? 1 / sum : A(0);
    int64_t c = 0;
    for (; c + W <= n; c += W) store(out + c, load(o + c) * inverse);
    if (c < n) store_partial(out + c, load(o + c) * inverse, int(n - c));
  }
};

}  // namespace FF_ISA
}  // namespace ff
