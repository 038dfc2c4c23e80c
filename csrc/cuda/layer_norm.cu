// layer_norm on a GPU: out = (x - mean) * rstd * weight + bias over rows, and its gradients (Ba, Kiros, Hinton 2016).
//
// Kernels and what makes them fast: layer_norm_forward.cuh, layer_norm_backward.cuh; arguments: norm_entry.cuh.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c layer_norm.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c layer_norm.cu
#include "norm_entry.cuh"

extern "C" int ff_cuda_layer_norm_forward(const ff_layer_norm_args* a, void* stream) {
  return ff::norm_forward_entry<false>("layer_norm_forward", a, stream);
}

extern "C" size_t ff_cuda_layer_norm_backward_workspace(const ff_layer_norm_args* a) {
  return a ? ff::backward_workspace(a->rows, a->cols) : 0;
}

extern "C" int ff_cuda_layer_norm_backward(const ff_layer_norm_args* a, void* stream) {
  return ff::norm_backward_entry<false>("layer_norm_backward", a, stream);
}
