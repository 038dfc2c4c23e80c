// Calls of ordinary CPU tensors with nothing unusual about them: checked and run in one step.
//
// Each function returns false, and has done nothing, if anything about its arguments is unusual or wrong; the general way
// then runs the call or says what is wrong with it. The checks in Python take longer than the arithmetic of a small call.
// `out` is what torch.empty_like made of the input.
#pragma once
#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cmath>

#include "row_args.h"

namespace ff {

// Asks for 2 MiB pages behind [address, address + bytes): memory fresh from the system is then faulted in 512 times less
// often, which otherwise takes longer than filling it. Small blocks, which the allocator keeps, are left alone.
inline void advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

namespace plain {

constexpr size_t kHugeBytes = 4 << 20;  // _HUGE_BYTES of backends/cpu/_call.py

// torch.Tensor and torch.nn.Parameter, not what derives from them: subclasses have dispatch of their own.
inline bool is_ordinary(pybind11::handle t) {
  // Never destroyed: the interpreter is gone when static objects are.
  static const auto* const tensor = new pybind11::object(pybind11::module_::import("torch").attr("Tensor"));
  static const auto* const parameter = new pybind11::object(pybind11::module_::import("torch.nn").attr("Parameter"));
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(t.ptr()));
  return exchange && (type == tensor->ptr() || type == parameter->ptr());
}

// Contiguous elements of a floating type in this computer's memory, at least one.
inline bool is_data(const Tensor& t) { return t.on_cpu && t.dtype >= 0 && t.ndim >= 1 && t.numel > 0 && t.contiguous; }

inline bool is_like(const Tensor& out, const Tensor& x) {
  return is_data(out) && out.dtype == x.dtype && out.ndim == x.ndim && out.numel == x.numel && out.cols == x.cols;
}

inline bool is_parameter(const Tensor& p, const Tensor& x) {
  const bool half = x.dtype == FF_BFLOAT16 || x.dtype == FF_FLOAT16;
  return is_data(p) && p.ndim == 1 && p.cols == x.cols && (p.dtype == x.dtype || (half && p.dtype == FF_FLOAT32));
}

// What `call` returns; false where a tensor cannot be read at all (a sparse one, say).
template <class Call> bool attempt(const Call& call) {
  try {
    return call();
  } catch (const pybind11::error_already_set&) {
    return false;
  }
}

// An integer, or a tuple or list of one.
inline int64_t one_size(pybind11::handle shape) {
  PyObject* size = shape.ptr();
  if (PyTuple_Check(size) && PyTuple_GET_SIZE(size) == 1) size = PyTuple_GET_ITEM(size, 0);
  else if (PyList_Check(size) && PyList_GET_SIZE(size) == 1) size = PyList_GET_ITEM(size, 0);
  if (!PyLong_CheckExact(size)) return -1;
  const int64_t value = PyLong_AsLongLong(size);
  if (value == -1) PyErr_Clear();
  return value;
}

inline void prepare(const Tensor& out) {
  const size_t bytes = size_t(out.numel) * (out.dtype == FF_FLOAT64 ? 8 : out.dtype == FF_FLOAT32 ? 4 : 2);
  if (bytes >= kHugeBytes) advise_huge_pages(reinterpret_cast<uintptr_t>(out.data), bytes);
}

inline bool is_ordinary_or_none(pybind11::handle t) { return t.is_none() || is_ordinary(t); }

// What a norm of x's rows takes beside them.
struct Parameters {
  Tensor weight, bias;
  bool fit;
  Parameters(const Tensor& x, pybind11::handle shape, pybind11::handle weight_, pybind11::handle bias_, double eps)
      : weight(weight_), bias(bias_) {
    fit = is_data(x) && one_size(shape) == x.cols && (weight_.is_none() || is_parameter(weight, x)) &&
          (bias_.is_none() || is_parameter(bias, x)) &&
          (!weight.data || !bias.data || weight.dtype == bias.dtype) && eps >= 0;
  }
};

// layer_norm and rms_norm, without the statistics that backward takes.
template <class Run>
bool norm(const Run& run, pybind11::handle x_, pybind11::handle shape, pybind11::handle weight, pybind11::handle bias,
          double eps, pybind11::handle out_) {
  if (!is_ordinary(x_) || !is_ordinary_or_none(weight) || !is_ordinary_or_none(bias)) return false;
  const Tensor x(x_), out(out_), none(Py_None);
  const Parameters parameters(x, shape, weight, bias, eps);
  if (!parameters.fit || !is_like(out, x)) return false;
  prepare(out);
  run(layer_norm_args(x, parameters.weight, parameters.bias, out, none, none, eps));
  return true;
}

// The same of residual + x, which goes to `summed`.
template <class Run>
bool add_norm(const Run& run, pybind11::handle x_, pybind11::handle residual_, pybind11::handle shape,
              pybind11::handle weight, pybind11::handle bias, double eps, pybind11::handle out_,
              pybind11::handle summed_) {
  if (!is_ordinary(x_) || !is_ordinary(residual_) || !is_ordinary_or_none(weight) || !is_ordinary_or_none(bias))
    return false;
  const Tensor x(x_), residual(residual_), out(out_), summed(summed_), none(Py_None);
  const Parameters parameters(x, shape, weight, bias, eps);
  bool fits = parameters.fit && is_like(residual, x) && is_like(out, x) && is_like(summed, x);
  for (int d = 0; d < x.ndim && d < Tensor::kMostDims; d++) fits = fits && residual.shape[d] == x.shape[d];
  if (!fits || x.ndim > Tensor::kMostDims) return false;
  prepare(out), prepare(summed);
  run(add_layer_norm_args(x, residual, parameters.weight, parameters.bias, out, summed, none, none, eps, 0, 0));
  return true;
}

// softmax or its logarithm along the last dimension.
template <class Run>
bool softmax(const Run& run, pybind11::handle x_, pybind11::handle dim, bool log, pybind11::handle out_) {
  if (!is_ordinary(x_) || !PyLong_CheckExact(dim.ptr())) return false;
  const Tensor x(x_), out(out_);
  const int64_t d = PyLong_AsLongLong(dim.ptr());
  if (d == -1) PyErr_Clear();
  if (!is_data(x) || !is_like(out, x) || (d != -1 && d != x.ndim - 1)) return false;
  ff_softmax_args a{};
  a.dtype = ff_dtype(x.dtype), a.rows = x.rows(), a.cols = a.x_stride = x.cols, a.scale = 1, a.log = log;
  a.x = x.data, a.out = out.data;
  prepare(out);
  run(a);
  return true;
}

// An activation, elementwise.
template <class Run>
bool activation(const Run& run, pybind11::handle x_, const std::string& kind, pybind11::handle out_) {
  if (!is_ordinary(x_)) return false;
  const Tensor x(x_), out(out_), none(Py_None);
  if (!is_data(x) || !is_like(out, x)) return false;
  prepare(out);
  run(activation_args(x, none, none, none, out, kind, 0, 0));
  return true;
}

// The mean or sum of the losses of logits (N, C) with class indices (N), into the one number `loss`. `run` returns
// whether the targets were in range.
template <class Run>
bool cross_entropy(const Run& run, pybind11::handle logits_, pybind11::handle target_, int64_t ignore_index,
                   double label_smoothing, bool mean, pybind11::handle loss_) {
  if (!is_ordinary(logits_) || !is_ordinary(target_)) return false;
  const Tensor logits(logits_), target(target_), loss(loss_), none(Py_None);
  const bool fits = is_data(logits) && logits.ndim == 2 && target.on_cpu && target.is_int64 && target.ndim == 1 &&
                    target.contiguous && target.numel == logits.shape[0] && label_smoothing >= 0 &&
                    label_smoothing <= 1 && loss.dtype == logits.dtype && loss.numel == 1;
  if (!fits) return false;
  return run(cross_entropy_args(logits, target, none, ignore_index, label_smoothing, 0, none), loss, mean);
}

}  // namespace plain
}  // namespace ff
