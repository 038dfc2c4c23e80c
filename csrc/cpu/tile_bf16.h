// The products of tile.h on bfloat16 operands: float32 accumulators, and twice (AVX-512-BF16) or sixteen times (AMX) the
// multiplications per instruction of float32 operands.
//
// Both instructions multiply pairs of neighbours in K, so one layout serves both: A lies in rows (A[i][k], k contiguous),
// B in panels of kNR columns, (K / 2, kNR, 2) each. FF_BF16_DOT is 1 for VDPBF16PS, one row of A's pair broadcast against
// 16 columns, and 2 for AMX, 16 rows of 32 of A against 32 rows of 16 columns. Where the compiler may not emit the
// instruction a function with its arithmetic stands in, to the order of additions: so these products are tested anywhere.
#pragma once
#if FF_BF16_DOT == 2 && defined(__AMX_BF16__)
#define FF_TILE_REGISTERS 1
#else
#define FF_TILE_REGISTERS 0
#endif

namespace ff {
namespace FF_ISA {

template <> struct operand<bf16> { using type = bf16; };

template <> struct tile_shape<bf16> {
  static constexpr int kMR = FF_BF16_DOT == 2 ? 32 : 8;
  static constexpr int kNR = 32;
  static constexpr int kKR = FF_BF16_DOT == 2 ? 32 : 2;
};
static_assert(FF_VEC_BYTES == 64, "a vector is 16 pairs");

// ---- the instructions ------------------------------------------------------------------------------------------------

// These neither read nor write subnormals, whatever the mode.
FF_INLINE f32v flush(f32v v) { return (f32v)((u32v)v & 0x7f800000u) == f32v{} ? (f32v)((u32v)v & 0x80000000u) : v; }
FF_INLINE f32v low_of(u32v pairs) { return flush((f32v)(pairs << 16)); }
FF_INLINE f32v high_of(u32v pairs) { return flush((f32v)(pairs & 0xffff0000u)); }

// c + the products of the pairs' elements.
FF_INLINE f32v dot(f32v c, u32v a, u32v b) {
#if defined(__AVX512BF16__)
  return (f32v)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  c = flush(high_of(a) * high_of(b) + flush(c));
  return flush(low_of(a) * low_of(b) + c);
#endif
}

// 16 elements rounded to nearest even, in order.
FF_INLINE void round_to(bf16* p, f32v v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
#else
  const u16v h = to_bf16(flush(v));
#endif
  memcpy(p, &h, sizeof h);
}
// 16 pairs, rounded likewise.
FF_INLINE u32v pair_up(f32v low, f32v high) {
#if defined(__AVX512BF16__)
  constexpr auto l = [](int pair) { return pair | (pair + 16) << 16; };
  const __m512i order = _mm512_setr_epi32(l(0), l(1), l(2), l(3), l(4), l(5), l(6), l(7), l(8), l(9), l(10), l(11), l(12),
                                          l(13), l(14), l(15));
  return (u32v)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return __builtin_convertvector(to_bf16(flush(low)), u32v) | __builtin_convertvector(to_bf16(flush(high)), u32v) << 16;
#endif
}

#if FF_BF16_DOT == 2
// The tile registers, each 16 rows of 64 bytes. Their shapes are a state of the thread, set while a Session lives.
#if FF_TILE_REGISTERS
#define FF_TILE_LOAD(t, p, bytes) _tile_loadd(t, p, bytes)
#define FF_TILE_STORE(t, p, bytes) _tile_stored(t, p, bytes)
#define FF_TILE_ZERO(t) _tile_zero(t)
#define FF_TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#else
struct TileRegisters {
  bool configured = false;
  u32v row[8][16];
  void load(int t, const void* p, int64_t bytes) {
    if (!configured) __builtin_trap();
    for (int i = 0; i < 16; i++) memcpy(&row[t][i], (const char*)p + i * bytes, 64);
  }
  void store(int t, void* p, int64_t bytes) {
    if (!configured) __builtin_trap();
    for (int i = 0; i < 16; i++) memcpy((char*)p + i * bytes, &row[t][i], 64);
  }
  void zero(int t) {
    if (!configured) __builtin_trap();
    memset(row[t], 0, sizeof row[t]);
  }
  void multiply(int c, int a, int b) {
    for (int i = 0; i < 16; i++) {
      f32v low{}, high{};
      for (int k = 0; k < 16; k++) {
        const u32v x = u32v{} + row[a][i][k];
        low = flush(low_of(x) * low_of(row[b][k]) + low);
        high = flush(high_of(x) * high_of(row[b][k]) + high);
      }
      row[c][i] = (u32v)flush(flush((f32v)row[c][i]) + flush(low + high));
    }
  }
};
static thread_local TileRegisters tile_registers;
#define FF_TILE_LOAD(t, p, bytes) tile_registers.load(t, p, bytes)
#define FF_TILE_STORE(t, p, bytes) tile_registers.store(t, p, bytes)
#define FF_TILE_ZERO(t) tile_registers.zero(t)
#define FF_TILE_MULTIPLY(c, a, b) tile_registers.multiply(c, a, b)
#endif
#endif

// ---- the product -----------------------------------------------------------------------------------------------------

template <> struct Product<bf16> {
#if FF_BF16_DOT == 2
  struct Session {
    Session() {
#if FF_TILE_REGISTERS
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shapes;
      static_assert(sizeof shapes == 64, "as the instruction reads it");
      asm volatile("" ::"m"(shapes));
      _tile_loadconfig(&shapes);
#else
      tile_registers.configured = true;
#endif
    }
    ~Session() {
#if FF_TILE_REGISTERS
      _tile_release();
#else
      tile_registers.configured = false;
#endif
    }
    Session(const Session&) = delete;
  };

  template <bool AColumns>
  static FF_INLINE void strip(int64_t K, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc,
                              bool accumulate) {
    static_assert(!AColumns, "pairs lie in rows");
    const int64_t a_bytes = lda * 2, b_bytes = 128, c_bytes = ldc * 4;
    // GCC's tile loads do not say that they read memory: nothing stored before may be stored after.
    asm volatile("" ::: "memory");
    if (accumulate) {
      FF_TILE_LOAD(0, c, c_bytes);
      FF_TILE_LOAD(1, c + 16, c_bytes);
      FF_TILE_LOAD(2, c + 16 * ldc, c_bytes);
      FF_TILE_LOAD(3, c + 16 * ldc + 16, c_bytes);
    } else {
      FF_TILE_ZERO(0);
      FF_TILE_ZERO(1);
      FF_TILE_ZERO(2);
      FF_TILE_ZERO(3);
    }
    for (int64_t k = 0; k < K; k += 32) {
      FF_TILE_LOAD(4, a + k, a_bytes);
      FF_TILE_LOAD(6, b + k * 32, b_bytes);
      FF_TILE_LOAD(7, b + k * 32 + 32, b_bytes);
      FF_TILE_MULTIPLY(0, 4, 6);
      FF_TILE_MULTIPLY(1, 4, 7);
      FF_TILE_LOAD(5, a + 16 * lda + k, a_bytes);
      FF_TILE_MULTIPLY(2, 5, 6);
      FF_TILE_MULTIPLY(3, 5, 7);
    }
    FF_TILE_STORE(0, c, c_bytes);
    FF_TILE_STORE(1, c + 16, c_bytes);
    FF_TILE_STORE(2, c + 16 * ldc, c_bytes);
    FF_TILE_STORE(3, c + 16 * ldc + 16, c_bytes);
  }
#else
  struct Session {};

  template <bool AColumns>
  static FF_INLINE void strip(int64_t K, const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc,
                              bool accumulate) {
    static_assert(!AColumns, "pairs lie in rows");
    constexpr int MR = tile_shape<bf16>::kMR;
    f32v acc[MR][2];
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) acc[i][v] = accumulate ? load(c + i * ldc + v * 16) : f32v{};
    for (int64_t k = 0; k < K; k += 2) {
      u32v pairs[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) memcpy(&pairs[v], b + k * 32 + v * 32, 64);
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++) {
        uint32_t pair;
        memcpy(&pair, a + i * lda + k, sizeof pair);
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) acc[i][v] = dot(acc[i][v], u32v{} + pair, pairs[v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) store(c + i * ldc + v * 16, acc[i][v]);
  }
#endif
};

// ---- packing: bfloat16 -> bfloat16 -----------------------------------------------------------------------------------

// The first n of 16 elements as 32-bit lanes, the others 0; times `scale`, which is 1, 0 or -1.
FF_INLINE u32v load_elements(const bf16* p, int64_t n, float scale) {
  u16v h{};
  if (n >= 16) memcpy(&h, p, sizeof h);
  else memcpy(&h, p, size_t(n) * 2);
  if (scale != 1) h = to_bf16((f32v)(__builtin_convertvector(h, u32v) << 16) * scale);
  return __builtin_convertvector(h, u32v);
}

// (rows, cols) -> row-major with leading dimension `ld`, columns beyond `cols` zero.
inline void pack_rows(const bf16* from, int64_t stride, int64_t rows, int64_t cols, bf16* to, int64_t ld, float scale) {
  for (int64_t r = 0; r < rows; r++) {
    bf16* row = to + r * ld;
    memcpy(row, from + r * stride, size_t(cols) * 2);
    memset(row + cols, 0, size_t(ld - cols) * 2);
    if (scale != 1)
      for (int64_t c = 0; c < cols; c++) row[c] = from_float<bf16>(to_float(row[c]) * scale);
  }
}

// (rows, cols) -> column panels [cols / NR][rows / 2][NR][2], columns beyond `cols` and rows up to a whole step of K zero.
inline void pack_panels(const bf16* from, int64_t stride, int64_t rows, int64_t cols, bf16* to, int64_t rows_capacity,
                        float scale) {
  constexpr int NR = tile_shape<bf16>::kNR, KR = tile_shape<bf16>::kKR;
  for (int64_t r = 0; r < round_up(rows, KR); r += 2)
    for (int64_t c = 0; c < round_up(cols, NR); c += 16) {
      const bf16* p = from + r * stride + c;
      const int64_t n = std::max<int64_t>(0, cols - c);
      const u32v low = r < rows ? load_elements(p, n, scale) : u32v{};
      const u32v high = r + 1 < rows ? load_elements(p + stride, n, scale) : u32v{};
      const u32v pairs = low | high << 16;
      memcpy(to + c / NR * rows_capacity * NR + r * NR + c % NR * 2, &pairs, sizeof pairs);
    }
}

// (rows, cols) -> panels of its transpose [rows / NR][cols / 2][NR][2], rows beyond `rows` and columns up to a whole step
// of K zero. A row's pairs stay together, so this is the transposition of 32-bit elements.
inline void pack_transposed(const bf16* from, int64_t stride, int64_t rows, int64_t cols, bf16* to) {
  constexpr int NR = tile_shape<bf16>::kNR;
  const int64_t depth = round_up(cols, tile_shape<bf16>::kKR);
  for (int64_t r = 0; r < round_up(rows, NR); r += 16)
    for (int64_t c = 0; c < depth; c += 32) {
      f32v block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        u32v pairs{};
        const bf16* p = from + (r + i) * stride + c;
        if (r + i >= rows) pairs = u32v{};
        else if (cols - c >= 32) memcpy(&pairs, p, 64);
        else memcpy(&pairs, p, size_t(cols - c) * 2);
        block[i] = (f32v)pairs;
      }
      transpose<float>(block);
      bf16* panel = to + r / NR * NR * depth + c * NR + r % NR * 2;
      for (int64_t i = 0; i < std::min<int64_t>(16, (depth - c) / 2); i++) memcpy(panel + i * 2 * NR, &block[i], 64);
    }
}

// ---- rounding: float32 results that become operands ------------------------------------------------------------------

// [begin, end), whole vectors, in place: as a row of bfloat16 it has them at the same indices.
inline void round_row(float* row, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; c += 16) round_to((bf16*)row + c, load(row + c));
}

// (rows, cols) with leading dimension `ld` -> its transpose in rows of `ld_to`; rows are a multiple of 32, cols of 16.
inline void round_transposed(const float* from, int64_t ld, int64_t rows, int64_t cols, bf16* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; r += 32)
    for (int64_t c = 0; c < cols; c += 16) {
      f32v block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const float* p = from + (r + 2 * i) * ld + c;
        block[i] = (f32v)pair_up(load(p), load(p + ld));
      }
      transpose<float>(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) memcpy(to + (c + i) * ld_to + r, &block[i], 64);
    }
}

}  // namespace FF_ISA
}  // namespace ff
