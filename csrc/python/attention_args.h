// Python's arguments of the attention functions -> the structs of fastformer.h, for the CPU's and the CUDA module.
//
// Tensors come as they are, what a call asks for beside them as the tuple `Options` of backends/attention_options.py.
// Their shapes agree: fastformer/functional has checked them.
#pragma once
#include "tensor.h"

namespace ff {

// Where the fields of Options stand in it.
enum Option {
  kScale,
  kCausal,
  kKeyPaddingMask,
  kMask,
  kBias,
  kDistanceBias,
  kAlibiSlopes,
  kTopLeft,
  kWindowLeft,
  kWindowRight,
  kSoftcap,
  kDropoutP,
  kSeed,
  kCuSeqlensQ,
  kCuSeqlensK,
  kMaxSeqlenQ,
  kMaxSeqlenK,
  kOptions
};

// q, k, v, out as (B, H, S, D); lse contiguous or None.
inline ff_attention_args attention_args(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                        const Tensor& lse) {
  ff_attention_args a{};
  a.dtype = ff_dtype(q.dtype);
  a.batch = q.shape[0], a.num_heads = q.shape[1], a.num_kv_heads = k.shape[1];
  a.seqlen_q = q.shape[2], a.seqlen_k = k.shape[2], a.head_dim = q.shape[3], a.head_dim_v = v.shape[3];
  a.q = q.data, a.k = k.data, a.v = v.data, a.out = out.data, a.lse = lse.data;
  q.strides_to(a.q_stride), k.strides_to(a.k_stride), v.strides_to(a.v_stride), out.strides_to(a.out_stride);
  a.window_left = a.window_right = -1;
  return a;
}

// Of the tuples (q, k, v, out, lse) and Options.
inline ff_attention_args attention_args(const pybind11::tuple& tensors, const pybind11::tuple& options) {
  if (tensors.size() != 5) throw pybind11::value_error("tensors: expected (q, k, v, out, lse)");
  if (options.size() != kOptions) throw pybind11::value_error("options: not the Options of attention_options.py");
  const Tensor q(tensors[0]), k(tensors[1]), v(tensors[2]), out(tensors[3]), lse(tensors[4]);
  ff_attention_args a = attention_args(q, k, v, out, lse);
  auto real = [&](Option i) { return options[i].cast<double>(); };
  auto integer = [&](Option i) { return options[i].cast<int64_t>(); };
  a.scale = real(kScale), a.causal = options[kCausal].cast<bool>(), a.top_left = options[kTopLeft].cast<bool>();
  a.window_left = integer(kWindowLeft), a.window_right = integer(kWindowRight);
  a.windowed = a.window_left >= 0 || a.window_right >= 0;
  a.softcap = real(kSoftcap), a.dropout_p = real(kDropoutP);
  if (a.dropout_p > 0) a.seed = options[kSeed].cast<uint64_t>();
  const Tensor padding(options[kKeyPaddingMask]), mask(options[kMask]), bias(options[kBias]);
  const Tensor distance(options[kDistanceBias]), slopes(options[kAlibiSlopes]);
  const Tensor cu_q(options[kCuSeqlensQ]), cu_k(options[kCuSeqlensK]);
  a.key_padding_mask = padding.as<const uint8_t>(), a.key_padding_mask_stride = padding.stride[0];
  a.mask = mask.as<const uint8_t>(), mask.broadcast_strides_to(a.mask_stride);
  a.bias = bias.data, bias.broadcast_strides_to(a.bias_stride);
  if (bias.data) {
    if (bias.dtype != q.dtype && (bias.dtype != FF_FLOAT32 || q.dtype == FF_FLOAT64))
      throw pybind11::type_error("bias: its dtype is neither the data's nor the accumulation dtype");
    a.bias_dtype = ff_dtype(bias.dtype);
  }
  a.distance_bias = distance.data, a.max_distance = distance.shape[1] / 2;
  a.alibi_slopes = slopes.as<const float>(), a.alibi_stride = slopes.shape[0] == 1 ? 0 : slopes.stride[0];
  if (cu_q.data) {
    a.cu_seqlens_q = cu_q.as<const int32_t>(), a.cu_seqlens_k = cu_k.as<const int32_t>();
    a.total_q = a.seqlen_q, a.total_k = a.seqlen_k;
    a.batch = cu_q.shape[0] - 1;
    a.seqlen_q = integer(kMaxSeqlenQ), a.seqlen_k = integer(kMaxSeqlenK);
  }
  return a;
}

// Of the tuple (dout, dlse, dq, dk, dv, dbias, ddistance_bias).
inline void set_gradients(ff_attention_args& a, const pybind11::tuple& gradients) {
  if (gradients.size() != 7) throw pybind11::value_error("gradients: expected seven");
  const Tensor dout(gradients[0]), dlse(gradients[1]), dq(gradients[2]), dk(gradients[3]), dv(gradients[4]);
  const Tensor dbias(gradients[5]), ddistance_bias(gradients[6]);
  a.dout = dout.data, a.dlse = dlse.data, a.dq = dq.data, a.dk = dk.data, a.dv = dv.data;
  dout.strides_to(a.dout_stride), dq.strides_to(a.dq_stride);
  dk.strides_to(a.dk_stride), dv.strides_to(a.dv_stride);
  a.dbias = dbias.data, dbias.broadcast_strides_to(a.dbias_stride);
  a.ddistance_bias = ddistance_bias.data;
}

// Where the fields of DecodeOptions stand in it.
enum DecodeOption {
  kDecodeScale,
  kDecodeCausal,
  kDecodeWindowLeft,
  kDecodeWindowRight,
  kDecodeSoftcap,
  kDecodeAlibiSlopes,
  kDecodePageTable,
  kDecodeCacheBatchIdx,
  kDecodeCacheLeftpad,
  kDecodeOptions
};

// Of the tuples (q, k_cache, v_cache, out, lse, cache_seqlens) and DecodeOptions.
inline ff_decode_attention_args decode_attention_args(const pybind11::tuple& tensors, const pybind11::tuple& options) {
  if (tensors.size() != 6) throw pybind11::value_error("tensors: expected (q, k_cache, v_cache, out, lse, cache_seqlens)");
  if (options.size() != kDecodeOptions)
    throw pybind11::value_error("options: not the DecodeOptions of attention_options.py");
  const Tensor q(tensors[0]), k_cache(tensors[1]), v_cache(tensors[2]), out(tensors[3]), lse(tensors[4]);
  const Tensor cache_seqlens(tensors[5]), alibi_slopes(options[kDecodeAlibiSlopes]);
  const Tensor page_table(options[kDecodePageTable]), cache_batch_idx(options[kDecodeCacheBatchIdx]);
  const Tensor cache_leftpad(options[kDecodeCacheLeftpad]);
  ff_decode_attention_args a{};
  a.dtype = ff_dtype(q.dtype), a.scale = options[kDecodeScale].cast<double>();
  a.softcap = options[kDecodeSoftcap].cast<double>(), a.causal = options[kDecodeCausal].cast<bool>();
  a.window_left = options[kDecodeWindowLeft].cast<int64_t>(), a.window_right = options[kDecodeWindowRight].cast<int64_t>();
  a.windowed = a.window_left >= 0 || a.window_right >= 0;
  a.batch = q.shape[0], a.num_heads = q.shape[1], a.seqlen_q = q.shape[2], a.head_dim = q.shape[3];
  a.cache_rows = v_cache.shape[0], a.num_kv_heads = v_cache.shape[1], a.capacity = v_cache.shape[2];
  a.head_dim_v = v_cache.shape[3];
  a.q = q.data, a.k_cache = k_cache.data, a.v_cache = v_cache.data, a.out = out.data, a.lse = lse.data;
  q.strides_to(a.q_stride), k_cache.strides_to(a.k_stride), v_cache.strides_to(a.v_stride);
  out.strides_to(a.out_stride);
  a.cache_seqlens = cache_seqlens.as<const int32_t>(), a.cache_leftpad = cache_leftpad.as<const int32_t>();
  a.cache_batch_idx = cache_batch_idx.as<const int32_t>();
  if (page_table.data) {
    a.page_table = page_table.as<const int32_t>(), a.page_table_stride = page_table.stride[0];
    a.page_size = a.capacity, a.capacity *= page_table.shape[1];
  }
  a.alibi_slopes = alibi_slopes.as<const float>();
  a.alibi_stride = alibi_slopes.shape[0] == 1 ? 0 : alibi_slopes.stride[0];
  return a;
}

}  // namespace ff
