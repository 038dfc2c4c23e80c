// Python's arguments of embedding and rotary -> the structs of fastformer.h, for the CPU's and the CUDA module.
#pragma once
#include "row_args.h"

namespace ff {

// `tables`: up to three tuples (weight (rows, cols), ids (period) or None, period, offset, padding_idx).
inline ff_embedding_args embedding_args(const pybind11::tuple& tables, int64_t rows, double scale, bool normalize,
                                        double eps, double dropout_p, uint64_t seed, const Tensor& weight,
                                        const Tensor& bias, const Tensor& mean, const Tensor& rstd) {
  ff_embedding_args a{};
  a.num_tables = int(tables.size());
  if (a.num_tables < 1 || a.num_tables > 3) throw pybind11::value_error("tables: expected one to three");
  for (int t = 0; t < a.num_tables; t++) {
    const pybind11::tuple fields = tables[size_t(t)].cast<pybind11::tuple>();
    const Tensor table(fields[0]), ids(fields[1]);
    ff_embedding_table& to = a.tables[t];
    to.weight = table.data, to.rows = table.shape[0], to.stride = table.stride[0];
    to.ids = ids.as<const int64_t>(), to.period = fields[2].cast<int64_t>(), to.offset = fields[3].cast<int64_t>();
    to.padding_idx = fields[4].cast<int64_t>();
    if (t == 0) a.dtype = a.param_dtype = ff_dtype(table.dtype), a.cols = table.cols;
  }
  if (weight.data || bias.data) a.param_dtype = dtype_of({&weight, &bias});
  a.rows = rows, a.scale = scale, a.normalize = normalize, a.eps = eps, a.dropout_p = dropout_p, a.seed = seed;
  a.weight = weight.data, a.bias = bias.data, a.mean = mean.data, a.rstd = rstd.data;
  return a;
}

// `dtables`: as many tensors (rows, cols), or None.
inline void set_gradients(ff_embedding_args& a, const Tensor& dout, const Tensor& dsummed, const pybind11::tuple& dtables,
                          const Tensor& dweight, const Tensor& dbias) {
  for (int t = 0; t < a.num_tables; t++) a.tables[t].dweight = Tensor(dtables[size_t(t)]).data;
  if (dweight.data || dbias.data) a.param_dtype = dtype_of({&dweight, &dbias});
  a.dout = dout.data, a.dout_stride = dout.row_stride(), a.dsummed = dsummed.data;
  a.dweight = dweight.data, a.dbias = dbias.data;
}

// q, k (or None) and their outputs (B, H, S, D); cos, sin (positions, rotary_dim / 2); position_ids (B, S) or None.
inline ff_rotary_args rotary_args(const Tensor& q, const Tensor& q_out, const Tensor& k, const Tensor& k_out,
                                  const Tensor& cos, const Tensor& sin, const Tensor& position_ids, int64_t offset,
                                  int64_t batch_offset, bool interleaved, bool inverse) {
  ff_rotary_args a{};
  a.dtype = ff_dtype(q.dtype), a.table_dtype = ff_dtype(cos.dtype);
  a.batch = q.shape[0], a.num_heads = q.shape[1], a.seqlen = q.shape[2], a.head_dim = q.shape[3];
  a.num_kv_heads = k.shape[1], a.rotary_dim = 2 * cos.cols, a.interleaved = interleaved, a.inverse = inverse;
  a.q = q.data, a.q_out = q_out.data, a.k = k.data, a.k_out = k_out.data;
  q.strides_to(a.q_stride), q_out.strides_to(a.q_out_stride), k.strides_to(a.k_stride), k_out.strides_to(a.k_out_stride);
  a.cos = cos.data, a.sin = sin.data, a.positions = cos.shape[0];
  a.cos_stride = cos.stride[0], a.sin_stride = sin.stride[0];
  a.position_ids = position_ids.as<const int64_t>(), position_ids.strides_to(a.position_ids_stride);
  a.offset = offset, a.batch_offset = batch_offset;
  return a;
}

}  // namespace ff
