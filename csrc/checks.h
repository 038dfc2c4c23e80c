// Errors, and what the CPU's and the CUDA functions both check about their arguments.
#pragma once
#include "include/fastformer.h"

namespace ff {

// Records a printf-style message for ff_last_error() and returns `status`.
int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));
#define FF_REQUIRE(condition, ...) \
  if (!(condition)) return ::ff::fail(FF_INVALID_ARGUMENT, __VA_ARGS__)

inline const char* dtype_name(int d) {
  static const char* names[] = {"float32", "bfloat16", "float16", "float64"};
  return d >= 0 && d < 4 ? names[d] : "unknown";
}

// Of ff_attention_args and ff_decode_attention_args.
template <class Args> int check_heads(const Args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->batch >= 0 && a->num_heads >= 1 && a->num_kv_heads >= 1 && a->num_heads % a->num_kv_heads == 0,
             "num_heads: %lld is not a multiple of num_kv_heads %lld", (long long)a->num_heads,
             (long long)a->num_kv_heads);
  FF_REQUIRE(a->head_dim >= 1 && a->head_dim <= 256 && a->head_dim_v >= 1 && a->head_dim_v <= 256,
             "head_dim: %lld, %lld are not in [1, 256]", (long long)a->head_dim, (long long)a->head_dim_v);
  FF_REQUIRE(a->softcap >= 0, "softcap: %g is negative", a->softcap);
  return FF_OK;
}

inline int check_attention(const ff_attention_args* a) {
  if (int status = check_heads(a)) return status;
  FF_REQUIRE(a->seqlen_q >= 0 && a->seqlen_k >= 0, "seqlen_q, seqlen_k: must not be negative");
  FF_REQUIRE(a->dropout_p >= 0 && a->dropout_p <= 1, "dropout_p: %g is not in [0, 1]", a->dropout_p);
  FF_REQUIRE(!a->bias || a->bias_dtype == a->dtype || (a->bias_dtype == FF_FLOAT32 && a->dtype != FF_FLOAT64),
             "bias_dtype: %s is neither the data's nor the accumulation's", dtype_name(a->bias_dtype));
  FF_REQUIRE(a->max_distance >= 0, "max_distance: %lld is negative", (long long)a->max_distance);
  FF_REQUIRE(!a->cu_seqlens_q == !a->cu_seqlens_k, "cu_seqlens_q, cu_seqlens_k: one without the other");
  FF_REQUIRE(!a->cu_seqlens_q || !(a->mask || a->bias || a->key_padding_mask),
             "mask, bias, key_padding_mask: must be NULL beside cu_seqlens");
  FF_REQUIRE(a->batch * a->seqlen_q == 0 || (a->q && a->out), "q, out: must not be NULL");
  FF_REQUIRE(a->batch * a->seqlen_k == 0 || (a->k && a->v), "k, v: must not be NULL");
  return FF_OK;
}

inline int check_attention_backward(const ff_attention_args* a) {
  if (int status = check_attention(a)) return status;
  FF_REQUIRE(a->batch * a->seqlen_q == 0 || (a->lse && a->dout && a->dq), "lse, dout, dq: must not be NULL");
  FF_REQUIRE(a->batch * a->seqlen_k == 0 || (a->dk && a->dv), "dk, dv: must not be NULL");
  FF_REQUIRE(!a->dbias || a->bias, "dbias: there is no bias");
  FF_REQUIRE(!a->ddistance_bias || a->distance_bias, "ddistance_bias: there is no distance_bias");
  return FF_OK;
}

// Without the pointers, which whoever asks a GPU for the size of the workspace need not have.
inline int check_decode_attention(const ff_decode_attention_args* a) {
  if (int status = check_heads(a)) return status;
  FF_REQUIRE(a->seqlen_q >= 0 && a->capacity >= 0 && a->cache_rows >= 0, "sizes: must not be negative");
  FF_REQUIRE(!a->page_table || a->page_size >= 1, "page_size: must be positive");
  FF_REQUIRE(!a->page_table || (!a->cache_batch_idx && a->capacity % a->page_size == 0),
             "page_table: goes with whole pages and without cache_batch_idx");
  return FF_OK;
}
inline int check_decode_attention_pointers(const ff_decode_attention_args* a) {
  FF_REQUIRE(a->batch == 0 || a->cache_seqlens, "cache_seqlens: must not be NULL");
  FF_REQUIRE(a->batch * a->seqlen_q == 0 || (a->q && a->out), "q, out: must not be NULL");
  FF_REQUIRE(a->capacity * a->cache_rows == 0 || (a->k_cache && a->v_cache), "k_cache, v_cache: must not be NULL");
  return FF_OK;
}

}  // namespace ff
