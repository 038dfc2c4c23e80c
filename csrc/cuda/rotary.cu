// Rotary position embedding on a GPU; the formula is in fastformer.h.
//
// A thread has the same pairs of one position in every head of its share: it loads their cosines and sines once and
// turns head after head with a few in flight, so the tables cost little beside the floor, one read and one write of q
// and k. Neighbouring threads have neighbouring pairs, then neighbouring positions. A position outside the tables makes
// its heads NaN.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c rotary.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c rotary.cu
#include "row.cuh"

namespace ff {
namespace {

constexpr int kThreads = 256, kHeads = 2;  // heads of a thread, in flight

// T: data, P: tables.
template <class T, class P> struct Rotary {
  struct Heads {
    const T* x;  // (B, count, S, D)
    T* out;      // likewise, or x
    int64_t count, stride[3], out_stride[3];
  } q, k;        // k.count 0: none
  int64_t tokens, seqlen;
  int64_t half;  // pairs of a head
  int turns;     // threads that turn a position's pairs
  int copies;    // threads that copy what is behind them
  int64_t positions, cos_stride, sin_stride;
  const P* cos;                // (positions, half)
  const P* sin;
  const int64_t* ids;          // (B, S) or null: position s of sequence b is offset + b * batch_offset + s
  int64_t ids_stride[2], offset, batch_offset;
  float sign;                  // of the sines
};

// Pairs of a thread.
template <bool INTERLEAVED, int E> constexpr int kPairs = INTERLEAVED && E > 1 ? E / 2 : E;

// A thread's pairs in one head: one pack of neighbours if interleaved, else one in each half.
template <bool INTERLEAVED, class T, int E> struct Pairs {
  Pack<T, E> first, second;

  FF_DEVICE void load(const T* head, int64_t half, int64_t i) {
    if constexpr (INTERLEAVED && E > 1) {
      first = load_streaming<T, E>(head + 2 * i);
    } else {
      first = load_streaming<T, E>(head + (INTERLEAVED ? 2 * i : i));
      second = load_streaming<T, E>(head + (INTERLEAVED ? 2 * i + 1 : half + i));
    }
  }
  FF_DEVICE float x0(int n) const { return INTERLEAVED && E > 1 ? first[2 * n] : first[n]; }
  FF_DEVICE float x1(int n) const { return INTERLEAVED && E > 1 ? first[2 * n + 1] : second[n]; }

  // Turned by the angles.
  template <int N>
  FF_DEVICE void store(T* head, int64_t half, int64_t i, const float (&cos)[N], const float (&sin)[N]) {
    if constexpr (INTERLEAVED && E > 1) {
      float y[E];
#pragma unroll
      for (int n = 0; n < N; n++) {
        y[2 * n] = x0(n) * cos[n] - x1(n) * sin[n];
        y[2 * n + 1] = x1(n) * cos[n] + x0(n) * sin[n];
      }
      store_streaming(head + 2 * i, make_pack<T, E>(y));
    } else {
      float y0[E], y1[E];
#pragma unroll
      for (int n = 0; n < N; n++) {
        y0[n] = x0(n) * cos[n] - x1(n) * sin[n];
        y1[n] = x1(n) * cos[n] + x0(n) * sin[n];
      }
      store_streaming(head + (INTERLEAVED ? 2 * i : i), make_pack<T, E>(y0));
      store_streaming(head + (INTERLEAVED ? 2 * i + 1 : half + i), make_pack<T, E>(y1));
    }
  }
};

// A thread per position and pack, and grid.y shares of the heads of q and k together.
template <bool INTERLEAVED, class T, class P, int E>
__global__ void __launch_bounds__(kThreads, 2) rotary(const Rotary<T, P> a) {
  constexpr int N = kPairs<INTERLEAVED, E>;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x, lanes = a.turns + a.copies;
  const int64_t token = quotient(item, lanes), lane = item - token * lanes;
  if (token >= a.tokens) return;
  const int64_t b = quotient(token, a.seqlen), s = token - b * a.seqlen;
  const int64_t heads = a.q.count + a.k.count;
  const int64_t begin = heads * blockIdx.y / gridDim.y, end = heads * (blockIdx.y + 1) / gridDim.y;
  const T *q = a.q.x + b * a.q.stride[0] + s * a.q.stride[2], *k = a.k.x + b * a.k.stride[0] + s * a.k.stride[2];
  T* q_out = a.q.out + b * a.q.out_stride[0] + s * a.q.out_stride[2];
  T* k_out = a.k.out + b * a.k.out_stride[0] + s * a.k.out_stride[2];
  const auto source = [&](int64_t h) {
    return h < a.q.count ? q + h * a.q.stride[1] : k + (h - a.q.count) * a.k.stride[1];
  };
  const auto target = [&](int64_t h) {
    return h < a.q.count ? q_out + h * a.q.out_stride[1] : k_out + (h - a.q.count) * a.k.out_stride[1];
  };

  if (lane >= a.turns) {
    const int64_t at = 2 * a.half + (lane - a.turns) * E;
    for (int64_t h = begin; h < end; h++)
      if (target(h) != source(h)) store_streaming(target(h) + at, load_streaming<T, E>(source(h) + at));
    return;
  }
  const int64_t p = a.ids ? __ldg(a.ids + b * a.ids_stride[0] + s * a.ids_stride[1])
                          : a.offset + b * a.batch_offset + s;
  const int64_t i = lane * N;
  float cos[N], sin[N];
  if (p >= 0 && p < a.positions) {
    const Pack<P, N> c = load_cached<P, N>(a.cos + p * a.cos_stride + i);
    const Pack<P, N> d = load_cached<P, N>(a.sin + p * a.sin_stride + i);
#pragma unroll
    for (int n = 0; n < N; n++) cos[n] = c[n], sin[n] = d[n] * a.sign;
  } else {
#pragma unroll
    for (int n = 0; n < N; n++) cos[n] = sin[n] = NAN;
  }
  for (int64_t first = begin; first < end; first += kHeads) {
    Pairs<INTERLEAVED, T, E> x[kHeads];
#pragma unroll
    for (int u = 0; u < kHeads; u++)
      if (first + u < end) x[u].load(source(first + u), a.half, i);
#pragma unroll
    for (int u = 0; u < kHeads; u++)
      if (first + u < end) x[u].store(target(first + u), a.half, i, cos, sin);
  }
}

// ---- arguments and launching ----------------------------------------------------------------------------------------
template <bool INTERLEAVED, int E, class T, class P> int launch_rotary(Rotary<T, P> a, int64_t rest, void* stream) {
  a.turns = int(a.half / kPairs<INTERLEAVED, E>), a.copies = int(rest / E);
  const int64_t blocks = (a.tokens * (a.turns + a.copies) + kThreads - 1) / kThreads;
  const int64_t heads = a.q.count + a.k.count, wanted = 8 * int64_t(multiprocessors());
  const int64_t most = wanted / blocks > 1 ? wanted / blocks : 1;  // fill the device a few times over
  const int64_t shares = heads < most ? heads : most;
  return launch("rotary", rotary<INTERLEAVED, T, P, E>, dim3(unsigned(blocks), unsigned(shares)), dim3(kThreads), 0,
                stream, a);
}

// Whether heads, their halves and the tables' rows start on packs.
bool in_packs(const ff_rotary_args* a) {
  const int64_t half = a->rotary_dim / 2, rest = a->head_dim - a->rotary_dim;
  bool fits = whole_vectors(a->dtype, {a->interleaved ? 2 * half : half, rest}, {a->q, a->q_out, a->k, a->k_out});
  for (int d = 0; d < 3; d++) {
    fits = fits && whole_vectors(a->dtype, {a->q_stride[d], a->q_out_stride[d]}, {});
    fits = fits && (!a->k || whole_vectors(a->dtype, {a->k_stride[d], a->k_out_stride[d]}, {}));
  }
  return fits && whole_vectors(a->table_dtype, {a->cos_stride, a->sin_stride}, {a->cos, a->sin});
}

}  // namespace
}  // namespace ff

extern "C" int ff_cuda_rotary(const ff_rotary_args* a, void* stream) {
  using namespace ff;
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->batch >= 0 && a->num_heads >= 0 && a->num_kv_heads >= 0 && a->seqlen >= 0 && a->head_dim >= 1,
             "batch, num_heads, num_kv_heads, seqlen, head_dim: one is out of range");
  FF_REQUIRE(a->rotary_dim >= 2 && a->rotary_dim % 2 == 0 && a->rotary_dim <= a->head_dim,
             "rotary_dim: %lld is odd, or not in [2, %lld]", (long long)a->rotary_dim, (long long)a->head_dim);
  if (int status = check_dtypes(a->dtype, a->table_dtype)) return status;
  const int64_t kv_heads = a->k ? a->num_kv_heads : 0;
  if (a->batch == 0 || a->seqlen == 0 || a->num_heads + kv_heads == 0) return FF_OK;
  FF_REQUIRE(a->q && a->q_out && !a->k == !a->k_out && a->cos && a->sin, "q, q_out, k, k_out, cos, sin: one is NULL");
  return for_dtypes(a->dtype, a->table_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    using P = decltype(p);
    Rotary<T, P> k{};
    k.q.x = static_cast<const T*>(a->q), k.q.out = static_cast<T*>(a->q_out), k.q.count = a->num_heads;
    k.k.x = static_cast<const T*>(a->k), k.k.out = static_cast<T*>(a->k_out), k.k.count = kv_heads;
    for (int d = 0; d < 3; d++) {
      k.q.stride[d] = a->q_stride[d], k.q.out_stride[d] = a->q_out_stride[d];
      k.k.stride[d] = a->k_stride[d], k.k.out_stride[d] = a->k_out_stride[d];
    }
    k.tokens = a->batch * a->seqlen, k.seqlen = a->seqlen, k.half = a->rotary_dim / 2;
    k.positions = a->positions, k.cos_stride = a->cos_stride, k.sin_stride = a->sin_stride;
    k.cos = static_cast<const P*>(a->cos), k.sin = static_cast<const P*>(a->sin), k.ids = a->position_ids;
    k.ids_stride[0] = a->position_ids_stride[0], k.ids_stride[1] = a->position_ids_stride[1];
    k.offset = a->offset, k.batch_offset = a->batch_offset, k.sign = a->inverse ? -1.f : 1.f;
    const bool inplace = a->q == a->q_out && a->k == a->k_out;
    const int64_t rest = inplace ? 0 : a->head_dim - a->rotary_dim;
    const auto with = [&](auto pack) {
      constexpr int E = decltype(pack)::value;
      return a->interleaved ? launch_rotary<true, E>(k, rest, stream) : launch_rotary<false, E>(k, rest, stream);
    };
    return in_packs(a) ? with(std::integral_constant<int, kVector<T>>{}) : with(std::integral_constant<int, 1>{});
  });
}
