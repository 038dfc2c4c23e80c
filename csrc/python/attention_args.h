// Python's arguments of attention -> ff_attention_args, for the CPU's and the CUDA module.
//
// What every call has comes as plain arguments. What most calls leave away comes as one tuple, or None: looking at
// thirty more arguments would cost a small call more than its kernel.
#pragma once
#include <pybind11/pybind11.h>

#include "../include/fastformer.h"

namespace ff {

using Ptr = uintptr_t;
// Of a 4-d tensor, as torch's stride() has them: the first N.
template <size_t N> void set_strides(int64_t (&to)[N], const pybind11::tuple& strides) {
  if (strides.size() != 4) throw pybind11::value_error("strides: expected four");
  for (size_t i = 0; i < N; i++) to[i] = strides[i].cast<int64_t>();
}
template <class T> T* as_pointer(pybind11::handle p) { return reinterpret_cast<T*>(p.cast<Ptr>()); }

// (B, Hq, Hkv, Sq, Sk, D, Dv)
inline ff_attention_args attention_sizes(int dtype, const pybind11::tuple& sizes, double scale, bool causal) {
  ff_attention_args a{};
  int64_t* fields[] = {&a.batch, &a.num_heads, &a.num_kv_heads, &a.seqlen_q, &a.seqlen_k, &a.head_dim, &a.head_dim_v};
  if (sizes.size() != 7) throw pybind11::value_error("sizes: expected (B, Hq, Hkv, Sq, Sk, D, Dv)");
  for (size_t i = 0; i < 7; i++) *fields[i] = sizes[i].cast<int64_t>();
  a.dtype = ff_dtype(dtype), a.scale = scale, a.causal = causal;
  return a;
}

// The fields from key_padding_mask and top_left on, in the order of backends/attention_call.py's `extras`.
inline void set_extras(ff_attention_args& a, const pybind11::object& extras) {
  if (extras.is_none()) return;
  const auto t = extras.cast<pybind11::tuple>();
  size_t i = 0;
  auto integer = [&] { return t[i++].cast<int64_t>(); };
  auto strides = [&](int64_t (&to)[4]) { set_strides(to, t[i++].cast<pybind11::tuple>()); };
  a.key_padding_mask = as_pointer<const uint8_t>(t[i++]);
  a.key_padding_mask_stride = integer();
  a.top_left = int(integer());
  a.window_left = integer(), a.window_right = integer();
  a.windowed = a.window_left >= 0 || a.window_right >= 0;
  a.softcap = t[i++].cast<double>();
  a.dropout_p = t[i++].cast<double>();
  a.seed = t[i++].cast<uint64_t>();
  a.mask = as_pointer<const uint8_t>(t[i++]);
  strides(a.mask_stride);
  a.bias = as_pointer<const void>(t[i++]);
  a.bias_dtype = ff_dtype(integer());
  strides(a.bias_stride);
  a.distance_bias = as_pointer<const void>(t[i++]);
  a.max_distance = integer();
  a.alibi_slopes = as_pointer<const float>(t[i++]);
  a.alibi_stride = integer();
  a.cu_seqlens_q = as_pointer<const int32_t>(t[i++]);
  a.cu_seqlens_k = as_pointer<const int32_t>(t[i++]);
  a.total_q = integer(), a.total_k = integer();
  a.dbias = as_pointer<void>(t[i++]);
  strides(a.dbias_stride);
  a.ddistance_bias = as_pointer<void>(t[i++]);
}

}  // namespace ff
