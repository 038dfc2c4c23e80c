// Rows in registers: packs of neighbouring elements read and written at once, and sums over the threads of a row.
//
// A block is (threads of a row, rows): threadIdx.x walks a row, threadIdx.y tells the rows of a block apart. blockDim.x
// is 8, 16 or a multiple of 32 (a power of two), so a warp holds whole rows or a row holds whole warps. A thread holds
// V packs of E elements; those of a warp are neighbours, 32 packs at a time, so that one address and constant offsets
// reach all V (V > 1 needs whole warps per row).
#pragma once
#include "common.cuh"

namespace ff {

FF_DEVICE float to_float(float x) { return x; }
FF_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
FF_DEVICE float to_float(__half x) { return __half2float(x); }

template <class T> FF_DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return x;
}

// Two floats as neighbouring elements of 16 bits: one instruction converts both.
template <class T> FF_DEVICE uint32_t pack_two(float x, float y) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(x, y);
    memcpy(&bits, &two, 4);
  } else {
    const __half2 two = __floats2half2_rn(x, y);
    memcpy(&bits, &two, 4);
  }
  return bits;
}

// The machine word as wide as E elements, at most 16 bytes.
template <int bytes> struct word;
template <> struct word<16> { using type = uint4; };
template <> struct word<8> { using type = uint2; };
template <> struct word<4> { using type = unsigned; };
template <> struct word<2> { using type = unsigned short; };

template <class T, int E> struct alignas(sizeof(T) * E < 16 ? sizeof(T) * E : 16) Pack {
  T value[E];
  FF_DEVICE float operator[](int e) const { return to_float(value[e]); }
};

// The first column of pack i of this thread.
template <int E, int V> FF_DEVICE int column(int i) {
  return E * int((threadIdx.x & ~31u) * V + i * 32 + (threadIdx.x & 31));
}

// Elements of T in 16 bytes.
template <class T> constexpr int kVector = 16 / int(sizeof(T));

// Data that is used once: read and written with the streaming hint, so that it does not push the rest out of the cache.
template <class T, int E> FF_DEVICE Pack<T, E> load_streaming(const T* p) {
  using Word = typename word<sizeof(T) * E>::type;
  const Word w = __ldcs(reinterpret_cast<const Word*>(p));
  Pack<T, E> pack;
  memcpy(&pack, &w, sizeof w);
  return pack;
}
template <class T, int E> FF_DEVICE void store_streaming(T* p, const Pack<T, E>& pack) {
  using Word = typename word<sizeof(T) * E>::type;
  Word w;
  memcpy(&w, &pack, sizeof w);
  __stcs(reinterpret_cast<Word*>(p), w);
}
// Data that is read again soon, or was written by this very kernel.
template <class T, int E> FF_DEVICE Pack<T, E> load(const T* p) {
  using Word = typename word<sizeof(T) * E>::type;
  const Word w = *reinterpret_cast<const Word*>(p);
  Pack<T, E> pack;
  memcpy(&pack, &w, sizeof w);
  return pack;
}
template <class T, int E> FF_DEVICE void store(T* p, const Pack<T, E>& pack) {
  using Word = typename word<sizeof(T) * E>::type;
  Word w;
  memcpy(&w, &pack, sizeof w);
  *reinterpret_cast<Word*>(p) = w;
}
// Parameters, shared by all rows: through the cache. Up to 32 bytes.
template <class T, int E> FF_DEVICE Pack<T, E> load_cached(const T* p) {
  constexpr int kBytes = sizeof(T) * E < 16 ? int(sizeof(T)) * E : 16;
  using Word = typename word<kBytes>::type;
  Pack<T, E> pack;
#pragma unroll
  for (int i = 0; i < int(sizeof pack) / kBytes; i++) {
    const Word w = __ldg(reinterpret_cast<const Word*>(p) + i);
    memcpy(reinterpret_cast<char*>(&pack) + i * kBytes, &w, kBytes);
  }
  return pack;
}
template <class T, int E> FF_DEVICE Pack<T, E> zero_pack() {
  Pack<T, E> pack;
#pragma unroll
  for (int e = 0; e < E; e++) pack.value[e] = from_float<T>(0.f);
  return pack;
}
template <class T, int E> FF_DEVICE Pack<T, E> make_pack(const float (&x)[E]) {
  Pack<T, E> pack;
  if constexpr (E > 1 && sizeof(T) == 2) {
#pragma unroll
    for (int e = 0; e < E; e += 2) {
      const uint32_t two = pack_two<T>(x[e], x[e + 1]);
      memcpy(&pack.value[e], &two, sizeof two);
    }
  } else {
#pragma unroll
    for (int e = 0; e < E; e++) pack.value[e] = from_float<T>(x[e]);
  }
  return pack;
}

// E floats next to each other, 16 bytes at a time where E allows: p is aligned to min(16, 4 * E).
template <int E> FF_DEVICE void store_floats(float* p, const float (&x)[E]) {
  if constexpr (E % 4 == 0) {
#pragma unroll
    for (int e = 0; e < E; e += 4) *reinterpret_cast<float4*>(p + e) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
  } else {
#pragma unroll
    for (int e = 0; e < E; e++) p[e] = x[e];
  }
}

// Sums over the threads of a row, the same tree every time, so results repeat bit for bit. Every thread of the block
// must call. The two buffers take turns: whoever writes one again has passed the barrier of the other, so all have read
// the first, and one barrier per sum is enough.
template <int K> struct RowSum {
  float (&partial)[2][32][K];
  int turn = 0;
  FF_DEVICE explicit RowSum(float (&shared)[2][32][K]) : partial(shared) {}

  FF_DEVICE void operator()(float (&sum)[K]) {
    const int threads = blockDim.x;
    for (int other = (threads < 32 ? threads : 32) / 2; other; other /= 2) {
#pragma unroll
      for (int k = 0; k < K; k++) sum[k] += __shfl_xor_sync(~0u, sum[k], other);
    }
    if (threads <= 32) return;
    const int warps = threads / 32, first = threadIdx.y * warps;
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int k = 0; k < K; k++) partial[turn][first + threadIdx.x / 32][k] = sum[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++) sum[k] = 0;
    for (int w = 0; w < warps; w++) {
#pragma unroll
      for (int k = 0; k < K; k++) sum[k] += partial[turn][first + w][k];
    }
    turn ^= 1;
  }
};

// n / d of numbers that are not negative: a division of 64 bits takes many times longer than one of 32.
FF_DEVICE int64_t quotient(int64_t n, int64_t d) {
  return (n | d) >> 32 ? n / d : int64_t(uint32_t(n) / uint32_t(d));
}

// As many blocks as there is work for; kernels loop over what is more than a grid can be.
inline dim3 grid_of(int64_t blocks) { return dim3(unsigned(blocks < 0x7fffffff ? blocks : 0x7fffffff)); }

// How a kernel covers rows of up to `packs` packs: `threads` for each row, `per_thread` packs in each thread's
// registers.
struct RowPlan {
  int64_t packs;
  int threads, per_thread;
};

// The first plan that is wide enough, or null.
template <int count> const RowPlan* choose_plan(const RowPlan (&plans)[count], int64_t packs) {
  for (const RowPlan& plan : plans)
    if (packs <= plan.packs) return &plan;
  return nullptr;
}

// ---- plans of forward kernels, which hold a row in registers --------------------------------------------------------
constexpr int kForwardThreads = 128;  // of a block, unless one row has more
constexpr int kLongThreads = 512;     // of a block on a row too long for registers
constexpr int kClusterThreads = 512;  // of each block of a cluster
constexpr int kForwardClusterPacks = 8;  // in each of its threads

// A block of 1024 leaves 64 registers to a thread: enough for float32, not for converted halves.
template <class T, int E> constexpr int forward_max_threads() { return E > 1 && sizeof(T) == 4 ? 1024 : 512; }

// Few threads for a short row, so that a warp works on several; never more than 64 bytes of it in one thread, so that
// many threads fit and keep many loads in flight.
constexpr RowPlan kForwardPlans[] = {{8, 8, 1},     {16, 16, 1},   {32, 32, 1},    {128, 32, 4},  {256, 64, 4},
                                     {512, 128, 4}, {1024, 256, 4}, {2048, 512, 4}, {4096, 1024, 4}};

// The plan of a row of this many packs, or null: too long for the registers of one block of `most` threads.
inline const RowPlan* forward_plan(int64_t packs, int most) {
  const RowPlan* plan = choose_plan(kForwardPlans, packs);
  return plan && plan->threads <= most ? plan : nullptr;
}
inline dim3 forward_block(const RowPlan& plan) {
  return dim3(unsigned(plan.threads), unsigned(plan.threads < kForwardThreads ? kForwardThreads / plan.threads : 1));
}
inline dim3 forward_grid(int64_t rows, dim3 block) { return grid_of((rows + block.y - 1) / block.y); }

}  // namespace ff
