// csrc/cuda/sm80.h on the emulator. Late copies happen where the program waits for them, no earlier: code that reads
// sooner finds the poison of shared memory, and code that overwrites the source first copies the wrong data.
#pragma once
#include "cuda_builtins.h"

namespace ff {
namespace emulation {

using Operation = std::function<void()>;

// Groups of asynchronous operations of one thread or warp, run oldest first when waited for.
struct Groups {
  std::vector<Operation> open;
  std::vector<std::vector<Operation>> committed;

  // In order: nothing overtakes what was put off.
  void start(Operation operation) {
    if (!unfinished() && !put_off()) return operation();
    open.push_back(std::move(operation));
  }
  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
  void wait(size_t pending) {
    while (committed.size() > pending) {
      auto group = std::move(committed.front());
      committed.erase(committed.begin());
      for (auto& operation : group) operation();
    }
  }
  bool unfinished() const {
    bool any = !open.empty();
    for (auto& group : committed) any |= !group.empty();
    return any;
  }
};

struct Sm80 {
  Groups copies[1024];
  const char* rows[1024];
  uint32_t fragments[1024][6];
};
inline Sm80 sm80_of_rank[kMaxCluster];
inline Sm80& sm80() { return sm80_of_rank[block.rank]; }
inline const bool sm80_registered = [] {
  at_block_start([] {
    for (Groups& g : sm80().copies) g = {};
  });
  at_block_end([] {
    for (int t = 0; t < block.size; t++)
      if (sm80().copies[t].unfinished()) fault("thread %d ended without waiting for its cp.async copies", t);
  });
  return true;
}();

template <class T> float element(uint32_t word, int high) {
  const uint16_t bits = uint16_t(high ? word >> 16 : word);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __bfloat162float({bits});
  else return __half2float({bits});
}

}  // namespace emulation

inline uint32_t shared_address(const void* p) { return emulation::shared_offset(p, 1); }

inline void cp_async16(void* shared, const void* global, bool valid = true) {
  if (emulation::shared_offset(shared, 16) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulation::fault("cp.async: both addresses must be aligned to 16 bytes");
  emulation::sm80().copies[emulation::thread()].start([=] {
    if (valid) memcpy(shared, global, 16);
    else memset(shared, 0, 16);
  });
}
inline void cp_async_commit() { emulation::sm80().copies[emulation::thread()].commit(); }
template <int N> void cp_async_wait() { emulation::sm80().copies[emulation::thread()].wait(N); }

template <bool transposed> void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  using namespace emulation;
  if (shared_offset(row, 16) % 16) fault("ldmatrix: a row's address must be aligned to 16 bytes");
  sm80().rows[thread()] = static_cast<const char*>(row);
  warp_barrier(~0u, "ldmatrix");
  const char** rows = sm80().rows + (thread() & ~31);
  for (int i = 0; i < 4; i++) {
    uint16_t two[2];
    for (int e = 0; e < 2; e++) {
      const int along = lane() % 4 * 2 + e, across = lane() / 4;
      const int from = transposed ? along : across, column = transposed ? across : along;
      memcpy(&two[e], rows[i * 8 + from] + column * 2, 2);
    }
    memcpy(&r[i], two, 4);
  }
  warp_barrier(~0u, "ldmatrix");
}

template <class T> void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulation;
  uint32_t(&mine)[6] = sm80().fragments[thread()];
  memcpy(mine, a, 16);
  mine[4] = b0, mine[5] = b1;
  warp_barrier(~0u, "mma");
  const auto* warp_fragments = sm80().fragments + (thread() & ~31);
  for (int i = 0; i < 4; i++) {
    const int row = lane() / 4 + 8 * (i / 2), col = lane() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; k++) {
      const int pair = k % 8 / 2;
      sum += element<T>(warp_fragments[row % 8 * 4 + pair][row / 8 + 2 * (k / 8)], k & 1) *
             element<T>(warp_fragments[col * 4 + pair][4 + k / 8], k & 1);
    }
    d[i] += sum;
  }
  warp_barrier(~0u, "mma");
}

}  // namespace ff
