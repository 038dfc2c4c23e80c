// Python's arguments of decode_attention -> ff_decode_attention_args.
#pragma once
#include "attention_args.h"

namespace ff {

// sizes (B, Hq, Hkv, Sq, D, Dv, rows or pages of the cache, capacity, page_size), pointers (q, k_cache, v_cache, out,
// lse), strides of the first four as torch has them, indices (cache_seqlens, cache_leftpad, cache_batch_idx,
// page_table, between its rows, alibi_slopes, between its batches).
inline ff_decode_attention_args decode_attention_args(int dtype, const pybind11::tuple& sizes, double scale,
                                                      double softcap, bool causal, int64_t window_left,
                                                      int64_t window_right, const pybind11::tuple& pointers,
                                                      const pybind11::tuple& strides, const pybind11::tuple& indices) {
  if (sizes.size() != 9 || pointers.size() != 5 || strides.size() != 4 || indices.size() != 7)
    throw pybind11::value_error("sizes, pointers, strides, indices: expected 9, 5, 4 and 7");
  ff_decode_attention_args a{};
  int64_t* fields[] = {&a.batch,      &a.num_heads,  &a.num_kv_heads, &a.seqlen_q, &a.head_dim,
                       &a.head_dim_v, &a.cache_rows, &a.capacity,     &a.page_size};
  for (size_t i = 0; i < 9; i++) *fields[i] = sizes[i].cast<int64_t>();
  a.dtype = ff_dtype(dtype), a.scale = scale, a.softcap = softcap, a.causal = causal;
  a.window_left = window_left, a.window_right = window_right, a.windowed = window_left >= 0 || window_right >= 0;
  a.q = as_pointer<const void>(pointers[0]), a.k_cache = as_pointer<const void>(pointers[1]);
  a.v_cache = as_pointer<const void>(pointers[2]), a.out = as_pointer<void>(pointers[3]);
  a.lse = as_pointer<void>(pointers[4]);
  int64_t(*to[])[3] = {&a.q_stride, &a.k_stride, &a.v_stride, &a.out_stride};
  for (size_t i = 0; i < 4; i++) set_strides(*to[i], strides[i].cast<pybind11::tuple>());
  a.cache_seqlens = as_pointer<const int32_t>(indices[0]);
  a.cache_leftpad = as_pointer<const int32_t>(indices[1]);
  a.cache_batch_idx = as_pointer<const int32_t>(indices[2]);
  a.page_table = as_pointer<const int32_t>(indices[3]);
  a.page_table_stride = indices[4].cast<int64_t>();
  a.alibi_slopes = as_pointer<const float>(indices[5]), a.alibi_stride = indices[6].cast<int64_t>();
  return a;
}

}  // namespace ff
