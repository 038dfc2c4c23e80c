// Clusters of blocks and distributed shared memory, each right once (bug 0) and wrong in ways the emulator must notice.
#include "../../../csrc/cuda/cluster.cuh"
#include "run.h"

namespace {

// y[i] = sum of x over the cluster of i, two rounds of it, so that a buffer is used again.
template <int bug> __global__ void pushed_sum(const float* x, float* y) {
  FF_CLUSTERS_ONLY(true);
  FF_SHARED(float, numbers, [2][ff::kMaxCluster]);
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t, size = ff::cluster_size();
  float v = x[i];
  if (bug != 1) ff::cluster_arrive(), ff::cluster_wait();  // bug 1: others may not have started
  for (int round = 0; round < 2; round++) {
    for (int other = 16; other; other /= 2) v += __shfl_xor_sync(~0u, v, other);
    float(&buffer)[ff::kMaxCluster] = numbers[bug == 2 ? 0 : round];  // bug 2: a buffer that others may still read
    if (t < size) ff::store_remote(&buffer[ff::cluster_rank()], t, v);
    if (bug != 3) ff::cluster_arrive();
    if (bug != 3 && bug != 4) ff::cluster_wait();  // bug 3: no barrier; bug 4: arrives without waiting
    v = 0;
    for (int r = 0; r < size; r++) v += buffer[r];
    v /= 32 * size;
  }
  y[i] = v * 32 * size;
}

// y[i] = x of the same thread in the next block. Bug 1: nothing keeps a block from ending while it is read. Bug 2: a
// block of the cluster that does not exist. Bug 3: waits for a barrier at which it has not arrived.
template <int bug> __global__ void pulled(const float* x, float* y) {
  FF_CLUSTERS_ONLY(true);
  FF_SHARED(float, tile, [32]);
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t, size = ff::cluster_size();
  tile[t] = x[i];
  if (bug != 3) ff::cluster_arrive();
  ff::cluster_wait();
  y[i] = ff::load_remote(&tile[t], bug == 2 ? size : (ff::cluster_rank() + 1) % size);
  if (bug != 1) ff::cluster_arrive(), ff::cluster_wait();
}

// Block 0 waits at the cluster's barrier, the others have left: threads that have ended are not waited for. Bug 1: it
// needs another block's arrival at a barrier of the block itself.
template <int bug> __global__ void early_exit(const float* x, float* y) {
  FF_CLUSTERS_ONLY(true);
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  y[i] = x[i];
  if (ff::cluster_rank() || (bug == 1 && t == 0)) return;
  ff::cluster_arrive();
  ff::cluster_wait();
  if (bug == 1) __syncthreads();
}

template <int bug> int run(int kernel, int cluster, int blocks, const float* x, float* y) {
  const auto chosen = kernel == 0 ? pushed_sum<bug> : kernel == 1 ? pulled<bug> : early_exit<bug>;
  return ff::launch_clusters("cluster", chosen, cluster, dim3(unsigned(blocks)), dim3(32), 0, nullptr, x, y);
}

}  // namespace

extern "C" FF_API int run_cluster(int kernel, int bug, int cluster, int blocks, const float* x, float* y) {
  const auto chosen = bug == 0 ? run<0> : bug == 1 ? run<1> : bug == 2 ? run<2> : bug == 3 ? run<3> : run<4>;
  return chosen(kernel, cluster, blocks, x, y);
}
