// Python bindings of the CUDA kernels: the C functions of fastformer.h with their struct's fields as positional
// integers and floats, in the struct's order (tensors as data_ptr()), then the stream; those of attention take tensors
// (attention_args.h).
// The same file binds the emulated kernels (-DFF_EMULATE), which run on host memory and ignore the stream.
#include <pybind11/pybind11.h>

#include "../include/fastformer.h"
#include "attention_args.h"
#ifdef FF_EMULATE
#include "../emulation/emulator.h"
#endif

#ifndef FF_MODULE
#define FF_MODULE _cuda
#endif

namespace py = pybind11;
using Ptr = uintptr_t;

static void* ptr(Ptr p) { return reinterpret_cast<void*>(p); }

static void check(int status) {
  if (status == FF_OK) return;
  if (status == FF_INVALID_ARGUMENT) throw py::value_error(ff_last_error());
  if (status == FF_UNSUPPORTED) {
    PyErr_SetString(PyExc_NotImplementedError, ff_last_error());
    throw py::error_already_set();
  }
  throw std::runtime_error(ff_last_error());
}

PYBIND11_MODULE(FF_MODULE, m) {
#ifdef FF_EMULATE
  namespace emulation = ff::emulation;
  m.def("set_order", [](const char* name) {
    if (!emulation::set_order(name)) {
      std::string message = "name: '" + std::string(name) + "' is not one of";
      for (const char* known : emulation::kOrderNames) message += " " + std::string(known);
      throw py::value_error(message);
    }
  });
  m.def("set_multiprocessors", [](int count) { emulation::settings.multiprocessors = count; });
#endif

  m.def("layer_norm_forward", [](int dtype, int param_dtype, int64_t rows, int64_t cols, int64_t x_stride, double eps,
                                 Ptr x, Ptr weight, Ptr bias, Ptr out, Ptr mean, Ptr rstd, Ptr stream) {
    ff_layer_norm_args a{};
    a.dtype = ff_dtype(dtype), a.param_dtype = ff_dtype(param_dtype);
    a.rows = rows, a.cols = cols, a.x_stride = x_stride, a.eps = eps;
    a.x = ptr(x), a.weight = ptr(weight), a.bias = ptr(bias);
    a.out = ptr(out), a.mean = ptr(mean), a.rstd = ptr(rstd);
    check(ff_cuda_layer_norm_forward(&a, ptr(stream)));
  });
  m.def("layer_norm_backward_workspace", [](int dtype, int64_t rows, int64_t cols) {
    ff_layer_norm_args a{};
    a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols;
    return ff_cuda_layer_norm_backward_workspace(&a);
  });
  m.def("layer_norm_backward",
        [](int dtype, int param_dtype, int64_t rows, int64_t cols, int64_t x_stride, int64_t dout_stride, Ptr x,
           Ptr weight, Ptr mean, Ptr rstd, Ptr dout, Ptr dx, Ptr dweight, Ptr dbias, Ptr workspace, Ptr stream) {
          ff_layer_norm_args a{};
          a.dtype = ff_dtype(dtype), a.param_dtype = ff_dtype(param_dtype);
          a.rows = rows, a.cols = cols, a.x_stride = x_stride, a.dout_stride = dout_stride;
          a.x = ptr(x), a.weight = ptr(weight), a.mean = ptr(mean), a.rstd = ptr(rstd);
          a.dout = ptr(dout), a.dx = ptr(dx), a.dweight = ptr(dweight), a.dbias = ptr(dbias);
          a.workspace = ptr(workspace);
          check(ff_cuda_layer_norm_backward(&a, ptr(stream)));
        });

  m.def("add_layer_norm_forward",
        [](int dtype, int param_dtype, int64_t rows, int64_t cols, int64_t x_stride, int64_t residual_stride,
           double eps, double dropout_p, uint64_t seed, Ptr x, Ptr residual, Ptr weight, Ptr bias, Ptr out, Ptr summed,
           Ptr mean, Ptr rstd, Ptr stream) {
          ff_add_layer_norm_args a{};
          a.dtype = ff_dtype(dtype), a.param_dtype = ff_dtype(param_dtype);
          a.rows = rows, a.cols = cols, a.x_stride = x_stride, a.residual_stride = residual_stride;
          a.eps = eps, a.dropout_p = dropout_p, a.seed = seed;
          a.x = ptr(x), a.residual = ptr(residual), a.weight = ptr(weight), a.bias = ptr(bias);
          a.out = ptr(out), a.summed = ptr(summed), a.mean = ptr(mean), a.rstd = ptr(rstd);
          check(ff_cuda_add_layer_norm_forward(&a, ptr(stream)));
        });
  m.def("add_layer_norm_backward_workspace", [](int dtype, int64_t rows, int64_t cols) {
    ff_add_layer_norm_args a{};
    a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols;
    return ff_cuda_add_layer_norm_backward_workspace(&a);
  });
  m.def("add_layer_norm_backward",
        [](int dtype, int param_dtype, int64_t rows, int64_t cols, int64_t dout_stride, int64_t dsummed_stride,
           double dropout_p, uint64_t seed, Ptr weight, Ptr summed, Ptr mean, Ptr rstd, Ptr dout, Ptr dsummed, Ptr dx,
           Ptr dresidual, Ptr dweight, Ptr dbias, Ptr workspace, Ptr stream) {
          ff_add_layer_norm_args a{};
          a.dtype = ff_dtype(dtype), a.param_dtype = ff_dtype(param_dtype);
          a.rows = rows, a.cols = cols, a.dout_stride = dout_stride, a.dsummed_stride = dsummed_stride;
          a.dropout_p = dropout_p, a.seed = seed;
          a.weight = ptr(weight), a.summed = ptr(summed), a.mean = ptr(mean), a.rstd = ptr(rstd);
          a.dout = ptr(dout), a.dsummed = ptr(dsummed), a.dx = ptr(dx), a.dresidual = ptr(dresidual);
          a.dweight = ptr(dweight), a.dbias = ptr(dbias), a.workspace = ptr(workspace);
          check(ff_cuda_add_layer_norm_backward(&a, ptr(stream)));
        });

  m.def("use_exchange", ff::use_exchange);
  ff::use_exchange(true);
  m.def("attention_forward", [](const py::tuple& tensors, const py::tuple& options, Ptr stream) {
    const ff_attention_args a = ff::attention_args(tensors, options);
    check(ff_cuda_attention_forward(&a, ptr(stream)));
  });
  m.def("attention_backward_workspace",
        [](const py::tuple& tensors, const py::tuple& options, const py::tuple& gradients) {
          ff_attention_args a = ff::attention_args(tensors, options);
          ff::set_gradients(a, gradients);
          return ff_cuda_attention_backward_workspace(&a);
        });
  m.def("attention_backward", [](const py::tuple& tensors, const py::tuple& options, const py::tuple& gradients,
                                 Ptr workspace, Ptr stream) {
    ff_attention_args a = ff::attention_args(tensors, options);
    ff::set_gradients(a, gradients);
    a.workspace = ptr(workspace);
    check(ff_cuda_attention_backward(&a, ptr(stream)));
  });
  m.def("decode_attention_workspace", [](const py::tuple& tensors, double scale, bool causal, int64_t window_left,
                                         int64_t window_right, double softcap) {
    const auto a = ff::decode_attention_args(tensors, scale, causal, window_left, window_right, softcap);
    return ff_cuda_decode_attention_workspace(&a);
  });
  m.def("decode_attention", [](const py::tuple& tensors, double scale, bool causal, int64_t window_left,
                               int64_t window_right, double softcap, Ptr workspace, Ptr stream) {
    auto a = ff::decode_attention_args(tensors, scale, causal, window_left, window_right, softcap);
    a.workspace = ptr(workspace);
    check(ff_cuda_decode_attention(&a, ptr(stream)));
  });
}
