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

// What is added to the scores: mask and bias (row_shape..., cols) in any strides, the last of them 0 or 1.
inline void add_to_scores(ff_softmax_args& a, const Tensor& mask, const Tensor& bias, pybind11::handle row_shape,
                          bool causal) {
  const auto shape = pybind11::reinterpret_borrow<pybind11::tuple>(row_shape);
  if (shape.size() != 3) throw pybind11::value_error("row_shape: expected three sizes");
  for (size_t d = 0; d < 3; d++) a.row_shape[d] = shape[d].cast<int64_t>();
  a.causal = causal;
  a.mask = mask.as<const uint8_t>(), a.bias = bias.data;
  mask.strides_to(a.mask_stride), bias.strides_to(a.bias_stride);
  if (bias.data) a.bias_dtype = ff_dtype(bias.dtype);
}

// Of target and probabilities one is None.
inline ff_cross_entropy_args cross_entropy_args(const Tensor& logits, const Tensor& target, const Tensor& weight,
                                                int64_t ignore_index, double label_smoothing, double z_loss,
                                                const Tensor& probabilities) {
  ff_cross_entropy_args a{};
  a.dtype = ff_dtype(logits.dtype), a.rows = logits.shape[0], a.cols = logits.shape[1];
  a.logits_stride = logits.stride[0], a.ignore_index = ignore_index, a.label_smoothing = label_smoothing;
  a.logits = logits.data, a.target = target.as<const int64_t>(), a.weight = weight.data;
  a.z_loss = z_loss, a.probabilities = probabilities.data, a.probabilities_stride = probabilities.stride[0];
  return a;
}

inline void set_gradients(ff_cross_entropy_args& a, const Tensor& dloss, const Tensor& dlogits) {
  a.dloss = dloss.data, a.dloss_stride = dloss.stride[0], a.dlogits = dlogits.data;
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

// `data`: x or dout.
inline ff_linear_activation_args linear_activation_args(const Tensor& data, const Tensor& b1, const Tensor& b_up,
                                                        const Tensor& gate, const Tensor& up, const std::string& kind,
                                                        double dropout_p, uint64_t seed) {
  ff_linear_activation_args a{};
  a.dtype = ff_dtype(data.dtype), a.kind = activation_kind(kind);
  a.rows = data.shape[0], a.inner = data.shape[1], a.dropout_p = dropout_p, a.seed = seed;
  a.b1 = b1.data, a.b_up = b_up.data, a.gate = gate.data, a.up = up.data;
  return a;
}

// False if the kernel does not take such tensors.
inline bool linear_args(const Tensor& x, const Tensor& weight, const Tensor& start, const Tensor& out, ff_linear_args& a) {
  auto rows_lie_in_memory = [](const Tensor& t) { return t.ndim == 2 ? t.stride[1] == 1 || t.cols == 1 : t.contiguous; };
  if (weight.ndim != 2 || x.ndim == 0 || x.cols != weight.shape[1] || out.cols != weight.shape[0]) return false;
  if (x.dtype < 0 || x.dtype == FF_FLOAT64 || x.dtype != weight.dtype || x.dtype != out.dtype) return false;
  if (x.rows() != out.rows() || !rows_lie_in_memory(x) || !rows_lie_in_memory(out)) return false;
  if (weight.stride[0] != 1 && weight.stride[1] != 1) return false;
  if (start.data) {
    const bool one = start.ndim == 1 || (start.ndim == 2 && start.shape[0] == 1);
    const bool fits = one || (start.ndim == 2 && start.shape[0] == out.rows());
    if (!fits || start.dtype != x.dtype || start.cols != out.cols) return false;
    if (start.stride[start.ndim - 1] != 1 && start.cols != 1) return false;
    a.start_stride = one ? 0 : start.stride[0];
  } else {
    a.start_stride = 0;
  }
  a.dtype = ff_dtype(x.dtype), a.rows = x.rows(), a.in_features = x.cols, a.out_features = out.cols;
  a.x_stride = x.row_stride(), a.out_stride = out.row_stride();
  a.weight_stride[0] = weight.stride[0], a.weight_stride[1] = weight.stride[1];
  a.x = x.data, a.weight = weight.data, a.start = start.data, a.out = out.data;
  return true;
}

}  // namespace ff
