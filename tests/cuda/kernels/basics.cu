// Barriers, shuffles and shared memory, each right once (bug 0) and wrong in ways the emulator must notice.
#include "run.h"

namespace {

// y = x reversed within each block, through shared memory.
template <int bug> __global__ void reverse(const float* x, float* y) {
  FF_SHARED(float, tile, [256]);
  const int t = threadIdx.x, n = blockDim.x;
  if (bug != 3) tile[t] = x[blockIdx.x * n + t];  // bug 3: shared memory is read before anything was written
  if (bug == 2 && t < 32) return;                 // bug 2: a warp leaves before the barrier
  if (bug != 1) __syncthreads();                  // bug 1: no barrier
  y[blockIdx.x * n + t] = tile[n - 1 - t];
}

// y[i] = sum of x over the warp of i. Bug 1: the upper lanes do not take part. Bug 2: the mask lacks the lane read
// from. Bug 3: lanes disagree about the mask.
template <int bug> __global__ void warp_sum(const float* x, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  float v = x[i];
  unsigned mask = ~0u;
  if (bug == 2) mask = lane < 16 ? 0xffffu : 0xffff0000u;
  if (bug == 3) mask = lane < 16 ? ~0u : 0x7fffffffu;
  if (bug != 1 || lane < 24) {
    for (int other = 16; other; other /= 2) v += __shfl_xor_sync(mask, v, other);
  }
  y[i] = v;
}

// y[i] = what the __shfl_* function `bug` names gives lane i: 0 idx within 8 lanes, 1 up 3, 2 down 3 in 16 lanes, 3 xor
// 1.
template <int which> __global__ void shuffles(const float* x, float* y) {
  const float v = x[threadIdx.x];
  const int t = threadIdx.x;
  y[t] = which == 0   ? __shfl_sync(~0u, v, 2, 8)
         : which == 1 ? __shfl_up_sync(~0u, v, 3)
         : which == 2 ? __shfl_down_sync(~0u, v, 3, 16)
                      : __shfl_xor_sync(~0u, v, 1) + float(__ballot_sync(~0u, t % 3 == 0) % 1024);
}

// A block of 100 threads counts its odd values, one atomic each.
template <int> __global__ void count_odd(const float* x, float* y) {
  FF_SHARED(float, count);
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (int(x[threadIdx.x]) % 2) atomicAdd(&count, 1.f);
  __syncthreads();
  if (threadIdx.x == 0) y[0] = count;
}

// More dynamic shared memory than asked for, or more threads than a block may have.
template <int> __global__ void large(const float*, float* y) {
  FF_DYNAMIC_SHARED(float, all);
  y[threadIdx.x] = all[threadIdx.x];
}

template <int bug> int run(int kernel, const float* x, float* y) {
  switch (kernel) {
    case 0: return ff::launch("reverse", reverse<bug>, dim3(3), dim3(256), 0, nullptr, x, y);
    case 1: return ff::launch("warp_sum", warp_sum<bug>, dim3(2), dim3(64), 0, nullptr, x, y);
    case 2: return ff::launch("shuffles", shuffles<bug>, dim3(1), dim3(32), 0, nullptr, x, y);
    case 3: return ff::launch("count_odd", count_odd<bug>, dim3(1), dim3(100), 0, nullptr, x, y);
    default: return ff::launch("large", large<bug>, dim3(1), dim3(bug ? 1025 : 64), bug ? 0 : 228 << 10, nullptr, x, y);
  }
}

}  // namespace

extern "C" FF_API int run_basics(int kernel, int bug, const float* x, float* y) {
  const auto chosen = bug == 0 ? run<0> : bug == 1 ? run<1> : bug == 2 ? run<2> : run<3>;
  return chosen(kernel, x, y);
}
