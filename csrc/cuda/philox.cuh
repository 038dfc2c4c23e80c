// Dropout bits: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011).
//
// fastformer.h numbers them so that 8 counters give the 32 columns of an aligned group. Lanes that hold neighbouring
// columns share the work: each evaluates its part of the 8 counters once, turns the words into keep bits, and the bits
// are joined by shuffles, a quarter of the arithmetic of one evaluation per column.
#pragma once
#include "common.cuh"

namespace ff {

struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;  // an element is kept iff its bits >= threshold
  float scale = 1;         // of kept elements
  bool on = false;

  // What element e is multiplied by, of keep_bits.
  FF_DEVICE float factor(uint32_t keep, int e) const { return keep >> e & 1 ? scale : 0.f; }
};

inline Dropout make_dropout(double p, uint64_t seed) {
  Dropout d;
  d.seed = seed;
  d.on = p > 0;
  d.threshold = uint32_t(p * 4294967296.0 < 4294967295.0 ? p * 4294967296.0 : 4294967295.0);
  d.scale = p < 1 ? float(1.0 / (1.0 - p)) : 0.f;
  return d;
}

// The four words of counter (c, row).
FF_DEVICE void philox(uint32_t c, uint64_t row, uint64_t seed, uint32_t (&words)[4]) {
  uint32_t c0 = c, c1 = uint32_t(row), c2 = uint32_t(row >> 32), c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll 1  // a loop is little slower and a tenth of the code
  for (int round = 0; round < 10; round++) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Keep bits of columns col .. col + E - 1 of `row`, bit e for column col + e. col is a multiple of E. For E > 1 lanes
// hold neighbouring groups of E columns and all 32 lanes of the warp must call.
template <int E> FF_DEVICE uint32_t keep_bits(const Dropout& d, int64_t row, int64_t col) {
  const uint32_t first = uint32_t(col / 32) * 8;
  uint32_t words[4];
  if constexpr (E == 1) {
    philox(first + uint32_t(col % 8), uint64_t(row), d.seed, words);
    const int w = int(col / 8 % 4);
    return (w == 0 ? words[0] : w == 1 ? words[1] : w == 2 ? words[2] : words[3]) >= d.threshold;
  } else {
    constexpr int kLanes = 32 / E, kCounters = 8 / kLanes;  // lanes that share a group of 32 columns, counters of each
    const int position = int(col % 32), mine = position / E * kCounters;
    uint32_t bits = 0;  // bit i: column i of the 32
#pragma unroll
    for (int k = 0; k < kCounters; k++) {
      philox(first + mine + k, uint64_t(row), d.seed, words);
#pragma unroll
      for (int w = 0; w < 4; w++) bits |= uint32_t(words[w] >= d.threshold) << (w * 8 + mine + k);
    }
#pragma unroll
    for (int other = 1; other < kLanes; other *= 2) bits |= __shfl_xor_sync(~0u, bits, other);
    return bits >> position & ((1u << E) - 1);
  }
}

}  // namespace ff
