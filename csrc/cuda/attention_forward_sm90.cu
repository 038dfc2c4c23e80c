// Attention forward for Hopper: out = dropout(softmax(scores)) v and lse, never holding the scores.
//
// FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608), algorithms 1 and 2. A block owns 128 queries of a head. One
// thread of a third warpgroup keeps keys and values coming by TMA, stages ahead; two warpgroups own 64 queries each.
// Tensor cores are kept busy in two ways: while a warpgroup computes the softmax of block j, its own product of the
// probabilities of block j - 1 with v runs, and so do the products of the other warpgroup, because the two take turns
// at issuing theirs (named barriers 1 and 2).
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_90a,code=sm_90a -cudart static
//     -Xcompiler -fPIC,-fvisibility=hidden -c attention_forward_sm90.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c attention_forward_sm90.cu
#include "attention_sm90.cuh"

namespace ff {
namespace {

constexpr int kQueries = 128, kThreads = 384;

template <class T, int D, bool Plain> struct ForwardTiles {
  static constexpr int kKeys = D > 128 || !Plain ? 64 : 128;  // what is added to scores takes registers
  static constexpr int kStages = D > 128 ? 2 : 256 / kKeys;
  static constexpr int kRow = kRowElements<D>;
  T q[2][64 * kRow], k[kStages][kKeys * kRow], v[kStages][kKeys * kRow];
  uint64_t full_q, full_k[kStages], full_v[kStages], empty_k[kStages], empty_v[kStages], landed;
};

struct ForwardParams {
  Attention a;
  Operand q, k, v;
  int blocks;          // of queries, per head
  int heads_together;  // so many heads run side by side: their keys and values stay in the L2 cache
};

struct Work {
  int batch, head, query;
};
// The last queries first: under a causal mask they take longest.
[[maybe_unused]] FF_DEVICE Work find_work(const ForwardParams& p) {
  const int heads = p.a.batch * p.a.num_heads, group = int(blockIdx.x / (unsigned(p.blocks) * p.heads_together));
  const int within = int(blockIdx.x - unsigned(group) * p.blocks * p.heads_together);
  const int size = min(p.heads_together, heads - group * p.heads_together);
  const int head = group * p.heads_together + within % size;
  return {head / p.a.num_heads, head % p.a.num_heads, (p.blocks - 1 - within / size) * kQueries};
}

// Scores -> unnormalised probabilities, in place; the running maximum and sum of each of the thread's two rows; what
// sums so far are to be multiplied with. Scores times `scale` are in units of log2.
template <int N>
FF_DEVICE void online_softmax(float (&p)[N], float (&top)[2], float (&sum)[2], float (&factor)[2], float scale) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float most = top[h];
#pragma unroll
    for (int i = 0; i < N / 2; i++) most = fmaxf(most, p[i / 2 * 4 + h * 2 + i % 2]);
    most = max_of_quad(most);
    const float shift = most == -INFINITY ? 0.f : most * scale;  // a row that has seen no key yet
    factor[h] = exp2f(top[h] * scale - shift);
    top[h] = most;
    float block_sum = 0;
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      float& value = p[i / 2 * 4 + h * 2 + i % 2];
      value = exp2f(value * scale - shift);
      block_sum += value;
    }
    sum[h] = sum[h] * factor[h] + block_sum;
  }
}

template <class T, int D, bool Plain>
__global__ void __launch_bounds__(kThreads, 1) attention_forward_hopper(const __grid_constant__ ForwardParams params) {
#ifdef FF_HOPPER
  using Tiles = ForwardTiles<T, D, Plain>;
  constexpr int kKeys = Tiles::kKeys, kStages = Tiles::kStages, N = kKeys / 2;
  constexpr int kAtOnce = D > 128 ? 16 : N;  // scores that are added to: registers
  constexpr int kParts = D > 128 ? 2 : 1, kWidth = D / kParts;  // of out: wgmma_m64k16 is up to 128 wide
  FF_DYNAMIC_SHARED(Tiles, tiles);
  const Attention& a = params.a;
  const int warpgroup = int(threadIdx.x / 128), t = int(threadIdx.x % 128);

  const Work work = find_work(params);
  const Sequence s = find_sequence(a, work.batch);
  if (work.query >= s.seqlen_q) return;
  const Range seen = keys_of(a, s, work.query, min(work.query + kQueries, s.seqlen_q));
  // Where no query sees a key one block is computed all the same, and hidden: wgmma in a branch would be serialised.
  const int first_key = seen.begin < seen.end ? seen.begin / kKeys * kKeys : 0;
  const int blocks = max((seen.end - first_key + kKeys - 1) / kKeys, 1);

  if (threadIdx.x == 0) {
    mbarrier_init(&tiles->full_q, 1);
    mbarrier_init(&tiles->landed, 1);
    for (int i = 0; i < kStages; i++) {
      mbarrier_init(&tiles->full_k[i], 1);
      mbarrier_init(&tiles->full_v[i], 1);
      mbarrier_init(&tiles->empty_k[i], 8);  // a warp each
      mbarrier_init(&tiles->empty_v[i], 8);
    }
    fence_async_proxy();
  }
  __syncthreads();

  if (warpgroup == 2) {
    decrease_registers<24>();
    if (t >= 32) return;
    const int kv_head = work.head / a.heads_per_kv;
    if (t == 0) {
      mbarrier_arrive_expect(&tiles->full_q, sizeof tiles->q);
      for (int half = 0; half < 2; half++)
        load_tile<64, D>(tiles->q[half], params.q, &tiles->full_q, work.batch, work.head,
                         int(s.first_q) + work.query + half * 64);
    }
#pragma unroll 1
    for (int j = 0; j < blocks; j++) {
      const int stage = j % kStages, key = first_key + j * kKeys, row = int(s.first_k) + key;
      const bool clear = a.cu_seqlens_k && key + kKeys > s.seqlen_k;
      if (t == 0) {
        mbarrier_wait(&tiles->empty_k[stage], j / kStages % 2 ^ 1);
        mbarrier_arrive_expect(&tiles->full_k[stage], sizeof tiles->k[stage]);
        load_tile<kKeys, D>(tiles->k[stage], params.k, &tiles->full_k[stage], work.batch, kv_head, row);
        mbarrier_wait(&tiles->empty_v[stage], j / kStages % 2 ^ 1);
        uint64_t* landed = clear ? &tiles->landed : &tiles->full_v[stage];
        mbarrier_arrive_expect(landed, sizeof tiles->v[stage]);
        load_tile<kKeys, D>(tiles->v[stage], params.v, landed, work.batch, kv_head, row);
      }
      if (clear) {  // the last block
        __syncwarp();
        mbarrier_wait(&tiles->landed, 0);
        clear_rows<kKeys, D>(tiles->v[stage], s.seqlen_k - key);
        fence_async_proxy();
        __syncwarp();
        if (t == 0) mbarrier_arrive(&tiles->full_v[stage]);
      }
    }
    return;
  }

  increase_registers<240>();
  const int query = work.query + warpgroup * 64, lane = t % 32, row_in_tile = t / 32 * 16 + lane / 4;
  const float scale = Plain ? a.scale_log2 : 1.f;
  float p[N], out[kParts][kWidth / 2], top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, factor[2];
  uint32_t left[N / 8][4];
#pragma unroll
  for (int part = 0; part < kParts; part++) {
#pragma unroll
    for (float& value : out[part]) value = 0;
  }

  const auto start_scores = [&](int j) {
    uint32_t half = warpgroup;
    if constexpr (D > 128) pin(half);  // or 16 descriptors of q are kept in registers that are not there
    const T *q = tiles->q[half], *k = tiles->k[j % kStages];
#pragma unroll
    for (int d = 0; d < D; d += 16) wgmma_m64k16<T, 0, 0>(p, k_in_rows<64>(q, d), k_in_rows<kKeys>(k, d), d > 0);
    wgmma_commit();
  };
  const auto wait_for_values = [&](int j) { mbarrier_wait(&tiles->full_v[j % kStages], j / kStages % 2); };
  const auto start_values = [&](int j) {
#pragma unroll
    for (int key = 0; key < kKeys; key += 16) {
#pragma unroll
      for (int part = 0; part < kParts; part++)
        wgmma_m64k16<T, 1>(out[part], left[key / 16],
                           k_across_rows<kKeys>(tiles->v[j % kStages] + part * kWidth * kKeys, key), true);
    }
    wgmma_commit();
  };
  const auto probabilities = [&](int j) {
    const int key = first_key + j * kKeys;
    const Place<false> at{query + row_in_tile, key + lane % 4 * 2};
    const bool edge = touches_edge(a, s, query, 64, key, kKeys);
    if constexpr (!Plain) {
#pragma unroll
      for (int i = 0; i < N; i += kAtOnce) {
        float unused[kAtOnce];
        add_to_scores<T>(a, s, work.batch, work.head, Place<false>{at.query, at.key + i * 2}, edge,
                         reinterpret_cast<float(&)[kAtOnce]>(p[i]), unused);
      }
    } else if (edge) {
      hide_outside(a, s, at, p);
    }
    online_softmax(p, top, sum, factor, scale);
    if constexpr (!Plain) {
      if (a.dropout.on) {
#pragma unroll
        for (int i = 0; i < N; i += 16) {
          const Kept<16> kept = keep_values<16>(a, first_row(a, s, work.batch, work.head),
                                                Place<false>{at.query, at.key + i * 2});
#pragma unroll
          for (int e = 0; e < 16; e++) p[i + e] = kept[e] ? p[i + e] : 0.f;
        }
      }
    }
  };
  const auto release = [&](uint64_t* barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };

  if (warpgroup == 1) named_barrier_arrive(1, 256);  // the first warpgroup begins
  mbarrier_wait(&tiles->full_q, 0);
  mbarrier_wait(&tiles->full_k[0], 0);
  named_barrier_sync(1 + warpgroup, 256);
  wgmma_fence();
  start_scores(0);
  if (warpgroup == 0 || blocks > 1) named_barrier_arrive(2 - warpgroup, 256);
  wgmma_wait<0>();
  pin(p);
  release(&tiles->empty_k[0]);
  probabilities(0);
  as_left_operand<T>(p, left);
#pragma unroll 1
  for (int j = 1; j < blocks; j++) {
    const int stage = j % kStages, before = (j - 1) % kStages;
    mbarrier_wait(&tiles->full_k[stage], j / kStages % 2);
    wait_for_values(j - 1);  // they were asked for before the keys; a wait between the products would serialise them
    named_barrier_sync(1 + warpgroup, 256);
    wgmma_fence();
    start_scores(j);
    start_values(j - 1);
    if (warpgroup == 0 || j + 1 < blocks) named_barrier_arrive(2 - warpgroup, 256);
    wgmma_wait<1>();
    pin(p);
    release(&tiles->empty_k[stage]);
    probabilities(j);
    wgmma_wait<0>();
#pragma unroll
    for (int part = 0; part < kParts; part++) pin(out[part]);
    release(&tiles->empty_v[before]);
#pragma unroll
    for (int part = 0; part < kParts; part++) {
#pragma unroll
      for (int i = 0; i < kWidth / 2; i++) out[part][i] *= factor[i / 2 % 2];
      pin(out[part]);
    }
    as_left_operand<T>(p, left);
  }
  wait_for_values(blocks - 1);
  wgmma_fence();
  start_values(blocks - 1);
  wgmma_wait<0>();
#pragma unroll
  for (int part = 0; part < kParts; part++) pin(out[part]);

#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float total = sum_of_quad(sum[h]);  // NaN passes through
    const float inverse = (Plain ? 1.f : a.dropout.scale) / total;
#pragma unroll
    for (int part = 0; part < kParts; part++) {
#pragma unroll
      for (int i = 0; i < kWidth / 4; i++) {
        float& value = out[part][i / 2 * 4 + h * 2 + i % 2];
        value = total == 0.f ? 0.f : value * inverse;
      }
    }
    const int i = query + row_in_tile + 8 * h;
    if (lane % 4 == 0 && i < s.seqlen_q)
      a.lse[first_row(a, s, work.batch, work.head) + i] =
          total == 0.f ? -INFINITY : (top[h] * scale + log2f(total)) * kLn2;
  }
  T* to = sequence_start(a, static_cast<T*>(a.out), a.out_stride, work.batch, work.head, s.first_q);
  store_tile(out, tiles->q[warpgroup], 3 + warpgroup, to, a.out_stride[2], query, s.seqlen_q, a.head_dim_v);
#endif
}

template <class T, int D, bool Plain> int run(const ff_attention_args* args, ForwardParams& p, void* stream) {
  constexpr int kKeys = ForwardTiles<T, D, Plain>::kKeys;
  if (int status = make_operand(&p.q, args, args->q, args->q_stride, args->num_heads, positions_q(args),
                                args->head_dim, 64))
    return status;
  const bool keys = positions_k(args) > 0;  // without any, whatever is loaded is hidden
  if (int status = make_operand(&p.k, args, keys ? args->k : args->q, keys ? args->k_stride : args->q_stride,
                                args->num_kv_heads, keys ? positions_k(args) : 1, args->head_dim, kKeys))
    return status;
  if (int status = make_operand(&p.v, args, keys ? args->v : args->q, keys ? args->v_stride : args->q_stride,
                                args->num_kv_heads, keys ? positions_k(args) : 1,
                                keys ? args->head_dim_v : args->head_dim, kKeys))
    return status;
  const int64_t grid = int64_t(p.blocks) * args->num_heads * args->batch;
  return launch("attention_forward", attention_forward_hopper<T, D, Plain>, dim3(unsigned(grid)), dim3(kThreads),
                sizeof(ForwardTiles<T, D, Plain>), stream, p);
}

template <class T> int run_dim(const ff_attention_args* args, ForwardParams& p, bool plain, void* stream) {
  const int64_t dim = std::max(args->head_dim, args->head_dim_v);
  if (dim <= 64) return plain ? run<T, 64, true>(args, p, stream) : run<T, 64, false>(args, p, stream);
  if (dim <= 96) return plain ? run<T, 96, true>(args, p, stream) : run<T, 96, false>(args, p, stream);
  if (dim <= 128) return plain ? run<T, 128, true>(args, p, stream) : run<T, 128, false>(args, p, stream);
  return plain ? run<T, 256, true>(args, p, stream) : run<T, 256, false>(args, p, stream);
}

}  // namespace

int attention_forward_sm90(const ff_attention_args* args, void* stream) {
  ForwardParams p{};
  p.a = make_attention(args);
  if (!positions_q(args) || !args->batch || !args->num_heads || !args->head_dim_v) return FF_OK;
  p.blocks = int((args->seqlen_q + kQueries - 1) / kQueries);
  const int64_t bytes_per_head = std::max<int64_t>(args->seqlen_k, 1) * (args->head_dim + args->head_dim_v) * 2;
  const int64_t kv_heads = std::max<int64_t>((16 << 20) / bytes_per_head, 1);
  p.heads_together = int(std::min<int64_t>(kv_heads * p.a.heads_per_kv, args->batch * args->num_heads));
  const bool plain = is_plain(p.a);
  return args->dtype == FF_BFLOAT16 ? run_dim<__nv_bfloat16>(args, p, plain, stream)
                                    : run_dim<__half>(args, p, plain, stream);
}

}  // namespace ff
