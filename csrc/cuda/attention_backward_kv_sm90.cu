// The gradients of attention on Hopper: the kernel that owns keys (attention_backward_sm90.cuh says what comes before
// and after it).
//
// A block owns 128 keys of a key/value head and walks over the queries of all heads that read it, so dk and dv stay in
// registers. Two warpgroups own 64 keys each and compute scores transposed, (keys, queries): p is then the left operand
// of dv as it lies, and ds goes through shared memory once for dk and dq. Each warpgroup multiplies a (64, 64) piece of
// dq; a warp of the third warpgroup adds it to a float accumulator in memory by bulk reductions, another keeps tiles
// coming by TMA. Blocks take turns at each piece (`ordered`), so gradients repeat bit for bit. For that the blocks of
// a head start with the one whose first tile no earlier block touches: in a causal mask none waits then.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_90a,code=sm_90a -cudart static
//     -Xcompiler -fPIC,-fvisibility=hidden -c attention_backward_kv_sm90.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE
//     -c attention_backward_kv_sm90.cu
#include "attention_backward_sm90.cuh"

namespace ff {
namespace attention_sm90 {
namespace {

constexpr int kStages = 2, kThreads = 384;
enum Barriers { kBoth = 1, kPieceFull = 2, kPieceEmpty = 4, kWarpgroup = 6 };

// Which tiles of queries see any of the block's keys, and in which order blocks and tiles are taken.
struct Walk {
  int first, count;
  bool keys_descend;  // blocks from the last key to the first, and tiles from the first to the last; or both reversed
  [[maybe_unused]] FF_DEVICE int tile(int i) const { return keys_descend ? first + i : first + count - 1 - i; }
};
// What a block does. In shared memory, since registers are scarce.
struct Job {
  int batch, kv_head, block;
  int64_t first_tile;  // of the first head that reads the keys
  Sequence s;
  Walk walk;
};

template <class T, int D> struct BackwardTiles {
  static constexpr int kQueries = kTileQueries<D>, kSubs = kQueries / 64;
  static constexpr int kRow = kRowElements<D>;
  T k[kKeys * kRow], v[kKeys * kRow];
  T q[kStages][kSubs][64 * kRow], dout[kStages][kSubs][64 * kRow];
  T ds[2][kSubs][kKeys * 64];
  float dq[2][kPiece];
  float statistics[kStages][2][kQueries];  // lse in units of log2, delta
  uint64_t full_kv, full[kStages], empty[kStages], landed;
  Job job;
};

template <int kQueries> FF_DEVICE Job find_job(const BackwardParams& p, int number) {
  const Attention& a = p.a;
  const bool keys_descend = a.last_distance < kFar;
  const int place = number % p.blocks, head = number / p.blocks, kv_heads = a.num_heads / a.heads_per_kv;
  const int block = keys_descend ? p.blocks - 1 - place : place, batch = head / kv_heads;
  const Sequence s = find_sequence(a, batch);
  Walk walk{0, 0, keys_descend};
  const Range seeing = queries_of(a, s, block * kKeys, (block + 1) * kKeys);
  if (seeing.begin < seeing.end) {
    walk.first = seeing.begin / kQueries;
    walk.count = (seeing.end + kQueries - 1) / kQueries - walk.first;
  }
  const int kv_head = head % kv_heads;
  return {batch, kv_head, block, first_tile<kQueries>(p, s, batch, kv_head * a.heads_per_kv), s, walk};
}
// How many blocks add to the tile before this one does.
template <int kQueries> FF_DEVICE int turn_of(const Attention& a, const Job& job, int tile) {
  const Range seen = keys_of(a, job.s, tile * kQueries, min((tile + 1) * kQueries, job.s.seqlen_q));
  return job.walk.keys_descend ? (seen.end - 1) / kKeys - job.block : job.block - seen.begin / kKeys;
}

template <class T, int D, bool Plain>
__global__ void __launch_bounds__(kThreads, 1)
    attention_backward_hopper(const __grid_constant__ BackwardParams params) {
#ifdef FF_HOPPER
  using Tiles = BackwardTiles<T, D>;
  constexpr int kSubs = Tiles::kSubs, kQueries = Tiles::kQueries;
  constexpr int kSecondPart = D == 96 ? 2 : 1;  // of the second piece of dq, half is columns that are not there
  FF_DYNAMIC_SHARED(Tiles, tiles);
  const Attention& a = params.a;
  const int warpgroup = int(threadIdx.x / 128), t = int(threadIdx.x % 128), lane = t % 32;

  if (threadIdx.x == 0) {
    mbarrier_init(&tiles->full_kv, 1);
    mbarrier_init(&tiles->landed, 1);
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(&tiles->full[i], 1);
      mbarrier_init(&tiles->empty[i], 8);  // a warp each
    }
    fence_async_proxy();
    // A block may wait for one with a smaller number: by numbering them as they start, that one is running or done.
    tiles->job = find_job<kQueries>(params, params.ordered ? atomicAdd(params.tickets, 1) : int(blockIdx.x));
  }
  __syncthreads();
  const Job& job = tiles->job;
  const Sequence& s = job.s;
  if (job.block * kKeys >= s.seqlen_k) return;
  const int steps = job.walk.count * a.heads_per_kv;

  if (warpgroup == 2) {
    decrease_registers<24>();
    if (steps == 0) return;
    if (t < 32) {
      // Tiles that hold a neighbour's rows are loaded to one side of `full`: they count as full once those are zeros.
      int landings = 0;
      const auto cleared = [&](auto clear, uint64_t* full) {
        __syncwarp();
        mbarrier_wait(&tiles->landed, landings++ % 2);
        clear();
        fence_async_proxy();
        __syncwarp();
        if (t == 0) mbarrier_arrive(full);
      };
      const bool clear_keys = a.cu_seqlens_k && (job.block + 1) * kKeys > s.seqlen_k;
      if (t == 0) {
        const int row = int(s.first_k) + job.block * kKeys;
        uint64_t* landed = clear_keys ? &tiles->landed : &tiles->full_kv;
        mbarrier_arrive_expect(landed, sizeof tiles->k + sizeof tiles->v);
        load_tile<kKeys, D>(tiles->k, params.k, landed, job.batch, job.kv_head, row);
        load_tile<kKeys, D>(tiles->v, params.v, landed, job.batch, job.kv_head, row);
      }
      if (clear_keys)
        cleared(
            [&] {
              clear_rows<kKeys, D>(tiles->k, s.seqlen_k - job.block * kKeys);
              clear_rows<kKeys, D>(tiles->v, s.seqlen_k - job.block * kKeys);
            },
            &tiles->full_kv);
      int head = 0, i = 0;
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        const int stage = step % kStages, tile = job.walk.tile(i);
        const bool clear = a.cu_seqlens_q && (tile + 1) * kQueries > s.seqlen_q;
        if (t == 0) {
          const int row = int(s.first_q) + tile * kQueries, q_head = job.kv_head * a.heads_per_kv + head;
          uint64_t* landed = clear ? &tiles->landed : &tiles->full[stage];
          mbarrier_wait(&tiles->empty[stage], step / kStages % 2 ^ 1);
          mbarrier_arrive_expect(landed, 2 * sizeof tiles->q[stage] + sizeof tiles->statistics[stage]);
          for (int sub = 0; sub < kSubs; sub++) {
            load_tile<64, D>(tiles->q[stage][sub], params.q, landed, job.batch, q_head, row + sub * 64);
            load_tile<64, D>(tiles->dout[stage][sub], params.dout, landed, job.batch, q_head, row + sub * 64);
          }
          const int64_t index = job.first_tile + head * params.tiles_per_head + tile;
          bulk_load(tiles->statistics[stage], params.statistics + index * 2 * kQueries, landed,
                    sizeof tiles->statistics[stage]);
        }
        if (clear)
          cleared(
              [&] {
                for (int sub = 0; sub < kSubs; sub++) {
                  clear_rows<64, D>(tiles->q[stage][sub], s.seqlen_q - tile * kQueries - sub * 64);
                  clear_rows<64, D>(tiles->dout[stage][sub], s.seqlen_q - tile * kQueries - sub * 64);
                }
              },
              &tiles->full[stage]);
        if (++i == job.walk.count) i = 0, head++;
      }
    } else if (t / 32 == 1 || t / 32 == 2) {
      const int piece = t / 32 - 1;
      int head = 0, i = 0;
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        const int tile = job.walk.tile(i);
        const int64_t index = (job.first_tile + head * params.tiles_per_head + tile) * 2 + piece;
        named_barrier_sync(kPieceFull + piece, 160);
        if (lane == 0) {
          if (params.ordered) wait_for_turn(params.turns + index, turn_of<kQueries>(a, job, tile));
          bulk_reduce_add(params.dq + index * kPiece, tiles->dq[piece],
                          sizeof tiles->dq[piece] / (piece == 0 ? 1 : kSecondPart));
          bulk_commit();
          bulk_wait_read<0>();
        }
        __syncwarp();
        if (step + 1 < steps) named_barrier_arrive(kPieceEmpty + piece, 160);
        if (lane == 0 && params.ordered) {
          bulk_wait<0>();
          end_turn(params.turns + index);
        }
        __syncwarp();
        if (++i == job.walk.count) i = 0, head++;
      }
      if (lane == 0) bulk_wait<0>();
    }
    return;
  }

  increase_registers<240>();
  const int row_in_tile = t / 32 * 16 + lane / 4, col_in_tile = lane % 4 * 2;
  const T *own_k = tiles->k + warpgroup * 64 * 64, *own_v = tiles->v + warpgroup * 64 * 64;
  float dk[1][D / 2], dv[1][D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; i++) dk[0][i] = dv[0][i] = 0;
  if (steps > 0) mbarrier_wait(&tiles->full_kv, 0);

  int head = 0, walked = 0;  // of the heads that read these keys, and of the walk
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    const int stage = step % kStages, query = job.walk.tile(walked) * kQueries;
    T(&ds_tiles)[kSubs][kKeys * 64] = tiles->ds[step % 2];
    mbarrier_wait(&tiles->full[stage], step / kStages % 2);
#pragma unroll
    for (int sub = 0; sub < kSubs; sub++) {
      const T *q = tiles->q[stage][sub], *dout = tiles->dout[stage][sub];
      const float* lse = tiles->statistics[stage][0] + sub * 64 + col_in_tile;
      const float* delta = tiles->statistics[stage][1] + sub * 64 + col_in_tile;
      float p[32], dp[32];
      const auto start_dp = [&] {
#pragma unroll
        for (int d = 0; d < D; d += 16)
          wgmma_m64k16<T, 0, 0>(dp, k_in_rows<kKeys>(own_v, d), k_in_rows<64>(dout, d), d > 0);
        wgmma_commit();
      };
      wgmma_fence();
#pragma unroll
      for (int d = 0; d < D; d += 16)
        wgmma_m64k16<T, 0, 0>(p, k_in_rows<kKeys>(own_k, d), k_in_rows<64>(q, d), d > 0);
      wgmma_commit();
      if constexpr (Plain) {
        start_dp();
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();  // dp comes later: there are not enough registers for it and the derivative of the cap
      }
      pin(p);

      const int own_key = job.block * kKeys + warpgroup * 64;
      const Place<true> at{query + sub * 64 + col_in_tile, own_key + row_in_tile};
      const bool edge = touches_edge(a, s, query + sub * 64, 64, own_key, 64);
      Kept<32> kept{};
      uint32_t left[4][4];
      if constexpr (Plain) {
        if (edge) hide_outside(a, s, at, p);
#pragma unroll
        for (int i = 0; i < 32; i++) p[i] = exp2f(p[i] * a.scale_log2 - lse[8 * (i / 4) + i % 2]);
        as_left_operand<T>(p, left);
      } else {
        const int q_head = job.kv_head * a.heads_per_kv + head;
#pragma unroll
        for (int i = 0; i < 32; i += 8) {  // 16 queries at a time: registers again
          float(&part)[8] = reinterpret_cast<float(&)[8]>(p[i]);
          const Place<true> here{at.query + i * 2, at.key};
          float derivative[8], dropped[8];
          add_to_scores<T>(a, s, job.batch, q_head, here, edge, part, derivative);
#pragma unroll
          for (int e = 0; e < 8; e++) dropped[e] = part[e] = exp2f(part[e] - lse[i * 2 + 8 * (e / 4) + e % 2]);
          if (a.dropout.on) {
            const Kept<8> kept_part = keep_values<8>(a, first_row(a, s, job.batch, q_head), here);
            kept.bits[0] |= kept_part.bits[0] << i;
#pragma unroll
            for (int e = 0; e < 8; e++) dropped[e] = kept_part[e] ? part[e] : 0.f;
          }
          as_left_operand<T>(dropped, reinterpret_cast<uint32_t(&)[1][4]>(left[i / 8]));
          if (a.softcap > 0) {
#pragma unroll
            for (int e = 0; e < 8; e++) part[e] *= derivative[e];
          }
        }
        wgmma_fence();
        start_dp();
      }
      wgmma_wait<0>();
      pin(dp);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 64; i += 16) wgmma_m64k16<T, 1>(dv[0], left[i / 16], k_across_rows<64>(dout, i), true);
      wgmma_commit();

      T* ds = ds_tiles[sub] + warpgroup * 64 * 64;
#pragma unroll
      for (int i = 0; i < 32; i += 2) {
        float two[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float gradient = dp[i + e];
          if constexpr (!Plain) {
            if (a.dropout.on) gradient = kept[i + e] ? gradient * a.dropout.scale : 0.f;
          }
          two[e] = p[i + e] * (gradient - delta[8 * (i / 4) + e]);
        }
        const uint32_t bits = pack_two<T>(two[0], two[1]);
        memcpy(ds + swizzled(row_in_tile + i / 2 % 2 * 8, i / 4 * 8 + col_in_tile), &bits, 4);
      }
    }

    fence_async_proxy();
    named_barrier_sync(kWarpgroup + warpgroup, 128);
    wgmma_fence();
#pragma unroll
    for (int sub = 0; sub < kSubs; sub++) {
#pragma unroll
      for (int i = 0; i < 64; i += 16)
        wgmma_m64k16<T, 0, 1>(dk[0], k_in_rows<kKeys>(ds_tiles[sub] + warpgroup * 64 * 64, i),
                              k_across_rows<64>(tiles->q[stage][sub], i), true);
    }
    wgmma_commit();
    // The other warpgroup's half of ds is there, and nobody reads the half that will be written next.
    named_barrier_sync(kBoth, 256);
    float dq[32];
    const T* keys = tiles->k + (kSubs == 2 ? 0 : warpgroup * kKeys * 64);
#pragma unroll
    for (int i = 0; i < kKeys; i += 16)
      wgmma_m64k16<T, 1, 1>(dq, k_across_rows<kKeys>(ds_tiles[kSubs == 2 ? warpgroup : 0], i),
                            k_across_rows<kKeys>(keys, i), i > 0);
    wgmma_commit();
    wgmma_wait<1>();
    pin(dv[0]);
    pin(dk[0]);
    if (lane == 0) mbarrier_arrive(&tiles->empty[stage]);
    wgmma_wait<0>();
    pin(dq);
    if (step > 0) named_barrier_sync(kPieceEmpty + warpgroup, 160);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (i >= 8 / kSecondPart && warpgroup == 1) break;
      reinterpret_cast<float4*>(tiles->dq[warpgroup])[i * 128 + t] =
          make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    }
    fence_async_proxy();
    named_barrier_arrive(kPieceFull + warpgroup, 160);
    if (++walked == job.walk.count) walked = 0, head++;
  }

#pragma unroll
  for (int i = 0; i < D / 2; i++) {
    dk[0][i] *= a.scale;
    if constexpr (!Plain) dv[0][i] *= a.dropout.scale;
  }
  named_barrier_sync(kBoth, 256);  // nobody reads keys and values any more
  const int own_key = job.block * kKeys + warpgroup * 64;
  T* to_k = sequence_start(a, static_cast<T*>(a.dk), a.dk_stride, job.batch, job.kv_head, s.first_k);
  T* to_v = sequence_start(a, static_cast<T*>(a.dv), a.dv_stride, job.batch, job.kv_head, s.first_k);
  store_tile(dk, tiles->k + warpgroup * 64 * Tiles::kRow, kWarpgroup + warpgroup, to_k, a.dk_stride[2], own_key, s.seqlen_k,
             a.head_dim);
  store_tile(dv, tiles->v + warpgroup * 64 * Tiles::kRow, kWarpgroup + warpgroup, to_v, a.dv_stride[2], own_key, s.seqlen_k,
             a.head_dim_v);
#endif
}

template <class T, int D> int run(const ff_attention_args* args, const BackwardParams& p, void* stream) {
  const dim3 blocks(unsigned(p.blocks * args->num_kv_heads * args->batch));
  return launch("attention_backward",
                is_plain(p.a) ? attention_backward_hopper<T, D, true> : attention_backward_hopper<T, D, false>, blocks,
                dim3(kThreads), sizeof(BackwardTiles<T, D>), stream, p);
}

}  // namespace

int attention_backward_kv(const ff_attention_args* args, const BackwardParams& p, void* stream) {
  return for_backward_kernels(args, [&](auto t, auto d) { return run<decltype(t), d.value>(args, p, stream); });
}

}  // namespace attention_sm90
}  // namespace ff
