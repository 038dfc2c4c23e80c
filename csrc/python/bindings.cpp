// Python bindings of the CPU kernels: the C functions of fastformer.h on torch's tensors (tensor.h), which Python has
// allocated. No torch header: one build serves every torch version.
//
// Checks live in Python, before the call; a status other than FF_OK that still comes back becomes an exception.
#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "../cpu/vec.h"
#include "attention_args.h"
#include "embedding_args.h"
#include "plain.h"
#include "row_args.h"

#ifndef FF_MODULE
#define FF_MODULE _C
#endif

namespace py = pybind11;
using Ptr = uintptr_t;

template <class T = void> static T* ptr(Ptr p) { return reinterpret_cast<T*>(p); }

static void check(int status) {
  if (status == FF_OK) return;
  if (status == FF_INVALID_ARGUMENT) throw py::value_error(ff_last_error());
  if (status == FF_UNSUPPORTED) {
    PyErr_SetString(PyExc_NotImplementedError, ff_last_error());
    throw py::error_already_set();
  }
  throw std::runtime_error(ff_last_error());
}

// Runs a kernel without the interpreter lock.
template <class Args> static void run(int (*kernel)(const Args*, void*), const Args& args) {
  int status;
  {
    py::gil_scoped_release release;
    status = kernel(&args, nullptr);
  }
  check(status);
}

// A kernel's workspace: small ones, which calls use one after another, are kept by each thread.
struct Scratch {
  void* data;
  explicit Scratch(size_t bytes) {
    static constexpr size_t kKept = 4 << 20;
    static thread_local std::unique_ptr<char[]> kept;
    if (bytes > kKept) {
      large.reset(new char[bytes]);
      data = large.get();
    } else {
      if (!kept) kept.reset(new char[kKept]);
      data = kept.get();
    }
  }
  std::unique_ptr<char[]> large;
};

static void attention_forward(ff_attention_args a) {
  const Scratch scratch(ff_cpu_attention_forward_workspace(&a));
  a.workspace = scratch.data;
  run(ff_cpu_attention_forward, a);
}

static void decode_attention(ff_decode_attention_args a) {
  const size_t bytes = ff_cpu_decode_attention_workspace(&a);
  if (bytes == 0) throw py::value_error(ff_last_error());
  const Scratch scratch(bytes);
  a.workspace = scratch.data;
  run(ff_cpu_decode_attention, a);
}

// One number into a tensor, rounded to its dtype.
static void set(const ff::Tensor& t, double value) {
  using namespace ff::generic;
  if (t.dtype == FF_FLOAT64) *t.as<double>() = value;
  else if (t.dtype == FF_FLOAT32) *t.as<float>() = float(value);
  else if (t.dtype == FF_BFLOAT16) *t.as<ff::bf16>() = from_float<ff::bf16>(float(value));
  else *t.as<ff::fp16>() = from_float<ff::fp16>(float(value));
}

// What the mean divides by: the rows, or the weights of the targets that count. Of targets the kernel has yet to check.
template <class A> static double total_of_targets(const ff_cross_entropy_args& a) {
  if (a.probabilities) return double(a.rows);
  const A* weight = static_cast<const A*>(a.weight);
  double total = 0;
  int64_t counted = 0;
  for (int64_t r = 0; r < a.rows; r++) {
    const int64_t t = a.target[r];
    counted += t != a.ignore_index;
    if (weight && t != a.ignore_index && t >= 0 && t < a.cols) total += double(weight[t]);
  }
  return weight ? total : double(counted);
}

template <class A> static int cross_entropy_reduced(ff_cross_entropy_args a, const ff::Tensor& loss, bool mean) {
  int status;
  {
    py::gil_scoped_release release;
    const Scratch scratch(size_t(a.rows) * sizeof(A));
    A* const rows = static_cast<A*>(scratch.data);
    const double total = mean ? total_of_targets<A>(a) : 1;
    const A dloss = A(1 / total);
    a.loss = rows, a.dloss = &dloss;
    status = ff_cpu_cross_entropy_forward(&a, nullptr);
    constexpr int kSums = 8;  // side by side, so that no addition waits for the one before
    double sums[kSums] = {};
    for (int64_t r = 0; status == FF_OK && r < a.rows; r++) sums[r % kSums] += double(rows[r]);
    for (int i = 1; i < kSums; i++) sums[0] += sums[i];
    if (status == FF_OK) set(loss, sums[0] / total);
  }
  return status;
}

static int cross_entropy_reduced(const ff_cross_entropy_args& a, const ff::Tensor& loss, bool mean) {
  return a.dtype == FF_FLOAT64 ? cross_entropy_reduced<double>(a, loss, mean)
                               : cross_entropy_reduced<float>(a, loss, mean);
}

PYBIND11_MODULE(FF_MODULE, m) {
  m.def("cpu_isa", [] { return ff_cpu_isa(); });
  m.def("set_cpu_isa", [](const char* name) { check(ff_cpu_set_isa(name)); });
  // Whether tensors are read through torch's table of functions (tensor.h); returns whether they are from here on.
  m.def("use_exchange", ff::use_exchange);
  ff::use_exchange(true);
  m.def("advise_huge_pages", ff::advise_huge_pages);

  // layer_norm and rms_norm; an rms norm's mean is None.
  auto norm = [&](const std::string& name, auto forward, auto backward, auto workspace) {
    m.def((name + "_forward").c_str(), [=](py::handle x, py::handle weight, py::handle bias, py::handle out,
                                           py::handle mean, py::handle rstd, double eps) {
      run(forward, ff::layer_norm_args(x, weight, bias, out, mean, rstd, eps));
    });
    m.def((name + "_plain").c_str(), [=](py::handle x, py::handle shape, py::handle weight, py::handle bias, double eps,
                                         py::handle out) {
      auto run_norm = [=](const auto& a) { run(forward, a); };
      return ff::plain::attempt([&] { return ff::plain::norm(run_norm, x, shape, weight, bias, eps, out); });
    });
    m.def((name + "_backward").c_str(),
          [=](py::handle dout, py::handle x, py::handle weight, py::handle mean, py::handle rstd, py::handle dx,
              py::handle dweight, py::handle dbias) {
            auto a = ff::layer_norm_backward_args(dout, x, weight, mean, rstd, dx, dweight, dbias);
            const Scratch scratch(a.dweight || a.dbias ? workspace(&a) : 0);
            a.workspace = scratch.data;
            run(backward, a);
          });
  };
  norm("layer_norm", ff_cpu_layer_norm_forward, ff_cpu_layer_norm_backward, ff_cpu_layer_norm_backward_workspace);
  norm("rms_norm", ff_cpu_rms_norm_forward, ff_cpu_rms_norm_backward, ff_cpu_rms_norm_backward_workspace);

  auto add_norm = [&](const std::string& name, auto forward, auto backward, auto workspace) {
    m.def((name + "_forward").c_str(),
          [=](py::handle x, py::handle residual, py::handle weight, py::handle bias, py::handle out, py::handle summed,
              py::handle mean, py::handle rstd, double eps, double dropout_p, uint64_t seed) {
            run(forward,
                ff::add_layer_norm_args(x, residual, weight, bias, out, summed, mean, rstd, eps, dropout_p, seed));
          });
    m.def((name + "_plain").c_str(), [=](py::handle x, py::handle residual, py::handle shape, py::handle weight,
                                         py::handle bias, double eps, py::handle out, py::handle summed) {
      auto run_norm = [=](const auto& a) { run(forward, a); };
      return ff::plain::attempt(
          [&] { return ff::plain::add_norm(run_norm, x, residual, shape, weight, bias, eps, out, summed); });
    });
    m.def((name + "_backward").c_str(),
          [=](py::handle dout, py::handle dsummed, py::handle summed, py::handle weight, py::handle mean,
              py::handle rstd, py::handle dx, py::handle dresidual, py::handle dweight, py::handle dbias,
              double dropout_p, uint64_t seed) {
            auto a = ff::add_layer_norm_backward_args(dout, dsummed, summed, weight, mean, rstd, dx, dresidual, dweight,
                                                      dbias, dropout_p, seed);
            const Scratch scratch(a.dweight || a.dbias ? workspace(&a) : 0);
            a.workspace = scratch.data;
            run(backward, a);
          });
  };
  add_norm("add_layer_norm", ff_cpu_add_layer_norm_forward, ff_cpu_add_layer_norm_backward,
           ff_cpu_add_layer_norm_backward_workspace);
  add_norm("add_rms_norm", ff_cpu_add_rms_norm_forward, ff_cpu_add_rms_norm_backward,
           ff_cpu_add_rms_norm_backward_workspace);

  m.def(
      "softmax_forward",
      [](py::handle x_, py::handle out, double scale, bool log, py::handle mask, py::handle bias, py::handle row_shape,
         bool causal) {
        const ff::Tensor x(x_);
        ff_softmax_args a{};
        a.dtype = ff_dtype(x.dtype), a.rows = x.rows(), a.cols = x.cols, a.x_stride = x.row_stride();
        a.scale = scale, a.log = log;
        a.x = x.data, a.out = ff::Tensor(out).data;
        if (!row_shape.is_none()) ff::add_to_scores(a, mask, bias, row_shape, causal);
        run(ff_cpu_softmax_forward, a);
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg("mask") = py::none(), py::arg("bias") = py::none(),
      py::arg("row_shape") = py::none(), py::arg("causal") = false);
  m.def(
      "softmax_backward",
      [](py::handle dout_, py::handle out_, py::handle dx, double scale, bool log, py::handle mask,
         py::handle row_shape, bool causal) {
        const ff::Tensor out(out_), dout(dout_);
        ff_softmax_args a{};
        a.dtype = ff_dtype(out.dtype), a.rows = out.rows(), a.cols = out.cols, a.dout_stride = dout.row_stride();
        a.scale = scale, a.log = log;
        a.out = out.data, a.dout = dout.data, a.dx = ff::Tensor(dx).data;
        if (!row_shape.is_none()) ff::add_to_scores(a, mask, py::none(), row_shape, causal);
        run(ff_cpu_softmax_backward, a);
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("mask") = py::none(),
      py::arg("row_shape") = py::none(), py::arg("causal") = false);

  m.def("softmax_plain", [](py::handle x, py::handle dim, bool log, py::handle out) {
    auto run_softmax = [](const auto& a) { run(ff_cpu_softmax_forward, a); };
    return ff::plain::attempt([&] { return ff::plain::softmax(run_softmax, x, dim, log, out); });
  });

  m.def("activation_plain", [](py::handle x, const std::string& kind, py::handle out) {
    auto run_activation = [](const auto& a) { run(ff_cpu_activation_forward, a); };
    return ff::plain::attempt([&] { return ff::plain::activation(run_activation, x, kind, out); });
  });
  m.def("activation_forward", [](py::handle x, py::handle bias, py::handle up, py::handle up_bias, py::handle out,
                                 const std::string& kind, double dropout_p, uint64_t seed) {
    run(ff_cpu_activation_forward, ff::activation_args(x, bias, up, up_bias, out, kind, dropout_p, seed));
  });
  m.def("activation_backward",
        [](py::handle dout, py::handle x, py::handle bias, py::handle up, py::handle up_bias, py::handle dx,
           py::handle dup, py::handle dbias, py::handle dup_bias, py::handle out, const std::string& kind,
           double dropout_p, uint64_t seed) {
          auto a = ff::activation_args(x, bias, up, up_bias, out, kind, dropout_p, seed);
          ff::set_activation_gradients(a, dout, dx, dup, dbias, dup_bias);
          const Scratch scratch(a.dbias || a.dup_bias ? ff_cpu_activation_backward_workspace(&a) : 0);
          a.workspace = scratch.data;
          run(ff_cpu_activation_backward, a);
        });

  m.def(
      "cross_entropy_forward",
      [](py::handle logits, py::handle target, py::handle weight, py::handle loss, py::handle lse, int64_t ignore_index,
         double label_smoothing, double z_loss, py::handle probabilities, py::handle dloss, py::handle dlogits) {
        auto a = ff::cross_entropy_args(logits, target, weight, ignore_index, label_smoothing, z_loss, probabilities);
        a.lse = ff::Tensor(lse).data, a.loss = ff::Tensor(loss).data;
        ff::set_gradients(a, dloss, dlogits);
        run(ff_cpu_cross_entropy_forward, a);
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("z_loss") = 0.0,
      py::arg("probabilities") = py::none(), py::arg("dloss") = py::none(), py::arg("dlogits") = py::none());
  m.def(
      "cross_entropy_backward",
      [](py::handle dloss, py::handle logits, py::handle target, py::handle weight, py::handle lse, py::handle dlogits,
         int64_t ignore_index, double label_smoothing, double z_loss, py::handle probabilities,
         py::handle dprobabilities) {
        auto a = ff::cross_entropy_args(logits, target, weight, ignore_index, label_smoothing, z_loss, probabilities);
        a.lse = ff::Tensor(lse).data, a.dprobabilities = ff::Tensor(dprobabilities).data;
        ff::set_gradients(a, dloss, dlogits);
        run(ff_cpu_cross_entropy_backward, a);
      },
      py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg(), py::arg("z_loss") = 0.0,
      py::arg("probabilities") = py::none(), py::arg("dprobabilities") = py::none());
  // The sum or the mean of the rows' losses into `loss`, one number in the dtype of the logits, and where dlogits is not
  // None their gradient: one call instead of the six that counting, dividing and summing take in Python.
  m.def("cross_entropy_reduced", [](py::handle logits, py::handle target, py::handle weight, py::handle loss_,
                                    int64_t ignore_index, double label_smoothing, double z_loss,
                                    py::handle probabilities, py::handle dlogits, bool mean) {
    auto a = ff::cross_entropy_args(logits, target, weight, ignore_index, label_smoothing, z_loss, probabilities);
    const ff::Tensor loss(loss_);
    a.dlogits = ff::Tensor(dlogits).data;
    check(cross_entropy_reduced(a, loss, mean));
  });
  m.def("cross_entropy_plain", [](py::handle logits, py::handle target, int64_t ignore_index, double label_smoothing,
                                  bool mean, py::handle loss) {
    auto reduce = [](const auto&... args) { return cross_entropy_reduced(args...) == FF_OK; };
    return ff::plain::attempt(
        [&] { return ff::plain::cross_entropy(reduce, logits, target, ignore_index, label_smoothing, mean, loss); });
  });

  m.def("embedding_forward", [](const py::tuple& tables, py::handle out_, double scale, bool normalize, double eps,
                                double dropout_p, uint64_t seed, py::handle weight, py::handle bias, py::handle mean,
                                py::handle rstd) {
    const ff::Tensor out(out_);
    auto a = ff::embedding_args(tables, out.rows(), scale, normalize, eps, dropout_p, seed, weight, bias, mean, rstd);
    a.out = out.data;
    run(ff_cpu_embedding_forward, a);
  });
  m.def("embedding_backward",
        [](py::handle dout_, const py::tuple& tables, double scale, bool normalize, double dropout_p, uint64_t seed,
           py::handle weight, py::handle mean, py::handle rstd, py::handle dsummed, const py::tuple& dtables,
           py::handle dweight, py::handle dbias) {
          const ff::Tensor dout(dout_);
          auto a = ff::embedding_args(tables, dout.rows(), scale, normalize, 0, dropout_p, seed, weight, py::none(), mean,
                                      rstd);
          ff::set_gradients(a, dout, dsummed, dtables, dweight, dbias);
          const Scratch scratch(ff_cpu_embedding_backward_workspace(&a));
          a.workspace = scratch.data;
          run(ff_cpu_embedding_backward, a);
        });
  m.def("rotary", [](py::handle q, py::handle q_out, py::handle k, py::handle k_out, py::handle cos, py::handle sin,
                     py::handle position_ids, int64_t offset, int64_t batch_offset, bool interleaved, bool inverse) {
    run(ff_cpu_rotary, ff::rotary_args(q, q_out, k, k_out, cos, sin, position_ids, offset, batch_offset, interleaved,
                                       inverse));
  });

  // Attention of tensors with nothing beside them, into out (B, Hq, Sq, Dv) and, if it is not None, lse (B, Hq, Sq); false
  // if anything about them is unusual or wrong, and nothing was done. The checks in Python cost more than a small call's
  // arithmetic.
  m.def("attention_plain", [](py::handle q_, py::handle k_, py::handle v_, py::handle out_, py::handle lse_,
                              double scale, bool causal) {
    const ff::Tensor q(q_), k(k_), v(v_), out(out_), lse(lse_);
    for (const ff::Tensor* t : {&q, &k, &v, &out})
      if (t->ndim != 4 || t->dtype < 0 || t->dtype != q.dtype || (t->stride[3] != 1 && t->shape[3] != 1)) return false;
    const int64_t *qs = q.shape, *ks = k.shape, *vs = v.shape, *os = out.shape;
    const bool fits = qs[0] == ks[0] && qs[0] == vs[0] && qs[0] == os[0] && ks[1] > 0 && ks[1] == vs[1] &&
                      qs[1] % ks[1] == 0 && qs[1] == os[1] && ks[2] == vs[2] && qs[2] == os[2] && qs[3] == ks[3] &&
                      vs[3] == os[3] && qs[3] >= 1 && qs[3] <= 256 && vs[3] >= 1 && vs[3] <= 256;
    if (!fits) return false;
    ff_attention_args a = ff::attention_args(q, k, v, out, lse);
    a.scale = scale, a.causal = causal;
    attention_forward(a);
    return true;
  });
  m.def("attention_forward", [](const py::tuple& tensors, const py::tuple& options) {
    attention_forward(ff::attention_args(tensors, options));
  });
  m.def("attention_backward", [](const py::tuple& tensors, const py::tuple& options, const py::tuple& gradients) {
    ff_attention_args a = ff::attention_args(tensors, options);
    ff::set_gradients(a, gradients);
    const Scratch scratch(ff_cpu_attention_backward_workspace(&a));
    a.workspace = scratch.data;
    run(ff_cpu_attention_backward, a);
  });
  // Bytes that forward and backward take beside their arguments.
  m.def("attention_workspace", [](const py::tuple& tensors, const py::tuple& options, const py::tuple& gradients) {
    ff_attention_args a = ff::attention_args(tensors, options);
    ff::set_gradients(a, gradients);
    return py::make_tuple(ff_cpu_attention_forward_workspace(&a), ff_cpu_attention_backward_workspace(&a));
  });
  m.def("decode_attention", [](const py::tuple& tensors, const py::tuple& options) {
    decode_attention(ff::decode_attention_args(tensors, options));
  });

  // x (*, K) times weight (N, K) plus start (N), (1, N) or (M, N) or None, into out (*, N), which may be start; false if
  // their shapes, dtypes or strides are not what the kernel takes, and nothing was done.
  m.def("linear", [](py::handle x, py::handle weight, py::handle start, py::handle out) {
    return ff::plain::attempt([&] {
      ff_linear_args a;
      if (!ff::linear_args(x, weight, start, out, a)) return false;
      const Scratch scratch(ff_cpu_linear_workspace(&a));
      a.workspace = scratch.data;
      run(ff_cpu_linear, a);
      return true;
    });
  });

  m.def("decoder_step_workspace", [](int64_t batch, int64_t num_layers, int64_t hidden_size, int64_t num_heads,
                                     int64_t intermediate_size, int64_t vocab_size, int64_t max_seqlen) {
    ff_decoder_step_args a{};
    a.batch = batch, a.num_layers = num_layers, a.hidden_size = hidden_size, a.num_heads = num_heads;
    a.intermediate_size = intermediate_size, a.vocab_size = vocab_size, a.max_seqlen = max_seqlen;
    return ff_cpu_decoder_step_workspace(&a);
  });
  m.def("decoder_step", [](int64_t batch, int64_t num_layers, int64_t hidden_size, int64_t num_heads,
                           int64_t intermediate_size, int64_t vocab_size, int64_t max_seqlen, double eps, bool tanh,
                           int64_t length, Ptr cache_start, Ptr tokens, Ptr positions, Ptr wte, Ptr wpe, Ptr layers,
                           Ptr attention_scale, Ptr ln_f_weight, Ptr ln_f_bias, Ptr head_weight, Ptr logits,
                           Ptr workspace) {
    ff_decoder_step_args a{};
    a.dtype = FF_FLOAT32;
    a.batch = batch, a.num_layers = num_layers, a.hidden_size = hidden_size, a.num_heads = num_heads;
    a.intermediate_size = intermediate_size, a.vocab_size = vocab_size, a.max_seqlen = max_seqlen;
    a.eps = eps, a.tanh = tanh, a.length = length;
    a.cache_start = ptr<int64_t>(cache_start), a.tokens = ptr<int64_t>(tokens), a.positions = ptr<int64_t>(positions);
    a.wte = ptr(wte), a.wpe = ptr(wpe), a.layers = ptr<ff_decoder_layer>(layers);
    a.attention_scale = ptr<double>(attention_scale);
    a.ln_f_weight = ptr(ln_f_weight), a.ln_f_bias = ptr(ln_f_bias), a.head_weight = ptr(head_weight);
    a.logits = ptr(logits), a.workspace = ptr(workspace);
    run(ff_cpu_decoder_step, a);
  });
}
