// What layer_norm.cu, rms_norm.cu and their add_ counterparts share: from the arguments of fastformer.h to the kernels.
// RMS: rms_norm, which has no mean.
#pragma once
#include "layer_norm_backward.cuh"
#include "layer_norm_forward.cuh"

namespace ff {

template <bool RMS> int check_norm(const ff_layer_norm_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->rows == 0 || (a->x && (RMS || a->mean) && a->rstd), "x%s, rstd: must not be NULL", RMS ? "" : ", mean");
  return check_dtypes(a->dtype, a->param_dtype);
}

template <bool RMS> int norm_forward_entry(const char* name, const ff_layer_norm_args* a, void* stream) {
  if (int status = check_norm<RMS>(a)) return status;
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
    return run_norm_forward<false, RMS>(name, k, vector, stream);
  });
}

template <bool RMS> int norm_backward_entry(const char* name, const ff_layer_norm_args* a, void* stream) {
  if (int status = check_norm<RMS>(a)) return status;
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
    return run_norm_backward<false, RMS>(name, k, vector, stream);
  });
}

template <bool RMS> int check_add_norm(const ff_add_layer_norm_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->dropout_p >= 0 && a->dropout_p <= 1, "dropout_p: %g is not in [0, 1]", a->dropout_p);
  FF_REQUIRE(a->rows == 0 || (a->summed && (RMS || a->mean) && a->rstd), "summed%s, rstd: must not be NULL",
             RMS ? "" : ", mean");
  return check_dtypes(a->dtype, a->param_dtype);
}

template <bool RMS> int add_norm_forward_entry(const char* name, const ff_add_layer_norm_args* a, void* stream) {
  if (int status = check_add_norm<RMS>(a)) return status;
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
    return run_norm_forward<true, RMS>(name, k, vector, stream);
  });
}

template <bool RMS> int add_norm_backward_entry(const char* name, const ff_add_layer_norm_args* a, void* stream) {
  if (int status = check_add_norm<RMS>(a)) return status;
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
    return run_norm_backward<true, RMS>(name, k, vector, stream);
  });
}

}  // namespace ff
