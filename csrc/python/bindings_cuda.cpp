// Python bindings of the CUDA kernels: the C functions of fastformer.h on torch's tensors (tensor.h), which Python has
// allocated, and the stream.
// The same file binds the emulated kernels (-DFF_EMULATE), which run on host memory and ignore the stream.
#include <pybind11/pybind11.h>

#include "../include/fastformer.h"
#include "attention_args.h"
#include "embedding_args.h"
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

// layer_norm and rms_norm, whose mean is None.
template <auto* forward, auto* workspace_of, auto* backward> static void bind_norm(py::module_& m, std::string name) {
  m.def((name + "_forward").c_str(), [](py::handle x, py::handle weight, py::handle bias, py::handle out,
                                        py::handle mean, py::handle rstd, double eps, Ptr stream) {
    const auto a = ff::layer_norm_args(x, weight, bias, out, mean, rstd, eps);
    check(forward(&a, ptr(stream)));
  });
  m.def((name + "_backward_workspace").c_str(), [](py::handle x) {
    const py::none none;
    const auto a = ff::layer_norm_args(x, none, none, none, none, none, 0);
    return workspace_of(&a);
  });
  m.def((name + "_backward").c_str(), [](py::handle dout, py::handle x, py::handle weight, py::handle mean,
                                         py::handle rstd, py::handle dx, py::handle dweight, py::handle dbias,
                                         py::handle workspace, Ptr stream) {
    auto a = ff::layer_norm_backward_args(dout, x, weight, mean, rstd, dx, dweight, dbias);
    a.workspace = ff::Tensor(workspace).data;
    check(backward(&a, ptr(stream)));
  });
}

template <auto* forward, auto* workspace_of, auto* backward>
static void bind_add_norm(py::module_& m, std::string name) {
  m.def((name + "_forward").c_str(),
        [](py::handle x, py::handle residual, py::handle weight, py::handle bias, py::handle out, py::handle summed,
           py::handle mean, py::handle rstd, double eps, double dropout_p, uint64_t seed, Ptr stream) {
          const auto a =
              ff::add_layer_norm_args(x, residual, weight, bias, out, summed, mean, rstd, eps, dropout_p, seed);
          check(forward(&a, ptr(stream)));
        });
  m.def((name + "_backward_workspace").c_str(), [](py::handle summed) {
    const py::none none;
    const auto a = ff::add_layer_norm_args(summed, none, none, none, none, summed, none, none, 0, 0, 0);
    return workspace_of(&a);
  });
  m.def((name + "_backward").c_str(),
        [](py::handle dout, py::handle dsummed, py::handle summed, py::handle weight, py::handle mean, py::handle rstd,
           py::handle dx, py::handle dresidual, py::handle dweight, py::handle dbias, double dropout_p, uint64_t seed,
           py::handle workspace, Ptr stream) {
          auto a = ff::add_layer_norm_backward_args(dout, dsummed, summed, weight, mean, rstd, dx, dresidual, dweight,
                                                    dbias, dropout_p, seed);
          a.workspace = ff::Tensor(workspace).data;
          check(backward(&a, ptr(stream)));
        });
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

  m.def("use_exchange", ff::use_exchange);  // tensor.h
  ff::use_exchange(true);
  bind_norm<ff_cuda_layer_norm_forward, ff_cuda_layer_norm_backward_workspace, ff_cuda_layer_norm_backward>(
      m, "layer_norm");
  bind_norm<ff_cuda_rms_norm_forward, ff_cuda_rms_norm_backward_workspace, ff_cuda_rms_norm_backward>(m, "rms_norm");
  bind_add_norm<ff_cuda_add_layer_norm_forward, ff_cuda_add_layer_norm_backward_workspace,
                ff_cuda_add_layer_norm_backward>(m, "add_layer_norm");
  bind_add_norm<ff_cuda_add_rms_norm_forward, ff_cuda_add_rms_norm_backward_workspace, ff_cuda_add_rms_norm_backward>(
      m, "add_rms_norm");

  m.def("linear_activation_forward",
        [](py::handle x_, py::handle w1_, py::handle w_up, py::handle b1, py::handle b_up, py::handle out,
           py::handle gate, py::handle up, const std::string& kind, double dropout_p, uint64_t seed, Ptr stream) {
          const ff::Tensor x(x_), w1(w1_);
          auto a = ff::linear_activation_args(x, b1, b_up, gate, up, kind, dropout_p, seed);
          a.cols = w1.shape[0], a.x_stride = x.stride[0];
          a.x = x.data, a.w1 = w1.data, a.w_up = ff::Tensor(w_up).data, a.out = ff::Tensor(out).data;
          w1.strides_to(a.w_stride);
          check(ff_cuda_linear_activation_forward(&a, ptr(stream)));
        });
  m.def("linear_activation_backward",
        [](py::handle dout_, py::handle w2_, py::handle gate, py::handle b1, py::handle up, py::handle b_up,
           const std::string& kind, double dropout_p, uint64_t seed, py::handle dgate_, py::handle dup, py::handle db1,
           py::handle db_up, py::handle workspace, Ptr stream) {
          const ff::Tensor dout(dout_), w2(w2_), dgate(dgate_);
          auto a = ff::linear_activation_args(dout, b1, b_up, gate, up, kind, dropout_p, seed);
          a.cols = w2.shape[1], a.dout_stride = dout.stride[0], a.dgate_stride = dgate.stride[0];
          a.dout = dout.data, a.w2 = w2.data, a.dgate = dgate.data, a.dup = ff::Tensor(dup).data;
          a.db1 = ff::Tensor(db1).data, a.db_up = ff::Tensor(db_up).data, a.workspace = ff::Tensor(workspace).data;
          w2.strides_to(a.w2_stride);
          check(ff_cuda_linear_activation_backward(&a, ptr(stream)));
        });
  m.def("linear_activation_backward_workspace", [](int64_t rows, int64_t cols, bool gated) {
    ff_linear_activation_args a{};
    a.rows = rows, a.cols = cols;
    a.db1 = &a, a.up = gated ? &a : nullptr;  // what matters is that they are there
    return ff_cuda_linear_activation_backward_workspace(&a);
  });

  m.def("softmax_forward", [](py::handle x_, py::handle out, double scale, bool log, py::handle mask, py::handle bias,
                              py::handle row_shape, bool causal, Ptr stream) {
    const ff::Tensor x(x_);
    ff_softmax_args a{};
    a.dtype = ff_dtype(x.dtype), a.rows = x.rows(), a.cols = x.cols, a.x_stride = x.row_stride();
    a.scale = scale, a.log = log;
    a.x = x.data, a.out = ff::Tensor(out).data;
    if (!row_shape.is_none()) ff::add_to_scores(a, mask, bias, row_shape, causal);
    check(ff_cuda_softmax_forward(&a, ptr(stream)));
  });
  m.def("softmax_backward", [](py::handle dout_, py::handle out_, py::handle dx, double scale, bool log,
                               py::handle mask, py::handle row_shape, bool causal, Ptr stream) {
    const ff::Tensor out(out_), dout(dout_);
    ff_softmax_args a{};
    a.dtype = ff_dtype(out.dtype), a.rows = out.rows(), a.cols = out.cols, a.dout_stride = dout.row_stride();
    a.scale = scale, a.log = log;
    a.out = out.data, a.dout = dout.data, a.dx = ff::Tensor(dx).data;
    if (!row_shape.is_none()) ff::add_to_scores(a, mask, py::none(), row_shape, causal);
    check(ff_cuda_softmax_backward(&a, ptr(stream)));
  });
  m.def("activation_forward", [](py::handle x, py::handle bias, py::handle up, py::handle up_bias, py::handle out,
                                 const std::string& kind, double dropout_p, uint64_t seed, Ptr stream) {
    const auto a = ff::activation_args(x, bias, up, up_bias, out, kind, dropout_p, seed);
    check(ff_cuda_activation_forward(&a, ptr(stream)));
  });
  m.def("activation_backward_workspace", [](py::handle x, py::handle dbias, py::handle dup_bias) {
    const py::none none;
    auto a = ff::activation_args(x, none, none, none, none, "relu", 0, 0);
    ff::set_activation_gradients(a, none, none, none, dbias, dup_bias);
    return ff_cuda_activation_backward_workspace(&a);
  });
  m.def("activation_backward",
        [](py::handle dout, py::handle x, py::handle bias, py::handle up, py::handle up_bias, py::handle dx,
           py::handle dup, py::handle dbias, py::handle dup_bias, py::handle out, const std::string& kind,
           double dropout_p, uint64_t seed, py::handle workspace, Ptr stream) {
          auto a = ff::activation_args(x, bias, up, up_bias, out, kind, dropout_p, seed);
          ff::set_activation_gradients(a, dout, dx, dup, dbias, dup_bias);
          a.workspace = ff::Tensor(workspace).data;
          check(ff_cuda_activation_backward(&a, ptr(stream)));
        });
  m.def("cross_entropy_forward",
        [](py::handle logits, py::handle target, py::handle weight, py::handle loss, py::handle lse,
           int64_t ignore_index, double label_smoothing, double z_loss, py::handle probabilities, py::handle dloss,
           py::handle dlogits, Ptr stream) {
          auto a = ff::cross_entropy_args(logits, target, weight, ignore_index, label_smoothing, z_loss, probabilities);
          a.lse = ff::Tensor(lse).data, a.loss = ff::Tensor(loss).data;
          ff::set_gradients(a, dloss, dlogits);
          check(ff_cuda_cross_entropy_forward(&a, ptr(stream)));
        });
  m.def("cross_entropy_backward",
        [](py::handle dloss, py::handle logits, py::handle target, py::handle weight, py::handle lse,
           py::handle dlogits, int64_t ignore_index, double label_smoothing, double z_loss, py::handle probabilities,
           py::handle dprobabilities, Ptr stream) {
          auto a = ff::cross_entropy_args(logits, target, weight, ignore_index, label_smoothing, z_loss, probabilities);
          a.lse = ff::Tensor(lse).data, a.dprobabilities = ff::Tensor(dprobabilities).data;
          ff::set_gradients(a, dloss, dlogits);
          check(ff_cuda_cross_entropy_backward(&a, ptr(stream)));
        });
  m.def("cross_entropy_scale", [](py::handle gradient_, py::handle factor, Ptr stream) {
    const ff::Tensor gradient(gradient_);
    ff_cross_entropy_args a{};
    a.dtype = ff_dtype(gradient.dtype), a.rows = gradient.rows(), a.cols = gradient.cols;
    a.dlogits = gradient.data, a.dloss = ff::Tensor(factor).data;
    check(ff_cuda_cross_entropy_scale(&a, ptr(stream)));
  });

  m.def("embedding_forward", [](const py::tuple& tables, py::handle out_, double scale, bool normalize, double eps,
                                double dropout_p, uint64_t seed, py::handle weight, py::handle bias, py::handle mean,
                                py::handle rstd, Ptr stream) {
    const ff::Tensor out(out_);
    auto a = ff::embedding_args(tables, out.rows(), scale, normalize, eps, dropout_p, seed, weight, bias, mean, rstd);
    a.out = out.data;
    check(ff_cuda_embedding_forward(&a, ptr(stream)));
  });
  const auto embedding_backward_args = [](py::handle dout_, const py::tuple& tables, double scale, bool normalize,
                                          double dropout_p, uint64_t seed, const py::tuple& norm, py::handle dsummed,
                                          const py::tuple& dtables, py::handle dweight, py::handle dbias) {
    const ff::Tensor dout(dout_), weight(norm[0]), mean(norm[1]), rstd(norm[2]);
    auto a = ff::embedding_args(tables, dout.rows(), scale, normalize, 0, dropout_p, seed, weight, py::none(), mean,
                                rstd);
    ff::set_gradients(a, dout, dsummed, dtables, dweight, dbias);
    return a;
  };
  m.def("embedding_backward_workspace",
        [=](py::handle dout, const py::tuple& tables, double scale, bool normalize, double dropout_p, uint64_t seed,
            const py::tuple& norm, py::handle dsummed, const py::tuple& dtables, py::handle dweight, py::handle dbias) {
          const auto a = embedding_backward_args(dout, tables, scale, normalize, dropout_p, seed, norm, dsummed,
                                                 dtables, dweight, dbias);
          return ff_cuda_embedding_backward_workspace(&a);
        });
  m.def("embedding_backward",
        [=](py::handle dout, const py::tuple& tables, double scale, bool normalize, double dropout_p, uint64_t seed,
            const py::tuple& norm, py::handle dsummed, const py::tuple& dtables, py::handle dweight, py::handle dbias,
            py::handle workspace, Ptr stream) {
          auto a = embedding_backward_args(dout, tables, scale, normalize, dropout_p, seed, norm, dsummed, dtables,
                                           dweight, dbias);
          a.workspace = ff::Tensor(workspace).data;
          check(ff_cuda_embedding_backward(&a, ptr(stream)));
        });
  m.def("rotary", [](py::handle q, py::handle q_out, py::handle k, py::handle k_out, py::handle cos, py::handle sin,
                     py::handle position_ids, int64_t offset, int64_t batch_offset, bool interleaved, bool inverse,
                     Ptr stream) {
    const auto a =
        ff::rotary_args(q, q_out, k, k_out, cos, sin, position_ids, offset, batch_offset, interleaved, inverse);
    check(ff_cuda_rotary(&a, ptr(stream)));
  });

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
                                 py::handle workspace, Ptr stream) {
    ff_attention_args a = ff::attention_args(tensors, options);
    ff::set_gradients(a, gradients);
    a.workspace = ff::Tensor(workspace).data;
    check(ff_cuda_attention_backward(&a, ptr(stream)));
  });
  m.def("decode_attention_workspace", [](const py::tuple& tensors, const py::tuple& options) {
    const auto a = ff::decode_attention_args(tensors, options);
    return ff_cuda_decode_attention_workspace(&a);
  });
  m.def("decode_attention", [](const py::tuple& tensors, const py::tuple& options, py::handle workspace, Ptr stream) {
    auto a = ff::decode_attention_args(tensors, options);
    a.workspace = ff::Tensor(workspace).data;
    check(ff_cuda_decode_attention(&a, ptr(stream)));
  });
}
