// Python bindings of the CPU kernels: the C functions of fastformer.h with their struct's fields as positional integers
// and floats, in the struct's order (tensors as data_ptr()). No torch header: one build serves every torch version.
//
// Checks live in Python, before the call; a status other than FF_OK that still comes back becomes an exception.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../include/fastformer.h"

#ifndef FF_MODULE
#define FF_MODULE _C
#endif

namespace py = pybind11;
using Ptr = uintptr_t;
using Strides = std::array<int64_t, 4>;  // of a (B, H, S, D) tensor; the last is 1

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

static void set_strides(int64_t (&to)[3], const Strides& from) { std::copy(from.begin(), from.begin() + 3, to); }

static ff_attention_args attention_sizes(int dtype, int64_t batch, int64_t num_heads, int64_t num_kv_heads,
                                         int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v) {
  ff_attention_args a{};
  a.dtype = ff_dtype(dtype), a.batch = batch, a.num_heads = num_heads, a.num_kv_heads = num_kv_heads;
  a.seqlen_q = seqlen_q, a.seqlen_k = seqlen_k, a.head_dim = head_dim, a.head_dim_v = head_dim_v;
  return a;
}

PYBIND11_MODULE(FF_MODULE, m) {
  m.def("cpu_isa", [] { return ff_cpu_isa(); });
  m.def("set_cpu_isa", [](const char* name) { check(ff_cpu_set_isa(name)); });
  // Asks for 2 MiB pages behind [address, address + bytes): memory fresh from the system is then faulted in 512 times
  // less often, which otherwise takes longer than filling it.
  m.def("advise_huge_pages", [](Ptr address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr Ptr page = 4096;
    const Ptr begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
    if (begin < end) madvise(ptr(begin), end - begin, MADV_HUGEPAGE);
#endif
  });

  m.def("layer_norm_forward", [](int dtype, int param_dtype, int64_t rows, int64_t cols, int64_t x_stride, double eps,
                                 Ptr x, Ptr weight, Ptr bias, Ptr out, Ptr mean, Ptr rstd) {
    ff_layer_norm_args a{};
    a.dtype = ff_dtype(dtype), a.param_dtype = ff_dtype(param_dtype);
    a.rows = rows, a.cols = cols, a.x_stride = x_stride, a.eps = eps;
    a.x = ptr(x), a.weight = ptr(weight), a.bias = ptr(bias);
    a.out = ptr(out), a.mean = ptr(mean), a.rstd = ptr(rstd);
    run(ff_cpu_layer_norm_forward, a);
  });
  m.def("layer_norm_backward_workspace", [](int dtype, int64_t rows, int64_t cols) {
    ff_layer_norm_args a{};
    a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols;
    return ff_cpu_layer_norm_backward_workspace(&a);
  });
  m.def("layer_norm_backward",
        [](int dtype, int param_dtype, int64_t rows, int64_t cols, int64_t x_stride, int64_t dout_stride, Ptr x,
           Ptr weight, Ptr mean, Ptr rstd, Ptr dout, Ptr dx, Ptr dweight, Ptr dbias, Ptr workspace) {
          ff_layer_norm_args a{};
          a.dtype = ff_dtype(dtype), a.param_dtype = ff_dtype(param_dtype);
          a.rows = rows, a.cols = cols, a.x_stride = x_stride, a.dout_stride = dout_stride;
          a.x = ptr(x), a.weight = ptr(weight), a.mean = ptr(mean), a.rstd = ptr(rstd);
          a.dout = ptr(dout), a.dx = ptr(dx), a.dweight = ptr(dweight), a.dbias = ptr(dbias);
          a.workspace = ptr(workspace);
          run(ff_cpu_layer_norm_backward, a);
        });

  m.def("add_layer_norm_forward",
        [](int dtype, int param_dtype, int64_t rows, int64_t cols, int64_t x_stride, int64_t residual_stride,
           double eps, double dropout_p, uint64_t seed, Ptr x, Ptr residual, Ptr weight, Ptr bias, Ptr out, Ptr summed,
           Ptr mean, Ptr rstd) {
          ff_add_layer_norm_args a{};
          a.dtype = ff_dtype(dtype), a.param_dtype = ff_dtype(param_dtype);
          a.rows = rows, a.cols = cols, a.x_stride = x_stride, a.residual_stride = residual_stride;
          a.eps = eps, a.dropout_p = dropout_p, a.seed = seed;
          a.x = ptr(x), a.residual = ptr(residual), a.weight = ptr(weight), a.bias = ptr(bias);
          a.out = ptr(out), a.summed = ptr(summed), a.mean = ptr(mean), a.rstd = ptr(rstd);
          run(ff_cpu_add_layer_norm_forward, a);
        });
  m.def("add_layer_norm_backward",
        [](int dtype, int param_dtype, int64_t rows, int64_t cols, int64_t dout_stride, int64_t dsummed_stride,
           double dropout_p, uint64_t seed, Ptr weight, Ptr summed, Ptr mean, Ptr rstd, Ptr dout, Ptr dsummed, Ptr dx,
           Ptr dresidual, Ptr dweight, Ptr dbias, Ptr workspace) {
          ff_add_layer_norm_args a{};
          a.dtype = ff_dtype(dtype), a.param_dtype = ff_dtype(param_dtype);
          a.rows = rows, a.cols = cols, a.dout_stride = dout_stride, a.dsummed_stride = dsummed_stride;
          a.dropout_p = dropout_p, a.seed = seed;
          a.weight = ptr(weight), a.summed = ptr(summed), a.mean = ptr(mean), a.rstd = ptr(rstd);
          a.dout = ptr(dout), a.dsummed = ptr(dsummed), a.dx = ptr(dx), a.dresidual = ptr(dresidual);
          a.dweight = ptr(dweight), a.dbias = ptr(dbias), a.workspace = ptr(workspace);
          run(ff_cpu_add_layer_norm_backward, a);
        });

  m.def("softmax_forward", [](int dtype, int64_t rows, int64_t cols, int64_t x_stride, double scale, bool log, Ptr x,
                              Ptr out) {
    ff_softmax_args a{};
    a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols, a.x_stride = x_stride, a.scale = scale, a.log = log;
    a.x = ptr(x), a.out = ptr(out);
    run(ff_cpu_softmax_forward, a);
  });
  m.def("softmax_backward", [](int dtype, int64_t rows, int64_t cols, int64_t dout_stride, double scale, bool log,
                               Ptr out, Ptr dout, Ptr dx) {
    ff_softmax_args a{};
    a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols, a.dout_stride = dout_stride, a.scale = scale, a.log = log;
    a.out = ptr(out), a.dout = ptr(dout), a.dx = ptr(dx);
    run(ff_cpu_softmax_backward, a);
  });

  m.def("gelu_forward", [](int dtype, int64_t rows, int64_t cols, bool tanh, Ptr x, Ptr bias, Ptr out) {
    ff_gelu_args a{};
    a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols, a.tanh = tanh;
    a.x = ptr(x), a.bias = ptr(bias), a.out = ptr(out);
    run(ff_cpu_gelu_forward, a);
  });
  m.def("gelu_backward_workspace", [](int dtype, int64_t rows, int64_t cols) {
    ff_gelu_args a{};
    a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols;
    return ff_cpu_gelu_backward_workspace(&a);
  });
  m.def("gelu_backward", [](int dtype, int64_t rows, int64_t cols, bool tanh, Ptr x, Ptr bias, Ptr dout, Ptr dx,
                            Ptr dbias, Ptr workspace) {
    ff_gelu_args a{};
    a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols, a.tanh = tanh;
    a.x = ptr(x), a.bias = ptr(bias), a.dout = ptr(dout);
    a.dx = ptr(dx), a.dbias = ptr(dbias), a.workspace = ptr(workspace);
    run(ff_cpu_gelu_backward, a);
  });

  m.def("cross_entropy_forward",
        [](int dtype, int64_t rows, int64_t cols, int64_t logits_stride, int64_t ignore_index, double label_smoothing,
           Ptr logits, Ptr target, Ptr weight, Ptr loss, Ptr lse) {
          ff_cross_entropy_args a{};
          a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols, a.logits_stride = logits_stride;
          a.ignore_index = ignore_index, a.label_smoothing = label_smoothing;
          a.logits = ptr(logits), a.target = ptr<const int64_t>(target), a.weight = ptr(weight);
          a.loss = ptr(loss), a.lse = ptr(lse);
          run(ff_cpu_cross_entropy_forward, a);
        });
  m.def("cross_entropy_backward",
        [](int dtype, int64_t rows, int64_t cols, int64_t logits_stride, int64_t ignore_index, double label_smoothing,
           Ptr logits, Ptr target, Ptr weight, Ptr lse, Ptr dloss, int64_t dloss_stride, Ptr dlogits) {
          ff_cross_entropy_args a{};
          a.dtype = ff_dtype(dtype), a.rows = rows, a.cols = cols, a.logits_stride = logits_stride;
          a.ignore_index = ignore_index, a.label_smoothing = label_smoothing;
          a.logits = ptr(logits), a.target = ptr<const int64_t>(target), a.weight = ptr(weight), a.lse = ptr(lse);
          a.dloss = ptr(dloss), a.dloss_stride = dloss_stride, a.dlogits = ptr(dlogits);
          run(ff_cpu_cross_entropy_backward, a);
        });

  m.def("attention_forward_workspace", [](int dtype, int64_t batch, int64_t num_heads, int64_t num_kv_heads,
                                          int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v,
                                          bool causal, bool has_mask) {
    ff_attention_args a = attention_sizes(dtype, batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v);
    a.causal = causal, a.key_padding_mask = ptr<uint8_t>(has_mask);
    return ff_cpu_attention_forward_workspace(&a);
  });
  m.def("attention_backward_workspace", [](int dtype, int64_t batch, int64_t num_heads, int64_t num_kv_heads,
                                           int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v,
                                           bool causal, bool has_mask) {
    ff_attention_args a = attention_sizes(dtype, batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v);
    a.causal = causal, a.key_padding_mask = ptr<uint8_t>(has_mask);
    return ff_cpu_attention_backward_workspace(&a);
  });
  m.def("attention_forward",
        [](int dtype, int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t seqlen_q, int64_t seqlen_k,
           int64_t head_dim, int64_t head_dim_v, double scale, bool causal, Ptr mask, int64_t mask_stride, Ptr q, Ptr k,
           Ptr v, Ptr out, Ptr lse, const Strides& q_stride, const Strides& k_stride, const Strides& v_stride,
           const Strides& out_stride, Ptr workspace) {
          ff_attention_args a =
              attention_sizes(dtype, batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v);
          a.scale = scale, a.causal = causal;
          a.key_padding_mask = ptr<uint8_t>(mask), a.key_padding_mask_stride = mask_stride;
          a.q = ptr(q), a.k = ptr(k), a.v = ptr(v), a.out = ptr(out), a.lse = ptr(lse);
          set_strides(a.q_stride, q_stride), set_strides(a.k_stride, k_stride), set_strides(a.v_stride, v_stride);
          set_strides(a.out_stride, out_stride);
          a.workspace = ptr(workspace);
          run(ff_cpu_attention_forward, a);
        });
  m.def("attention_backward",
        [](int dtype, int64_t batch, int64_t num_heads, int64_t num_kv_heads, int64_t seqlen_q, int64_t seqlen_k,
           int64_t head_dim, int64_t head_dim_v, double scale, bool causal, Ptr mask, int64_t mask_stride, Ptr q, Ptr k,
           Ptr v, Ptr out, Ptr lse, const Strides& q_stride, const Strides& k_stride, const Strides& v_stride,
           const Strides& out_stride, Ptr dout, Ptr dlse, Ptr dq, Ptr dk, Ptr dv, const Strides& dout_stride,
           const Strides& dq_stride, const Strides& dk_stride, const Strides& dv_stride, Ptr workspace) {
          ff_attention_args a =
              attention_sizes(dtype, batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v);
          a.scale = scale, a.causal = causal;
          a.key_padding_mask = ptr<uint8_t>(mask), a.key_padding_mask_stride = mask_stride;
          a.q = ptr(q), a.k = ptr(k), a.v = ptr(v), a.out = ptr(out), a.lse = ptr(lse);
          set_strides(a.q_stride, q_stride), set_strides(a.k_stride, k_stride), set_strides(a.v_stride, v_stride);
          set_strides(a.out_stride, out_stride);
          a.dout = ptr(dout), a.dlse = ptr(dlse), a.dq = ptr(dq), a.dk = ptr(dk), a.dv = ptr(dv);
          set_strides(a.dout_stride, dout_stride), set_strides(a.dq_stride, dq_stride);
          set_strides(a.dk_stride, dk_stride), set_strides(a.dv_stride, dv_stride);
          a.workspace = ptr(workspace);
          run(ff_cpu_attention_backward, a);
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
