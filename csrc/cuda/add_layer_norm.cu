// add_layer_norm on a GPU: summed = residual + dropout(x), out = layer_norm(summed), and the gradients of both outputs.
//
// The kernels of layer_norm with the sum in front (forward) and behind (backward): one pass over memory for the three
// operations, and a dropout mask that is recomputed, not stored.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c add_layer_norm.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c add_layer_norm.cu
#include "layer_norm_backward.cuh"
#include "layer_norm_forward.cuh"

namespace ff {
namespace {

int check(const ff_add_layer_norm_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->dropout_p >= 0 && a->dropout_p <= 1, "dropout_p: %g is not in [0, 1]", a->dropout_p);
  FF_REQUIRE(a->rows == 0 || (a->summed && a->mean && a->rstd), "summed, mean, rstd: must not be NULL");
  return check_dtypes(a->dtype, a->param_dtype);
}

}  // namespace
}  // namespace ff

extern "C" int ff_cuda_add_layer_norm_forward(const ff_add_layer_norm_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  FF_REQUIRE(a->eps >= 0, "eps: %g is negative", a->eps);
  FF_REQUIRE(a->rows == 0 || (a->x && a->residual && a->out), "x, residual, out: must not be NULL");
  const bool vector = whole_vectors(a->dtype, {a->cols, a->x_stride, a->residual_stride},
                                    {a->x, a->residual, a->weight, a->bias, a->out, a->summed});
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    NormForward<T, P> k{};
    k.rows = a->rows, k.cols = a->cols, k.x_stride = a->x_stride, k.residual_stride = a->residual_stride;
    k.eps = float(a->eps), k.inverse_cols = float(1.0 / double(a->cols));
    k.x = static_cast<const T*>(a->x), k.residual = static_cast<const T*>(a->residual);
    k.weight = static_cast<const P*>(a->weight), k.bias = static_cast<const P*>(a->bias);
    k.out = static_cast<T*>(a->out), k.summed = static_cast<T*>(a->summed);
    k.mean = static_cast<float*>(a->mean), k.rstd = static_cast<float*>(a->rstd);
    k.dropout = make_dropout(a->dropout_p, a->seed);
    return run_norm_forward<true>("add_layer_norm_forward", k, vector, stream);
  });
}

extern "C" size_t ff_cuda_add_layer_norm_backward_workspace(const ff_add_layer_norm_args* a) {
  return a ? ff::backward_workspace(a->rows, a->cols) : 0;
}

extern "C" int ff_cuda_add_layer_norm_backward(const ff_add_layer_norm_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  const bool parameters = a->dweight || a->dbias;
  FF_REQUIRE(a->rows == 0 || (a->dout && a->dresidual), "dout, dresidual: must not be NULL");
  FF_REQUIRE(a->rows == 0 || !parameters || a->workspace,
             "workspace: must not be NULL when dweight or dbias is asked for");
  FF_REQUIRE(aligned16(a->workspace), "workspace: must be aligned to 16 bytes");
  const bool vector = whole_vectors(a->dtype, {a->cols, a->dout_stride, a->dsummed ? a->dsummed_stride : 0},
                                    {a->summed, a->weight, a->dout, a->dsummed, a->dx, a->dresidual});
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    NormBackward<T, P> k{};
    k.rows = a->rows, k.cols = a->cols;
    k.x_stride = a->cols, k.dout_stride = a->dout_stride, k.dsummed_stride = a->dsummed_stride;
    k.inverse_cols = float(1.0 / double(a->cols));
    k.x = static_cast<const T*>(a->summed), k.dout = static_cast<const T*>(a->dout);
    k.dsummed = static_cast<const T*>(a->dsummed);
    k.dx = static_cast<T*>(a->dx), k.dresidual = static_cast<T*>(a->dresidual);
    k.weight = static_cast<const P*>(a->weight);
    k.mean = static_cast<const float*>(a->mean), k.rstd = static_cast<const float*>(a->rstd);
    k.dweight = static_cast<P*>(a->dweight), k.dbias = static_cast<P*>(a->dbias);
    k.partial = parameters ? static_cast<float*>(a->workspace) : nullptr;
    k.dropout = make_dropout(a->dropout_p, a->seed);
    return run_norm_backward<true>("add_layer_norm_backward", k, vector, stream);
  });
}
