// What attention's two directions share: where a sequence lies, which keys a query sees, what is added to its scores.
#pragma once
#include <cmath>
#include <limits>

#include "tile.h"

// Forward of a few queries (decode_attention.cpp), which reads keys and values as they lie.
FF_DECLARE_IMPL_OF(attention_forward, attention_of_few_queries)
FF_DECLARE_IMPL_OF(attention_forward_workspace, attention_of_few_queries_workspace)

namespace ff {
namespace FF_ISA {

// scale = sign * size. The sign (0 for scale 0) is packed into Q, exactly; the size multiplies whole scores, where it costs
// one rounding and no instruction (the subtraction of the maximum becomes a multiply-add), and the larger score before it
// is the larger one after it. Folded into Q whole, it would round every product.
struct Scale {
  double sign, size;
  explicit Scale(double scale) : sign(scale == 0 ? 0 : scale < 0 ? -1 : 1), size(scale == 0 ? 1 : std::abs(scale)) {}
};

struct Range {
  int64_t begin, end;
};

// One sequence of the batch: its positions are [first_q, first_q + seqlen_q) of q where sequences are packed, else
// first_q is 0; query i sits at position i + offset among the keys.
struct Sequence {
  int64_t index, first_q, first_k, seqlen_q, seqlen_k, offset;
  Sequence(const ff_attention_args* a, int64_t b)
      : index(b), first_q(0), first_k(0), seqlen_q(a->seqlen_q), seqlen_k(a->seqlen_k) {
    if (a->cu_seqlens_q) {
      first_q = a->cu_seqlens_q[b], seqlen_q = a->cu_seqlens_q[b + 1] - first_q;
      first_k = a->cu_seqlens_k[b], seqlen_k = a->cu_seqlens_k[b + 1] - first_k;
    }
    offset = a->top_left ? 0 : seqlen_k - seqlen_q;
  }
  // The number of query 0's row in lse and in the dropout mask.
  int64_t row(const ff_attention_args* a, int64_t h) const {
    return a->cu_seqlens_q ? h * a->total_q + first_q : (index * a->num_heads + h) * a->seqlen_q;
  }
  // Keys that causality and the window leave to a query: both ends never decrease from one query to the next.
  FF_INLINE Range visible(const ff_attention_args* a, int64_t query) const {
    const int64_t p = query + offset;
    Range r{0, seqlen_k};
    if (a->causal) r.end = std::min(r.end, p + 1);
    if (a->windowed) {
      if (a->window_right >= 0) r.end = std::min(r.end, p + a->window_right + 1);
      if (a->window_left >= 0) r.begin = std::max(r.begin, p - a->window_left);
    }
    r.begin = std::min(r.begin, seqlen_k);
    r.end = std::max(r.end, r.begin);
    return r;
  }
};

// Position 0 of one head of one sequence.
template <class T>
FF_INLINE T* at(const ff_attention_args* a, const void* base, const int64_t (&stride)[3], const Sequence& s, int64_t h,
                int64_t first) {
  return (T*)base + (a->cu_seqlens_q ? 0 : s.index * stride[0]) + h * stride[1] + first * stride[2];
}

// How the visible scores are dealt out to threads: in the order (sequence, head, block of `rows` queries), each block
// weighing its keys and a constant for what every block costs.
struct Shares {
  const ff_attention_args* a;
  int64_t rows, heads;
  int64_t block(const Sequence& s, int64_t first) const {
    const int64_t last = std::min(first + rows, s.seqlen_q) - 1;
    return 16 + s.visible(a, last).end - s.visible(a, first).begin;
  }
  int64_t head(const Sequence& s) const {
    int64_t sum = 16;  // a head without queries still has to be looked at
    for (int64_t i = 0; i < s.seqlen_q; i += rows) sum += block(s, i);
    return sum;
  }
  int64_t total() const {
    if (!a->cu_seqlens_q) return a->batch > 0 ? a->batch * heads * head(Sequence(a, 0)) : 0;
    int64_t sum = 0;
    for (int64_t b = 0; b < a->batch; b++) sum += heads * head(Sequence(a, b));
    return sum;
  }
  // Calls f(sequence, head, where the head begins in the whole) for every head that overlaps [begin, end).
  template <class F> void heads_in(int64_t begin, int64_t end, F f) const {
    int64_t start = 0, of_one = 0;
    for (int64_t b = 0; b < a->batch && start < end; b++) {
      const Sequence s(a, b);
      if (b == 0 || a->cu_seqlens_q) of_one = head(s);
      if (start + heads * of_one > begin)
        for (int64_t h = std::max<int64_t>(0, (begin - start) / of_one); h < heads && start + h * of_one < end; h++)
          f(s, h, start + h * of_one);
      start += heads * of_one;
    }
  }
};

// Decides how many threads are worth waking: two products over a head dimension of 64 take the time of 8 elements of a
// row operation.
inline int64_t work_of_scores(const ff_attention_args* a) {
  int64_t keys = a->seqlen_k + 1;
  if (a->windowed && a->window_left >= 0 && (a->causal || a->window_right >= 0))
    keys = std::min(keys, a->window_left + std::max<int64_t>(a->window_right, 0) + 1);
  const int64_t queries = a->cu_seqlens_q ? a->total_q : a->batch * a->seqlen_q;
  const int64_t scores = a->num_heads * queries * keys / (a->causal ? 2 : 1);
  return scores * (a->head_dim + a->head_dim_v) / 16;
}

// Calls f(T{}) with the storage type of the call's dtype. The instruction sets with bfloat16 products have kernels of that
// dtype alone; the entry points leave the others to avx512's.
template <class F> int for_attention_dtype(const ff_attention_args* a, F f) {
#if FF_BF16_DOT
  return f(bf16{});
#else
  return for_dtype(a->dtype, f);
#endif
}
#if FF_BF16_DOT
#define FF_LEAVE_OTHER_DTYPES(call) \
  if (a->dtype != FF_BFLOAT16) return ::ff::avx512::call
#else
#define FF_LEAVE_OTHER_DTYPES(call) (void)0
#endif

// Room for n operands, in accumulators.
template <class E, class A> constexpr int64_t room(int64_t n) {
  return (n * int64_t(sizeof(E)) + int64_t(sizeof(A)) - 1) / int64_t(sizeof(A));
}

inline bool has_line(const ff_attention_args* a) { return a->distance_bias || a->alibi_slopes; }

// What is added to one head's scores. `line` is the part that depends on the distance alone, for every distance that
// occurs: T5's and ALiBi's biases take memory for one row, not for a matrix. `padding` is 0, or -inf where a key is
// ignored. Both have room for a vector beyond their end.
template <class T> struct Additions {
  using A = acc_t<T>;
  static constexpr int W = vec<A>::W;
  const ff_attention_args* a;
  A *line, *padding;
  int64_t batch = -1, head = -1;
  const Sequence* s = nullptr;

  static int64_t line_size(const ff_attention_args* a) { return has_line(a) ? a->seqlen_q + a->seqlen_k + 2 * W : 0; }
  static int64_t padding_size(const ff_attention_args* a) { return a->key_padding_mask ? a->seqlen_k + 128 + W : 0; }

  // Index in `line` of distance 0.
  int64_t zero() const { return s->seqlen_q - 1 + s->offset; }

  void start(const Sequence& sequence, int64_t h) {
    s = &sequence;
    if (batch == s->index && head == h) return;
    if (a->key_padding_mask && batch != s->index) {
      const uint8_t* mask = a->key_padding_mask + s->index * a->key_padding_mask_stride;
      for (int64_t j = 0; j < s->seqlen_k; j++) padding[j] = mask[j] ? -std::numeric_limits<A>::infinity() : A(0);
      std::fill(padding + s->seqlen_k, padding + a->seqlen_k + 128 + W, -std::numeric_limits<A>::infinity());
    }
    batch = s->index, head = h;
    if (!has_line(a) || s->seqlen_q == 0) return;
    of_distances(a, batch, h, -zero(), s->seqlen_q + s->seqlen_k + 2 * W, line);
  }

  // What depends on the distance, for n distances from `first` on.
  static void of_distances(const ff_attention_args* a, int64_t b, int64_t h, int64_t first, int64_t n, A* to) {
    const A slope = a->alibi_slopes ? A(a->alibi_slopes[b * a->alibi_stride + h]) : A(0);
    const int64_t M = a->max_distance;
    const A* by_distance = a->distance_bias ? (const A*)a->distance_bias + h * (2 * M + 1) + M : nullptr;
    for (int64_t i = 0; i < n; i++) {
      const int64_t d = first + i;
      to[i] = -slope * A(std::abs(d)) + (by_distance ? by_distance[std::max(-M, std::min(d, M))] : A(0));
    }
  }

  // Whether anything is added but what padding does.
  static bool any(const ff_attention_args* a) { return has_line(a) || a->bias || a->mask || a->softcap > 0; }

  // scores[0 .. n) of query i and the keys from j on: cap(scale s) plus everything that is added. With a cap, its tanh is
  // written to `tanh` where that is given. Writes whole vectors.
  FF_INLINE void add(A* scores, A scale, int64_t i, int64_t j, int64_t n, A* tanh) const {
    const A* of_line = has_line(a) ? line + zero() - (i + s->offset) + j : nullptr;
    add_row(a, s->index, head, i, j, n, of_line, a->key_padding_mask ? padding + j : nullptr, scores, scale, tanh);
  }
  static FF_NOINLINE void add_row(const ff_attention_args* a, int64_t b, int64_t h, int64_t i, int64_t j, int64_t n,
                                  const A* of_line, const A* of_padding, A* scores, A scale, A* tanh) {
    const uint8_t* mask = nullptr;
    if (a->mask) mask = a->mask + b * a->mask_stride[0] + h * a->mask_stride[1] + i * a->mask_stride[2] + j;
    const int64_t bias_at = b * a->bias_stride[0] + h * a->bias_stride[1] + i * a->bias_stride[2] + j;
    const T* bias = a->bias && a->bias_dtype == a->dtype ? (const T*)a->bias + bias_at : nullptr;
    const A* bias_acc = a->bias && !bias ? (const A*)a->bias + bias_at : nullptr;
    const A cap = A(a->softcap), inverse_cap = a->softcap > 0 ? A(1 / a->softcap) : A(0);
    for (int64_t c = 0; c < n; c += W) {
      const int k = int(std::min<int64_t>(W, n - c));
      vec_t<A> z = load(scores + c) * scale;
      if (a->softcap > 0) {
        const vec_t<A> t = vtanh(z * inverse_cap);
        if (tanh) store(tanh + c, t);
        z = t * cap;
      }
      if (of_line) z += load(of_line + c);
      if (bias) z += k == W ? load(bias + c) : load_partial(bias + c, k);
      if (bias_acc) z += k == W ? load(bias_acc + c) : load_partial(bias_acc + c, k);
      if (of_padding) z += load(of_padding + c);
      if (mask) z = hide_unless<A>(z, mask + c, k);
      store(scores + c, z);
    }
  }
};

}  // namespace FF_ISA
}  // namespace ff
