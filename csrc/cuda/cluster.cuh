// Thread-block clusters (Hopper, sm_90): blocks that run at the same time and reach each other's shared memory.
//
// On a GPU each function is one PTX instruction or two; with -DFF_EMULATE the emulator does the same on a CPU. For
// sm_80 the functions are empty: a kernel on clusters starts with FF_CLUSTERS_ONLY, and launchers ask is_hopper().
#pragma once
#include "common.cuh"

#if defined(FF_EMULATE) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define FF_HAS_CLUSTERS 1
#else
#define FF_HAS_CLUSTERS 0
#endif
// Leaves nothing of a kernel with `condition` where there are no clusters.
#define FF_CLUSTERS_ONLY(condition) \
  if constexpr ((condition) && !FF_HAS_CLUSTERS) return

namespace ff {

constexpr int kMaxCluster = 16;  // blocks

#if defined(FF_EMULATE)
FF_DEVICE int cluster_rank() { return emulation::block.rank; }
FF_DEVICE int cluster_size() { return emulation::block.cluster; }
FF_DEVICE void cluster_arrive() { emulation::cluster_arrive(); }
FF_DEVICE void cluster_wait() { emulation::cluster_wait(); }
FF_DEVICE void store_remote(float* p, int rank, float value) {
  emulation::remote_address(p, sizeof *p, rank);
  emulation::store_remotely([=] { memcpy(emulation::remote_address(p, sizeof *p, rank), &value, sizeof value); });
}
FF_DEVICE float load_remote(const float* p, int rank) {
  return *static_cast<const float*>(emulation::remote_address(p, sizeof *p, rank));
}
#else
FF_DEVICE int cluster_rank() {
  uint32_t rank = 0;
#if FF_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}
FF_DEVICE int cluster_size() {
  uint32_t size = 1;
#if FF_HAS_CLUSTERS
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return int(size);
}
// What a thread wrote before it arrived, to any block's shared memory, is there for all who have waited.
FF_DEVICE void cluster_arrive() {
#if FF_HAS_CLUSTERS
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
FF_DEVICE void cluster_wait() {
#if FF_HAS_CLUSTERS
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}
// The address of this block's shared variable p in block `rank` of the cluster. A block may be addressed once it has
// started and until it ends: both take a barrier.
FF_DEVICE uint32_t remote_address(const float* p, int rank) {
  uint32_t address = 0;
#if FF_HAS_CLUSTERS
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(uint32_t(__cvta_generic_to_shared(p))), "r"(rank));
#endif
  return address;
}
FF_DEVICE void store_remote(float* p, int rank, float value) {
#if FF_HAS_CLUSTERS
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote_address(p, rank)), "f"(value) : "memory");
#endif
}
FF_DEVICE float load_remote(const float* p, int rank) {
  float value = 0;
#if FF_HAS_CLUSTERS
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote_address(p, rank)) : "memory");
#endif
  return value;
}
#endif

// K numbers of every block, at every block. All threads of the cluster must call, with their block's numbers. Blocks
// only ever write to each other, and after the last barrier none does, so a block may end when it likes. The two
// buffers take turns for the same reason as in RowSum (row.cuh). Without clusters there is nothing to it.
template <bool CLUSTER, int K> struct ClusterExchange {
  static constexpr int kBlocks = CLUSTER ? kMaxCluster : 1;
  float (&numbers)[2][kBlocks][K];
  int turn = 0;
  bool all_started = false;
  FF_DEVICE explicit ClusterExchange(float (&shared)[2][kBlocks][K]) : numbers(shared) {
    if constexpr (CLUSTER) cluster_arrive();
  }

  // By rank, valid until the exchange after the next.
  FF_DEVICE const float (&operator()(const float (&mine)[K]))[kBlocks][K] {
    if (!all_started) cluster_wait();
    all_started = true;
    const int now = turn, to = int(threadIdx.x);
    if (to < cluster_size()) {
#pragma unroll
      for (int k = 0; k < K; k++) store_remote(&numbers[now][cluster_rank()][k], to, mine[k]);
    }
    cluster_arrive();
    cluster_wait();
    turn ^= 1;
    return numbers[now];
  }
};

// The part of a row one block of a cluster works on: all of it without clusters.
template <bool CLUSTER> struct Slice {
  int begin, end, rank, blocks;
  int64_t first_row, row_step;  // of the block's, or cluster's, walk over the rows
  FF_DEVICE Slice(int64_t cols, int slice) {
    rank = CLUSTER ? cluster_rank() : 0, blocks = CLUSTER ? cluster_size() : 1;
    begin = CLUSTER ? rank * slice : 0;
    end = CLUSTER ? min(int(cols), begin + slice) : int(cols);
    first_row = int64_t(CLUSTER ? blockIdx.x / blocks : blockIdx.x) * blockDim.y;
    row_step = int64_t(CLUSTER ? gridDim.x / blocks : gridDim.x) * blockDim.y;
  }
};

// Columns of each block: whole groups of 32, so that vectors stay aligned and dropout's groups (philox.cuh) whole.
inline int cluster_slice(int64_t cols, int cluster) { return int((cols + cluster * 32 - 1) / (cluster * 32) * 32); }

// Blocks of a cluster for rows of which one block can hold `most` columns; 0 where clusters do not help.
inline int cluster_for(int64_t cols, int64_t most) {
  if (!is_hopper() || cols > most * kMaxCluster) return 0;
  for (int cluster = 2; cluster <= kMaxCluster; cluster *= 2)
    if (cluster_slice(cols, cluster) <= most) return cluster;
  return 0;
}

inline dim3 grid_of_clusters(int64_t count, int cluster) {
  const int64_t most = 0x7fffffff / cluster;
  return dim3(unsigned((count < most ? count : most) * cluster));
}

}  // namespace ff
