// Rotary position embedding on the CPU; the formula is in fastformer.h.
//
// Floor: q and k read once and written once. Rows are walked in the order they lie in memory: where positions follow each
// other the table's rows stream along from L2, where a position's heads do, its row stays in L1 for all of them.
#include "rows.h"

FF_DECLARE_IMPL(rotary)

namespace ff {
namespace FF_ISA {

// Even and odd elements of two vectors in order, and back.
template <class A> FF_INLINE Pair<A> unzip(Pair<A> v) {
  using index_t = typename std::conditional<sizeof(A) == 8, i64v, i32v>::type;
  constexpr int W = vec<A>::W;
  index_t even, odd;
  for (int l = 0; l < W; l++) even[l] = 2 * l, odd[l] = 2 * l + 1;
  return {__builtin_shuffle(v.first, v.second, even), __builtin_shuffle(v.first, v.second, odd)};
}
template <class A> FF_INLINE Pair<A> zip(Pair<A> v) {
  using index_t = typename std::conditional<sizeof(A) == 8, i64v, i32v>::type;
  constexpr int W = vec<A>::W;
  index_t low, high;
  for (int l = 0; l < W; l++) low[l] = l % 2 * W + l / 2, high[l] = l % 2 * W + (l + W) / 2;
  return {__builtin_shuffle(v.first, v.second, low), __builtin_shuffle(v.first, v.second, high)};
}

// Turns (x0, x1) by the angles.
template <class V> FF_INLINE void turn(V& x0, V& x1, V cos, V sin) {
  const V y0 = x0 * cos - x1 * sin;
  x1 = x1 * cos + x0 * sin;
  x0 = y0;
}

template <bool Interleaved, class T, class P>
FF_INLINE void rotate_row(const T* x, T* out, const P* cos, const P* sin, acc_t<T> sign, int64_t half, int64_t head_dim) {
  using A = acc_t<T>;
  constexpr int W = vec<A>::W;
  if constexpr (Interleaved) {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
      Pair<A> v = load_pair(x + 2 * i);  // bfloat16's pairs are the even and the odd elements already
      if (kInOrder<T>) v = unzip(v);
      turn(v.first, v.second, load(cos + i), load(sin + i) * sign);
      if (kInOrder<T>) v = zip(v);
      store_pair(out + 2 * i, v);
    }
    for (; i < half; i++) {
      A x0 = to_float(x[2 * i]), x1 = to_float(x[2 * i + 1]);
      turn(x0, x1, A(to_float(cos[i])), A(to_float(sin[i])) * sign);
      out[2 * i] = from_float<T>(x0), out[2 * i + 1] = from_float<T>(x1);
    }
  } else {
    for_row<A>(half, [&](int64_t i, int k) FF_LAMBDA {
      vec_t<A> x0 = load_n(x + i, k), x1 = load_n(x + half + i, k);
      turn(x0, x1, load_n(cos + i, k), load_n(sin + i, k) * sign);
      store_n(out + i, x0, k), store_n(out + half + i, x1, k);
    });
  }
  if (out != x && 2 * half < head_dim)
    memcpy((void*)(out + 2 * half), x + 2 * half, size_t(head_dim - 2 * half) * sizeof(T));
}

FF_INLINE int64_t position(const ff_rotary_args* a, int64_t b, int64_t s) {
  if (a->position_ids) return a->position_ids[b * a->position_ids_stride[0] + s * a->position_ids_stride[1]];
  return a->offset + b * a->batch_offset + s;
}

template <bool Interleaved, class T, class P>
static void rotate(const ff_rotary_args* a, const T* x, const int64_t* stride, T* out, const int64_t* out_stride,
                   int64_t heads) {
  const acc_t<T> sign = a->inverse ? -1 : 1;
  const int64_t S = a->seqlen;
  auto row = [&](int64_t b, int64_t h, int64_t s) FF_LAMBDA {
    const int64_t p = position(a, b, s);
    rotate_row<Interleaved>(x + b * stride[0] + h * stride[1] + s * stride[2],
                            out + b * out_stride[0] + h * out_stride[1] + s * out_stride[2],
                            (const P*)a->cos + p * a->cos_stride, (const P*)a->sin + p * a->sin_stride, sign,
                            a->rotary_dim / 2, a->head_dim);
  };
  if (stride[1] > stride[2] && a->batch * heads >= num_threads(a->batch * heads * S * a->head_dim))
    parallel_for(a->batch * heads, S * a->head_dim, [&](int64_t begin, int64_t end, int) {
      for (int64_t l = begin; l < end; l++)
        for (int64_t s = 0; s < S; s++) row(l / heads, l % heads, s);
    });
  else
    parallel_for(a->batch * S, heads * a->head_dim, [&](int64_t begin, int64_t end, int) {
      for (int64_t l = begin; l < end; l++)
        for (int64_t h = 0; h < heads; h++) row(l / S, h, l % S);
    });
}

int rotary(const ff_rotary_args* a, void*) {
  return for_dtypes(a->dtype, a->table_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    for_bool(a->interleaved, [&](auto interleaved) {
      constexpr bool I = decltype(interleaved)::value;
      rotate<I, T, decltype(p)>(a, (const T*)a->q, a->q_stride, (T*)a->q_out, a->q_out_stride, a->num_heads);
      if (a->k)
        rotate<I, T, decltype(p)>(a, (const T*)a->k, a->k_stride, (T*)a->k_out, a->k_out_stride, a->num_kv_heads);
    });
    return FF_OK;
  });
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
extern "C" int ff_cpu_rotary(const ff_rotary_args* a, void* stream) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->batch >= 0 && a->num_heads >= 0 && a->num_kv_heads >= 0 && a->seqlen >= 0 && a->head_dim >= 1,
             "batch, num_heads, num_kv_heads, seqlen, head_dim: one is out of range");
  FF_REQUIRE(a->rotary_dim >= 2 && a->rotary_dim % 2 == 0 && a->rotary_dim <= a->head_dim,
             "rotary_dim: %lld is odd, or not in [2, %lld]", (long long)a->rotary_dim, (long long)a->head_dim);
  if (a->batch == 0 || a->seqlen == 0) return FF_OK;
  FF_REQUIRE(a->q && a->q_out && !a->k == !a->k_out && a->cos && a->sin, "q, q_out, k, k_out, cos, sin: one is NULL");
  const int64_t batches = a->position_ids && a->position_ids_stride[0] == 0 ? 1 : a->batch;
  for (int64_t b = 0; b < batches; b++)
    for (int64_t s = 0; s < a->seqlen; s++) {
      const int64_t p = ff::FF_ISA::position(a, b, s);
      FF_REQUIRE(p >= 0 && p < a->positions, "position_ids: %lld at (%lld, %lld) is not in [0, %lld)", (long long)p,
                 (long long)b, (long long)s, (long long)a->positions);
    }
  return FF_DISPATCH(rotary)(a, stream);
}
#endif
