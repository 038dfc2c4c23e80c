// Attention backward for Hopper: the host's part, and the kernels before and after attention_backward_kv_sm90.cu;
// attention_backward_sm90.cuh has the formula and says how the parts fit together.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_90a,code=sm_90a -cudart static
//     -Xcompiler -fPIC,-fvisibility=hidden -c attention_backward_sm90.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c attention_backward_sm90.cu
#include "attention_backward_sm90.cuh"

namespace ff {
namespace attention_sm90 {
namespace {

// ---- before: statistics, zeros --------------------------------------------------------------------------------------
template <class T> FF_DEVICE float dot8(const T* x, const T* y) {
  uint4 a = *reinterpret_cast<const uint4*>(x), b = *reinterpret_cast<const uint4*>(y);
  T u[8], v[8];
  memcpy(u, &a, 16);
  memcpy(v, &b, 16);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) sum += to_float(u[i]) * to_float(v[i]);
  return sum;
}

// A block: one tile of queries of one head. What lies behind the last query gets lse = inf, so that its p is 0.
template <class T, int kQueries>
__global__ void __launch_bounds__(128) attention_backward_begin(const __grid_constant__ BackwardParams p) {
  const Attention& a = p.a;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.tickets = 0;
  const int tiles = (a.seqlen_q + kQueries - 1) / kQueries, tile = int(blockIdx.x % tiles);
  const int head = int(blockIdx.x / tiles) % a.num_heads, batch = int(blockIdx.x / tiles) / a.num_heads;
  const Sequence s = find_sequence(a, batch);
  if (tile * kQueries >= s.seqlen_q) return;
  const int64_t index = first_tile<kQueries>(p, s, batch, head) + tile;
  if (threadIdx.x < 2) p.turns[index * 2 + threadIdx.x] = 0;
  float4* dq = reinterpret_cast<float4*>(p.dq + index * 2 * kPiece);
#pragma unroll 4
  for (int i = threadIdx.x; i < 2 * kPiece / 4; i += 128) dq[i] = make_float4(0, 0, 0, 0);

  const T* out = sequence_start(a, static_cast<const T*>(a.out), a.out_stride, batch, head, s.first_q);
  const T* dout = sequence_start(a, static_cast<const T*>(a.dout), a.dout_stride, batch, head, s.first_q);
  const int64_t row = first_row(a, s, batch, head);
  float* statistics = p.statistics + index * 2 * kQueries;
  const int lane = threadIdx.x % 16;
#pragma unroll 1
  for (int i = threadIdx.x / 16; i < kQueries; i += 8) {
    const int query = tile * kQueries + i;
    float sum = 0;
    if (query < s.seqlen_q) {
      for (int col = lane * 8; col < a.head_dim_v; col += 128)
        sum += dot8(dout + query * a.dout_stride[2] + col, out + query * a.out_stride[2] + col);
    }
#pragma unroll
    for (int other = 1; other < 16; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
    if (lane != 0) continue;
    const bool inside = query < s.seqlen_q;
    const float lse = inside ? a.lse[row + query] : -INFINITY;
    statistics[i] = lse == -INFINITY ? INFINITY : lse * kLog2e;
    statistics[kQueries + i] = inside ? sum - (a.dlse ? a.dlse[row + query] : 0.f) : 0.f;
  }
}

// ---- after: dq from its accumulator ---------------------------------------------------------------------------------
template <class T, int kQueries>
__global__ void __launch_bounds__(256) attention_backward_end(const __grid_constant__ BackwardParams p) {
#ifdef FF_HOPPER
  FF_SHARED(T, rows, [2][64 * 64]);
  const Attention& a = p.a;
  const int tiles = (a.seqlen_q + kQueries - 1) / kQueries, tile = int(blockIdx.x % tiles);
  const int head = int(blockIdx.x / tiles) % a.num_heads, batch = int(blockIdx.x / tiles) / a.num_heads;
  const Sequence s = find_sequence(a, batch);
  if (tile * kQueries >= s.seqlen_q) return;
  const int piece = threadIdx.x / 128, t = threadIdx.x % 128;
  const int64_t index = first_tile<kQueries>(p, s, batch, head) + tile;
  const float4* from = reinterpret_cast<const float4*>(p.dq + (index * 2 + piece) * kPiece);
  float values[1][32];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float4 four = from[i * 128 + t];
    values[0][4 * i] = four.x * a.scale, values[0][4 * i + 1] = four.y * a.scale;
    values[0][4 * i + 2] = four.z * a.scale, values[0][4 * i + 3] = four.w * a.scale;
  }
  const int col = kQueries == 128 ? 0 : piece * 64, query = tile * kQueries + (kQueries == 128 ? piece * 64 : 0);
  T* to = sequence_start(a, static_cast<T*>(a.dq), a.dq_stride, batch, head, s.first_q);
  store_tile(values, rows[piece], 1 + piece, to + col, a.dq_stride[2], query, s.seqlen_q, a.head_dim - col);
#endif
}

// ---- host -----------------------------------------------------------------------------------------------------------
int64_t tile_queries(const ff_attention_args* a) {
  return std::max(a->head_dim, a->head_dim_v) <= 64 ? kTileQueries<64> : kTileQueries<128>;
}
int64_t tiles_per_head(const ff_attention_args* a) {
  const int64_t queries = tile_queries(a);
  return a->cu_seqlens_q ? a->total_q / queries + a->batch : (a->seqlen_q + queries - 1) / queries * a->batch;
}

// `ordered`: gradients repeat bit for bit; without, blocks add to dq as they come.
int run_backward(const ff_attention_args* args, void* stream, bool ordered) {
  BackwardParams p{};
  p.a = make_attention(args);
  p.ordered = ordered;
  p.blocks = int((args->seqlen_k + kKeys - 1) / kKeys);
  p.tiles_per_head = tiles_per_head(args);
  const int64_t tiles = p.tiles_per_head * args->num_heads;
  p.dq = static_cast<float*>(args->workspace);
  p.statistics = p.dq + tiles * 2 * kPiece;
  p.turns = reinterpret_cast<int*>(p.statistics + tiles * 2 * tile_queries(args));
  p.tickets = p.turns + tiles * 2;

  const int64_t q_heads = args->num_heads, kv_heads = args->num_kv_heads;
  const int64_t queries = positions_q(args), keys = positions_k(args), dim = args->head_dim, dim_v = args->head_dim_v;
  int status = make_operand(&p.q, args, args->q, args->q_stride, q_heads, queries, dim, 64);
  if (!status) status = make_operand(&p.dout, args, args->dout, args->dout_stride, q_heads, queries, dim_v, 64);
  if (!status) status = make_operand(&p.k, args, args->k, args->k_stride, kv_heads, keys, dim, kKeys);
  if (!status) status = make_operand(&p.v, args, args->v, args->v_stride, kv_heads, keys, dim_v, kKeys);
  if (status) return status;

  const int64_t per_head = (args->seqlen_q + tile_queries(args) - 1) / tile_queries(args);
  const dim3 grid(unsigned(per_head * q_heads * args->batch));
  const auto run = [&](void (*kernel)(BackwardParams), int threads) {
    return launch("attention_backward", kernel, grid, dim3(threads), 0, stream, p);
  };
  status = for_backward_kernels(
      args, [&](auto t, auto d) { return run(attention_backward_begin<decltype(t), kTileQueries<d.value>>, 128); });
  if (!status) status = attention_backward_kv(args, p, stream);
  if (status) return status;
  return for_backward_kernels(
      args, [&](auto t, auto d) { return run(attention_backward_end<decltype(t), kTileQueries<d.value>>, 256); });
}

}  // namespace
}  // namespace attention_sm90

int attention_backward_sm90(const ff_attention_args* args, void* stream) {
  return attention_sm90::run_backward(args, stream, true);
}

size_t attention_backward_workspace_sm90(const ff_attention_args* a) {
  using namespace attention_sm90;
  const int64_t tiles = tiles_per_head(a) * a->num_heads;
  const size_t bytes = size_t(tiles * (2 * kPiece + 2 * tile_queries(a) + 2) * 4 + 16);
  return std::max(bytes, attention_backward_workspace_sm80(a));  // where the tensors themselves turn out not to do
}

bool attention_supported_sm90(const ff_attention_args* a, bool backward) {
  using attention_sm90::kKeys;
  const int64_t largest = backward ? 128 : 256, most_blocks = int64_t(1) << 31;
  const bool asks_for_workspace = backward && !a->q;  // with sizes and options alone
  bool supported = is_half_precision(a->dtype) && a->head_dim % 8 == 0 && a->head_dim_v % 8 == 0 &&
                   a->head_dim <= largest && a->head_dim_v <= largest && a->head_dim > 0 && a->head_dim_v > 0 &&
                   (a->seqlen_q + 63) / 64 * a->num_heads * a->batch < most_blocks;
  if (backward)
    supported = supported && !a->dbias && !a->ddistance_bias && positions_q(a) > 0 && positions_k(a) > 0 &&
                a->batch > 0 && a->num_heads > 0 &&
                (a->seqlen_k + kKeys - 1) / kKeys * a->num_kv_heads * a->batch < most_blocks;
  if (!supported || asks_for_workspace) return supported;
  const int64_t q = positions_q(a), k = positions_k(a);
  supported = in_whole_vectors(a->q, a->q_stride, q) && in_whole_vectors(a->k, a->k_stride, k) &&
              in_whole_vectors(a->v, a->v_stride, k) && in_whole_vectors(a->out, a->out_stride, q);
  if (!backward) return supported;
  return supported && in_whole_vectors(a->dout, a->dout_stride, q) && in_whole_vectors(a->dq, a->dq_stride, q) &&
         in_whole_vectors(a->dk, a->dk_stride, k) && in_whole_vectors(a->dv, a->dv_stride, k);
}

}  // namespace ff
