// What attention's two directions share: checked sizes, the work of a query block, and the visible range of a query.
#pragma once
#include <cmath>
#include <limits>
#include <vector>

#include "tile.h"

namespace ff {
namespace FF_ISA {

// scale = sign * size. The sign (0 for scale 0) is packed into Q, exactly; the size multiplies whole scores, where it costs
// one rounding and no instruction (the subtraction of the maximum becomes a multiply-add), and the larger score before it
// is the larger one after it. Folded into Q whole, it would round every product.
struct Scale {
  double sign, size;
  explicit Scale(double scale) : sign(scale == 0 ? 0 : scale < 0 ? -1 : 1), size(scale == 0 ? 1 : std::abs(scale)) {}
};

// Keys a query may see under the causal rule: [0, visible_keys).
FF_INLINE int64_t visible_keys(const ff_attention_args* a, int64_t query) {
  if (!a->causal) return a->seqlen_k;
  return std::max<int64_t>(0, std::min(a->seqlen_k, query + 1 + a->seqlen_k - a->seqlen_q));
}

template <class T> FF_INLINE const T* at(const void* base, const int64_t (&stride)[3], int64_t b, int64_t h) {
  return (const T*)base + b * stride[0] + h * stride[1];
}
template <class T> FF_INLINE T* at(void* base, const int64_t (&stride)[3], int64_t b, int64_t h) {
  return (T*)base + b * stride[0] + h * stride[1];
}

// Additive mask of one batch: 0 where a key counts, -inf where it is padding.
template <class A> inline void padding_bias(const ff_attention_args* a, int64_t batch, A* bias) {
  const uint8_t* mask = a->key_padding_mask + batch * a->key_padding_mask_stride;
  for (int64_t j = 0; j < a->seqlen_k; j++) bias[j] = mask[j] ? -std::numeric_limits<A>::infinity() : A(0);
}

}  // namespace FF_ISA
}  // namespace ff
