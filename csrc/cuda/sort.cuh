// Indices in the order of the rows they name, equal ones as they came: a radix sort, 8 bits a pass from the lowest on.
//
// A pass counts, in each block's share of the indices, how often each digit occurs, and then puts every index where it
// belongs: after all smaller digits, after the same digit in earlier blocks, warps and lanes. All of that is counting,
// so the order is the same in every run. It moves 8 bytes twice per index and pass, little beside the rows behind the
// indices.
#pragma once
#include "common.cuh"

namespace ff {

constexpr int kDigits = 256;                       // of a pass, and threads of its blocks
constexpr int kSortShare = 1024, kSortBlocks = 256;  // indices of a block, unless that would make more blocks

// What is sorted: entry i of `order` names row keys[i]; before the first pass order is 0, 1, ... and the keys are ids,
// those out of range as `rows`, after all others.
struct Entries {
  const int64_t* ids;  // (count), or null
  int64_t rows;
  const uint32_t* keys;   // (count), without ids
  const uint32_t* order;  // (count), without ids
  FF_DEVICE uint32_t key(int64_t i) const {
    if (!ids) return keys[i];
    const int64_t id = ids[i];
    return uint32_t(id >= 0 && id < rows ? id : rows);
  }
  FF_DEVICE uint32_t index(int64_t i) const { return ids ? uint32_t(i) : order[i]; }
};

// counts (blocks, kDigits): of this block's share of the entries.
inline __global__ void __launch_bounds__(kDigits)
    count_digits(const Entries from, int64_t count, int64_t share, int shift, uint32_t* counts) {
  FF_SHARED(uint32_t, sums, [kDigits]);
  sums[threadIdx.x] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * share, end = begin + share < count ? begin + share : count;
  for (int64_t i = begin + threadIdx.x; i < end; i += kDigits)
    atomicAdd(&sums[from.key(i) >> shift & (kDigits - 1)], 1u);  // a sum of ones is the same in any order
  __syncthreads();
  counts[int64_t(blockIdx.x) * kDigits + threadIdx.x] = sums[threadIdx.x];
}

inline __global__ void __launch_bounds__(kDigits)
    place_entries(const Entries from, int64_t count, int64_t share, int shift, const uint32_t* counts, uint32_t* keys,
                  uint32_t* order) {
  constexpr int kWarps = kDigits / 32;
  FF_SHARED(uint32_t, next, [kDigits]);             // where the next entry of a digit goes
  FF_SHARED(uint32_t, of_warp, [kWarps][kDigits]);  // entries of a digit in each warp
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  uint32_t total = 0, earlier = 0;  // of digit t in all blocks, and in those before this one
  for (int b = 0; b < int(gridDim.x); b++) {
    if (b == int(blockIdx.x)) earlier = total;
    total += counts[int64_t(b) * kDigits + t];
  }
  next[t] = total;
  for (int w = 0; w < kWarps; w++) of_warp[w][t] = 0;
  __syncthreads();
  uint32_t smaller = 0;
  for (int d = 0; d < t; d++) smaller += next[d];
  __syncthreads();
  next[t] = smaller + earlier;
  __syncthreads();

  const int64_t begin = blockIdx.x * share, end = begin + share < count ? begin + share : count;
  for (int64_t first = begin; first < end; first += kDigits) {
    const int64_t i = first + t;
    const bool live = i < end;
    const uint32_t key = live ? from.key(i) : 0;
    const int digit = int(key >> shift & (kDigits - 1));
    unsigned same = __ballot_sync(~0u, live);  // lanes of the warp with this digit
    for (int bit = 0; bit < 8; bit++) {
      const unsigned ones = __ballot_sync(~0u, digit >> bit & 1);
      same &= digit >> bit & 1 ? ones : ~ones;
    }
    const unsigned before = same & ((1u << lane) - 1);
    if (live && before == 0) of_warp[warp][digit] = __popc(same);
    __syncthreads();
    if (live) {
      uint32_t to = next[digit] + __popc(before);
      for (int w = 0; w < warp; w++) to += of_warp[w][digit];
      keys[to] = key, order[to] = from.index(i);
    }
    __syncthreads();
    for (int w = 0; w < kWarps; w++) next[t] += of_warp[w][t], of_warp[w][t] = 0;
    __syncthreads();
  }
}

// start[v], v = 0 .. rows: the first of the sorted keys that is not below v.
inline __global__ void __launch_bounds__(kDigits)
    find_starts(const uint32_t* keys, int64_t count, int64_t rows, uint32_t* start) {
  const int64_t v = int64_t(blockIdx.x) * kDigits + threadIdx.x;
  if (v > rows) return;
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < v) low = middle + 1;
    else high = middle;
  }
  start[v] = uint32_t(low);
}

// Its memory: two buffers of keys and order each, the counts, the starts; all multiples of 16 bytes.
struct SortBuffers {
  uint32_t *keys[2], *order[2], *counts, *start;
};
inline size_t sort_bytes(int64_t count, int64_t rows, char* at = nullptr, SortBuffers* to = nullptr) {
  size_t bytes = 0;
  const auto take = [&](int64_t words) {
    uint32_t* p = reinterpret_cast<uint32_t*>(at + bytes);
    bytes += size_t(words + 3) / 4 * 16;
    return at ? p : nullptr;
  };
  SortBuffers b{{take(count), take(count)}, {take(count), take(count)}, take(kSortBlocks * kDigits), take(rows + 1)};
  if (to) *to = b;
  return bytes;
}

// Sorts `count` ids of `rows` rows; keys and order are then in b.keys[last] and b.order[last].
inline int sort_ids(const char* name, const int64_t* ids, int64_t count, int64_t rows, const SortBuffers& b, int& last,
                    void* stream) {
  int64_t share = kSortShare;
  while ((count + share - 1) / share > kSortBlocks) share *= 2;
  const dim3 grid(unsigned((count + share - 1) / share));
  Entries from{ids, rows, nullptr, nullptr};
  last = 1;
  for (int shift = 0; shift == 0 || rows >> shift; shift += 8) {
    last ^= 1;
    if (int status = launch(name, count_digits, grid, dim3(kDigits), 0, stream, from, count, share, shift, b.counts))
      return status;
    if (int status = launch(name, place_entries, grid, dim3(kDigits), 0, stream, from, count, share, shift,
                            static_cast<const uint32_t*>(b.counts), b.keys[last], b.order[last]))
      return status;
    from = {nullptr, rows, b.keys[last], b.order[last]};
  }
  return launch(name, find_starts, dim3(unsigned((rows + kDigits) / kDigits)), dim3(kDigits), 0, stream,
                static_cast<const uint32_t*>(b.keys[last]), count, rows, b.start);
}

}  // namespace ff
