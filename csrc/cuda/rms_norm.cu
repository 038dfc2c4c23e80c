// rms_norm on a GPU: out = x * rstd * weight + bias, rstd = 1 / sqrt(mean(x^2) + eps), and its gradients (Zhang, Sennrich
// 2019).
//
// The kernels of layer_norm with a mean of 0: one sum per row less, forward and backward.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c rms_norm.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c rms_norm.cu
#include "norm_entry.cuh"

extern "C" int ff_cuda_rms_norm_forward(const ff_rms_norm_args* a, void* stream) {
  return ff::norm_forward_entry<true>("rms_norm_forward", a, stream);
}

extern "C" size_t ff_cuda_rms_norm_backward_workspace(const ff_rms_norm_args* a) {
  return a ? ff::backward_workspace(a->rows, a->cols) : 0;
}

extern "C" int ff_cuda_rms_norm_backward(const ff_rms_norm_args* a, void* stream) {
  return ff::norm_backward_entry<true>("rms_norm_backward", a, stream);
}
