// Python's tensors -> the structs of fastformer.h, for the kernels that work on rows, of the CPU's and the CUDA module.
//
// Tensors come as backends/layout.py says: contiguous of any rank, or two-dimensional with contiguous rows; None becomes
// NULL. Their shapes and dtypes agree: fastformer/functional has checked them.
#pragma once
#include "tensor.h"

namespace ff {

// Of the first tensor there is: parameters and their gradients share a dtype.
inline ff_dtype dtype_of(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (t->dtype >= 0) return ff_dtype(t->dtype);
  return FF_FLOAT32;
}

inline ff_layer_norm_args layer_norm_args(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& out,
                                          const Tensor& mean, const Tensor& rstd, double eps) {
  ff_layer_norm_args a{};
  a.dtype = ff_dtype(x.dtype), a.param_dtype = dtype_of({&weight, &bias, &x});
  a.rows = x.rows(), a.cols = x.cols, a.x_stride = x.row_stride(), a.eps = eps;
  a.x = x.data, a.weight = weight.data, a.bias = bias.data, a.out = out.data, a.mean = mean.data, a.rstd = rstd.data;
  return a;
}

inline ff_layer_norm_args layer_norm_backward_args(const Tensor& dout, const Tensor& x, const Tensor& weight,
                                                   const Tensor& mean, const Tensor& rstd, const Tensor& dx,
                                                   const Tensor& dweight, const Tensor& dbias) {
  ff_layer_norm_args a = layer_norm_args(x, weight, pybind11::none(), pybind11::none(), mean, rstd, 0);
  a.param_dtype = dtype_of({&weight, &dweight, &dbias, &x});
  a.dout = dout.data, a.dout_stride = dout.row_stride();
  a.dx = dx.data, a.dweight = dweight.data, a.dbias = dbias.data;
  return a;
}

inline ff_add_layer_norm_args add_layer_norm_args(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                  const Tensor& bias, const Tensor& out, const Tensor& summed,
                                                  const Tensor& mean, const Tensor& rstd, double eps, double dropout_p,
                                                  uint64_t seed) {
  ff_add_layer_norm_args a{};
  a.dtype = ff_dtype(x.dtype), a.param_dtype = dtype_of({&weight, &bias, &x});
  a.rows = x.rows(), a.cols = x.cols, a.x_stride = x.row_stride(), a.residual_stride = residual.row_stride();
  a.eps = eps, a.dropout_p = dropout_p, a.seed = seed;
  a.x = x.data, a.residual = residual.data, a.weight = weight.data, a.bias = bias.data;
  a.out = out.data, a.summed = summed.data, a.mean = mean.data, a.rstd = rstd.data;
  return a;
}

inline ff_add_layer_norm_args add_layer_norm_backward_args(const Tensor& dout, const Tensor& dsummed,
                                                           const Tensor& summed, const Tensor& weight,
                                                           const Tensor& mean, const Tensor& rstd, const Tensor& dx,
                                                           const Tensor& dresidual, const Tensor& dweight,
                                                           const Tensor& dbias, double dropout_p, uint64_t seed) {
  ff_add_layer_norm_args a{};
  a.dtype = ff_dtype(summed.dtype), a.param_dtype = dtype_of({&weight, &dweight, &dbias, &summed});
  a.rows = summed.rows(), a.cols = summed.cols, a.dropout_p = dropout_p, a.seed = seed;
  a.dout_stride = dout.row_stride(), a.dsummed_stride = dsummed.row_stride();
  a.weight = weight.data, a.summed = summed.data, a.mean = mean.data, a.rstd = rstd.data;
  a.dout = dout.data, a.dsummed = dsummed.data, a.dx = dx.data, a.dresidual = dresidual.data;
  a.dweight = dweight.data, a.dbias = dbias.data;
  return a;
}

inline ff_activation activation_kind(const std::string& name) {
  static const char* const names[] = {"relu", "gelu", "gelu_tanh", "silu"};  // in ff_activation's order
  for (int kind = 0; kind < 4; kind++)
    if (name == names[kind]) return ff_activation(kind);
  throw pybind11::value_error("activation: " + name);
}

inline ff_activation_args activation_args(const Tensor& x, const Tensor& bias, const Tensor& up, const Tensor& up_bias,
                                          const Tensor& out, const std::string& kind, double dropout_p, uint64_t seed) {
  ff_activation_args a{};
  a.dtype = ff_dtype(x.dtype), a.kind = activation_kind(kind), a.rows = x.rows(), a.cols = x.cols;
  a.x_stride = x.row_stride(), a.up_stride = up.row_stride(), a.out_stride = out.row_stride();
  a.dropout_p = dropout_p, a.seed = seed;
  a.x = x.data, a.bias = bias.data, a.up = up.data, a.up_bias = up_bias.data, a.out = out.data;
  return a;
}

inline void set_activation_gradients(ff_activation_args& a, const Tensor& dout, const Tensor& dx, const Tensor& dup,
                                     const Tensor& dbias, const Tensor& dup_bias) {
  a.dout_stride = dout.row_stride(), a.dx_stride = dx.row_stride(), a.dup_stride = dup.row_stride();
  a.dout = dout.data, a.dx = dx.data, a.dup = dup.data, a.dbias = dbias.data, a.dup_bias = dup_bias.data;
}

}  // namespace ff
