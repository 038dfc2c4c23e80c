// layer_norm on a GPU: out = (x - mean) * rstd * weight + bias over rows, and its gradients (Ba, Kiros, Hinton 2016).
//
// Kernels and what makes them fast: layer_norm_forward.cuh, layer_norm_backward.cuh. Here: arguments, dtypes,
//   alignment. nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80
//     -gencode=arch=compute_90a,code=sm_90a -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c layer_norm.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c layer_norm.cu
#include "layer_norm_backward.cuh"
#include "layer_norm_forward.cuh"

namespace ff {
namespace {

int check(const ff_layer_norm_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->rows == 0 || (a->x && a->mean && a->rstd), "x, mean, rstd: must not be NULL");
  return check_dtypes(a->dtype, a->param_dtype);
}

}  // namespace
}  // namespace ff

extern "C" int ff_cuda_layer_norm_forward(const ff_layer_norm_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  FF_REQUIRE(a->eps >= 0, "eps: %g is negative", a->eps);
  FF_REQUIRE(a->rows == 0 || a->out, "out: must not be NULL");
  const bool vector = whole_vectors(a->dtype, {a->cols, a->x_stride}, {a->x, a->weight, a->bias, a->out});
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    NormForward<T, P> k{};
    k.rows = a->rows, k.cols = a->cols, k.x_stride = a->x_stride;
    k.eps = float(a->eps), k.inverse_cols = float(1.0 / double(a->cols));
    k.x = static_cast<const T*>(a->x), k.out = static_cast<T*>(a->out);
    k.weight = static_cast<const P*>(a->weight), k.bias = static_cast<const P*>(a->bias);
    k.mean = static_cast<float*>(a->mean), k.rstd = static_cast<float*>(a->rstd);
    return run_norm_forward<false>("layer_norm_forward", k, vector, stream);
  });
}

extern "C" size_t ff_cuda_layer_norm_backward_workspace(const ff_layer_norm_args* a) {
  return a ? ff::backward_workspace(a->rows, a->cols) : 0;
}

extern "C" int ff_cuda_layer_norm_backward(const ff_layer_norm_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  const bool parameters = a->dweight || a->dbias;
  FF_REQUIRE(a->rows == 0 || a->dout, "dout: must not be NULL");
  FF_REQUIRE(a->rows == 0 || !parameters || a->workspace,
             "workspace: must not be NULL when dweight or dbias is asked for");
  FF_REQUIRE(aligned16(a->workspace), "workspace: must be aligned to 16 bytes");
  const bool vector =
      whole_vectors(a->dtype, {a->cols, a->x_stride, a->dout_stride}, {a->x, a->weight, a->dout, a->dx});
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    NormBackward<T, P> k{};
    k.rows = a->rows, k.cols = a->cols, k.x_stride = a->x_stride, k.dout_stride = a->dout_stride;
    k.inverse_cols = float(1.0 / double(a->cols));
    k.x = static_cast<const T*>(a->x), k.dout = static_cast<const T*>(a->dout), k.dx = static_cast<T*>(a->dx);
    k.weight = static_cast<const P*>(a->weight);
    k.mean = static_cast<const float*>(a->mean), k.rstd = static_cast<const float*>(a->rstd);
    k.dweight = static_cast<P*>(a->dweight), k.dbias = static_cast<P*>(a->dbias);
    k.partial = parameters ? static_cast<float*>(a->workspace) : nullptr;
    return run_norm_backward<false>("layer_norm_backward", k, vector, stream);
  });
}
