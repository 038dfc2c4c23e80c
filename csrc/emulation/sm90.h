// csrc/cuda/sm90.h on the emulator. What is asynchronous, when late, happens at the last moment:
//   - a TMA load lands when no thread can run any more (or lands before another that was issued earlier);
//   - a wgmma reads its operands, shared memory and registers, and writes its accumulators where its group is waited
//     for;
//   - a bulk store or reduction reads shared memory where its group is waited for.
// Each warp computes its own 16 rows of a wgmma, so the four warps of a warpgroup need not be in step, as on a GPU.
#pragma once
#include <map>

#include "sm80.h"

namespace ff {

// What cuTensorMapEncodeTiled is told; as large as a CUtensorMap.
struct alignas(64) TensorMap {
  char* data;
  int64_t sizes[4], strides[3];
  int box_rows;
  char unused[128 - 68];
};

namespace emulation {

struct Mbarrier {
  uint32_t parity = 0;  // of the phase under way
  int count = 0, pending = 0;
  int64_t bytes = 0;
};
// The arguments of one wgmma, per lane.
struct Product {
  float* d[32];
  const uint32_t* a[32];
  uint64_t descriptors[32][2];
};
struct WarpProducts {
  Groups groups;
  bool fenced = false;
  Product next;
};
struct Sm90 {
  std::map<uint32_t, Mbarrier> barriers;  // by shared offset
  WarpProducts warps[32];
  Groups bulk[1024];
};
inline Sm90 sm90_of_rank[kMaxCluster];
inline Sm90& sm90() { return sm90_of_rank[block.rank]; }
inline const bool sm90_registered = [] {
  at_block_start([] {
    sm90().barriers.clear();
    for (WarpProducts& w : sm90().warps) w = {};
    for (Groups& g : sm90().bulk) g = {};
  });
  at_block_end([] {
    for (int t = 0; t < block.size; t++)
      if (sm90().bulk[t].unfinished()) fault("thread %d ended without waiting for its bulk copies", t);
    for (int w = 0; w < 32; w++)
      if (sm90().warps[w].groups.unfinished()) fault("warp %d ended without waiting for its wgmma", w);
    for (auto& [offset, m] : sm90().barriers)
      if (m.bytes) fault("ended with %lld bytes outstanding at the mbarrier at %u", (long long)m.bytes, offset);
  });
  return true;
}();

// What an initialised mbarrier's own 8 bytes hold, so that overwriting one is noticed.
inline uint64_t mbarrier_mark(uint32_t offset) { return 0x6d62617272696572ull ^ offset; }

inline Mbarrier& find_mbarrier(const uint64_t* barrier) {
  const uint32_t offset = shared_offset(barrier, 8);
  auto found = sm90().barriers.find(offset);
  if (found == sm90().barriers.end()) fault("the mbarrier at %u is not initialised", offset);
  uint64_t mark;
  memcpy(&mark, barrier, 8);
  if (mark != mbarrier_mark(offset)) fault("the mbarrier at %u was overwritten", offset);
  return found->second;
}
inline void complete_phase(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.pending = m.count;
  m.parity ^= 1;
}
inline void arrive_at(Mbarrier& m) {
  if (m.pending == 0) fault("more than %d arrivals at an mbarrier in one phase", m.count);
  m.pending--;
}

inline uint32_t swizzle(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

// Copies a box between the tensor and its tile; f(global address or null, shared address) per element.
template <class F> void for_box(const TensorMap& map, char* tile, int x, int y, int z, int w, F f) {
  const uint32_t base = shared_offset(tile, size_t(map.box_rows) * 128);
  if (base % 1024) fault("TMA: the tile in shared memory must be aligned to 1024 bytes");
  for (int r = 0; r < map.box_rows; r++)
    for (int piece = 0; piece < 8; piece++) {
      const int64_t row = int64_t(y) + r, col = int64_t(x) + piece * 8;
      char* shared = block.shared + swizzle(base + r * 128 + piece * 16);
      for (int e = 0; e < 8; e++) {
        const int64_t at[] = {col + e, row, z, w};
        bool inside = true;
        for (int i = 0; i < 4; i++) inside &= at[i] >= 0 && at[i] < map.sizes[i];
        const int64_t element = at[0] + row * map.strides[0] + z * map.strides[1] + w * map.strides[2];
        f(inside ? map.data + element * 2 : nullptr, shared + e * 2);
      }
    }
}

// Element (mn, k) of an operand described as in shared_descriptor.
template <class T> float operand(uint64_t descriptor, bool transposed, int mn, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4,
                 stride = (descriptor >> 32 & 0x3fff) << 4;
  const uint32_t offset = transposed ? start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2
                                     : start + mn / 8 * stride + mn % 8 * 128 + k * 2;
  if (offset + 2 > kMaxShared) fault("wgmma: a descriptor reaches beyond shared memory");
  uint16_t bits;
  memcpy(&bits, block.shared + swizzle(offset), 2);
  return element<T>(bits, 0);
}

// A warp's 16 rows of d = a b (+ d). a is read through fragments where they are given, else through its descriptor.
template <class T, bool transpose_a, bool transpose_b, int half_n>
void warp_product(const Product& p, int first_row, bool from_registers, bool accumulate) {
  constexpr int N = 2 * half_n;
  static thread_local float a[16][16], b[16][N], sums[16][N];
  for (int r = 0; r < 16; r++)
    for (int k = 0; k < 16; k++)
      a[r][k] = from_registers ? element<T>(p.a[r % 8 * 4 + k % 8 / 2][r / 8 + 2 * (k / 8)], k & 1)
                               : operand<T>(p.descriptors[0][0], transpose_a, first_row + r, k);
  for (int n = 0; n < N; n++)
    for (int k = 0; k < 16; k++) b[k][n] = operand<T>(p.descriptors[0][1], transpose_b, n, k);
  for (int r = 0; r < 16; r++) {
    for (int n = 0; n < N; n++) sums[r][n] = 0;
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < N; n++) sums[r][n] += a[r][k] * b[k][n];
  }
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < half_n; i++) {
      const float value = sums[l / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (l % 4) + i % 2];
      p.d[l][i] = accumulate ? p.d[l][i] + value : value;
    }
}

template <class T, bool transpose_a, bool transpose_b, int half_n>
void warpgroup_product(float* d, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate) {
  static_assert(half_n == 32 || half_n == 48 || half_n == 64 || half_n == 128, "N is 64, 96, 128 or 256");
  WarpProducts& w = sm90().warps[warp()];
  Product& p = w.next;
  p.d[lane()] = d;
  p.a[lane()] = a_registers;
  p.descriptors[lane()][0] = a;
  p.descriptors[lane()][1] = b;
  warp_barrier(~0u, "wgmma");
  if (lane() == 0) {
    if (!w.fenced) fault("wgmma without a wgmma_fence before the first");
    for (int l = 1; l < 32; l++)
      if (memcmp(p.descriptors[l], p.descriptors[0], sizeof p.descriptors[0]))
        fault("wgmma: lane %d has another descriptor than lane 0", l);
    for (uint64_t descriptor : {a_registers ? b : a, b})
      if (descriptor >> 62 != 1) fault("wgmma: only descriptors of the 128-byte swizzle are emulated");
    const int first_row = warp() % 4 * 16;
    const bool from_registers = a_registers != nullptr;
    w.groups.start([=, product = p] {
      warp_product<T, transpose_a, transpose_b, half_n>(product, first_row, from_registers, accumulate);
    });
  }
  warp_barrier(~0u, "wgmma");
}

}  // namespace emulation

// ---- mbarriers ------------------------------------------------------------------------------------------------------
inline void mbarrier_init(uint64_t* barrier, int count) {
  const uint32_t offset = emulation::shared_offset(barrier, 8);
  if (offset % 8 || count < 1) emulation::fault("mbarrier at %u with %d arrivals", offset, count);
  emulation::sm90().barriers[offset] = {0, count, count, 0};
  const uint64_t mark = emulation::mbarrier_mark(offset);
  memcpy(barrier, &mark, 8);
}
inline void mbarrier_arrive(uint64_t* barrier) {
  emulation::Mbarrier& m = emulation::find_mbarrier(barrier);
  emulation::arrive_at(m);
  emulation::complete_phase(m);
}
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  emulation::Mbarrier& m = emulation::find_mbarrier(barrier);
  m.bytes += bytes;
  emulation::arrive_at(m);
  emulation::complete_phase(m);
}
inline void mbarrier_wait(uint64_t* barrier, int parity) {
  emulation::wait_while(&emulation::find_mbarrier(barrier).parity, uint32_t(parity & 1), "an mbarrier");
}
inline void fence_async_proxy() {}

// ---- bulk copies ----------------------------------------------------------------------------------------------------
inline void tma_load_4d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
  using namespace emulation;
  find_mbarrier(barrier);
  complete_asynchronously([=, map = *map] {
    for_box(map, static_cast<char*>(shared), x, y, z, w, [](const char* global, char* to) {
      if (global) memcpy(to, global, 2);
      else memset(to, 0, 2);
    });
    Mbarrier& m = find_mbarrier(barrier);
    m.bytes -= map.box_rows * 128;
    complete_phase(m);
  });
}
inline void tma_load_2d(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y) {
  tma_load_4d(shared, map, barrier, x, y, 0, 0);
}
inline void bulk_load(void* shared, const void* global, uint64_t* barrier, uint32_t bytes) {
  using namespace emulation;
  if (shared_offset(shared, bytes) % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fault("bulk copy: addresses and size must be multiples of 16 bytes");
  find_mbarrier(barrier);
  complete_asynchronously([=] {
    memcpy(shared, global, bytes);
    Mbarrier& m = find_mbarrier(barrier);
    m.bytes -= bytes;
    complete_phase(m);
  });
}
inline void tma_store_2d(const TensorMap* map, const void* shared, int x, int y) {
  using namespace emulation;
  sm90().bulk[thread()].start([=, map = *map] {
    for_box(map, static_cast<char*>(const_cast<void*>(shared)), x, y, 0, 0, [](char* global, const char* from) {
      if (global) memcpy(global, from, 2);
    });
  });
}
inline void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
  using namespace emulation;
  if (shared_offset(shared, bytes) % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fault("bulk reduction: addresses and size must be multiples of 16 bytes");
  sm90().bulk[thread()].start([=] {
    for (uint32_t i = 0; i < bytes / 4; i++) global[i] += shared[i];
  });
}
inline void bulk_commit() { emulation::sm90().bulk[emulation::thread()].commit(); }
template <int N> void bulk_wait_read() { emulation::sm90().bulk[emulation::thread()].wait(N); }
template <int N> void bulk_wait() { bulk_wait_read<N>(); }

// Blocks run one after another: what one waits for must have been done by those that came before.
inline void wait_for_turn(const int* turn, int mine) {
  if (*turn != mine) emulation::fault("waits for turn %d at turn %d, for a block that has not run", mine, *turn);
}
inline void end_turn(int* turn) {
  if (emulation::sm90().bulk[emulation::thread()].unfinished())
    emulation::fault("ends its turn without waiting for its bulk copies");
  ++*turn;
}

// ---- wgmma ----------------------------------------------------------------------------------------------------------
inline void wgmma_fence() { emulation::sm90().warps[emulation::warp()].fenced = true; }
inline void wgmma_commit() {
  emulation::warp_barrier(~0u, "wgmma_commit");
  if (emulation::lane() == 0) emulation::sm90().warps[emulation::warp()].groups.commit();
  emulation::warp_barrier(~0u, "wgmma_commit");
}
template <int N> void wgmma_wait() {
  emulation::warp_barrier(~0u, "wgmma_wait");
  if (emulation::lane() == 0) emulation::sm90().warps[emulation::warp()].groups.wait(N);
  emulation::warp_barrier(~0u, "wgmma_wait");
}
template <int N> void pin(float (&)[N]) {}

inline uint64_t shared_descriptor(const void* tile, uint32_t leading, uint32_t stride) {
  return uint64_t((emulation::shared_offset(tile, 16) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
template <class T, int transpose_a, int transpose_b, int half_n>
void wgmma_m64k16(float (&d)[half_n], uint64_t a, uint64_t b, bool accumulate) {
  emulation::warpgroup_product<T, transpose_a, transpose_b, half_n>(d, nullptr, a, b, accumulate);
}
template <class T, int transpose_b, int half_n>
void wgmma_m64k16(float (&d)[half_n], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulation::warpgroup_product<T, false, transpose_b, half_n>(d, a, 0, b, accumulate);
}

// ---- warps with different roles -------------------------------------------------------------------------------------
inline void named_barrier_sync(int id, int threads) {
  if (threads % 32) emulation::fault("barrier %d: %d threads is no multiple of 32", id, threads);
  emulation::arrive_and_wait(emulation::named_barrier(id), threads, "a named barrier");
}
inline void named_barrier_arrive(int id, int threads) {
  if (threads % 32) emulation::fault("barrier %d: %d threads is no multiple of 32", id, threads);
  emulation::arrive(emulation::named_barrier(id), threads, "a named barrier");
}
template <int N> void increase_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "a multiple of 8 from 24 to 256");
}
template <int N> void decrease_registers() { increase_registers<N>(); }

// ---- host -----------------------------------------------------------------------------------------------------------
template <int rank>
int make_tensor_map(TensorMap* map, bool, const void* data, const int64_t (&sizes)[rank],
                    const int64_t (&strides)[rank - 1], int box_rows) {
  bool accepted = reinterpret_cast<uintptr_t>(data) % 16 == 0 && data && box_rows >= 1 && box_rows <= 256;
  *map = {static_cast<char*>(const_cast<void*>(data)), {1, 1, 1, 1}, {}, box_rows, {}};
  for (int i = 0; i < rank; i++) {
    map->sizes[i] = sizes[i];
    accepted &= sizes[i] >= 1 && sizes[i] <= int64_t(1) << 32;
    if (i == 0) continue;
    map->strides[i - 1] = strides[i - 1];
    accepted &= strides[i - 1] % 8 == 0 && strides[i - 1] >= 8 && strides[i - 1] < int64_t(1) << 39;
  }
  return accepted ? FF_OK : fail(FF_DEVICE_ERROR, "cuTensorMapEncodeTiled would refuse these sizes, strides or data");
}

}  // namespace ff

// For tests of the whole library, through ctypes: when asynchronous operations happen. False: no such name.
extern "C" FF_API __attribute__((weak)) bool ff_emulation_set_completion(const char* name) {
  return ff::emulation::set_completion(name);
}
