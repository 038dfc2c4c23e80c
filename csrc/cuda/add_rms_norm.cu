// add_rms_norm on a GPU: summed = residual + dropout(x), out = rms_norm(summed), and the gradients of both outputs.
//
// The kernels of add_layer_norm with a mean of 0.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c add_rms_norm.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c add_rms_norm.cu
#include "norm_entry.cuh"

extern "C" int ff_cuda_add_rms_norm_forward(const ff_add_rms_norm_args* a, void* stream) {
  return ff::add_norm_forward_entry<true>("add_rms_norm_forward", a, stream);
}

extern "C" size_t ff_cuda_add_rms_norm_backward_workspace(const ff_add_rms_norm_args* a) {
  return a ? ff::backward_workspace(a->rows, a->cols) : 0;
}

extern "C" int ff_cuda_add_rms_norm_backward(const ff_add_rms_norm_args* a, void* stream) {
  return ff::add_norm_backward_entry<true>("add_rms_norm_backward", a, stream);
}
