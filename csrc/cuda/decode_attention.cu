// Attention of a few new queries against a key/value cache on a GPU: one step of generation.
//
//   s_j = cap(scale q . k_j) - slope |distance|,   out = sum_j softmax(s)_j v_j
//
// The work is reading the cache once. Floor: the bytes of the valid keys and values over the memory bandwidth. So the
// query heads that share a key/value head, and the new positions, are the 16 rows of one tensor-core operand: a key
// that was read serves them together (more than 16 rows read it again, from the L2 cache). And a sequence's keys are cut
// into parts, a block each, as many as fill the GPU (split keys: Dao et al. 2023, "Flash-Decoding"). Within a part each
// warp takes every fourth group of 16 keys and keeps a ring of its own of tiles on their way from memory, so no warp
// waits for another before the end, where their results are merged; a second kernel merges the parts, in order.
//
// How many parts is decided from the cache's capacity, and where they lie from the lengths on the device: the host never
// waits.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c decode_attention.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c decode_attention.cu
#include "attention_sm80.cuh"

namespace ff {
namespace {

constexpr int kRows = 16;         // of one tensor-core operand
constexpr int kKeys = 16;         // of a tile
constexpr int kMaxSplits = 64;    // a warp of the second kernel holds the weights of all parts
constexpr int kKeysPerSplit = 256;  // of the capacity, at least: shorter parts cost more to merge than they gain
constexpr int kMergeThreads = 128;

// ff_decode_attention_args as the kernels read it.
struct Decode {
  const void *q, *k, *v;
  void* out;
  float *lse, *part, *part_lse;  // (splits, B, Hq, Sq, Dv) and (splits, B, Hq, Sq), in units of log2
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  int num_heads, num_kv_heads, heads_per_kv, seqlen_q, head_dim, head_dim_v, rows, row_blocks, splits;
  bool q_whole, k_whole, v_whole;  // read 16 bytes at a time
  int64_t cache_rows, all_rows;    // all_rows: B * Hq * Sq
  int capacity, page_size;
  int first_distance, last_distance;  // query i sees key j if j - p(i) is in [first, last]
  float scale, scale_log2, softcap, softcap_log2, inverse_softcap;
  const int32_t *cache_seqlens, *cache_leftpad, *cache_batch_idx, *page_table;
  const float* alibi_slopes;
  int64_t page_table_stride, alibi_stride;
};

// A ring of as many tiles per warp as shared memory has room for, of keys and of values in turn.
template <int D> struct DecodeTiles {
  static constexpr int kWarps = D > 128 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kRing = D == 64 ? 8 : D == 96 ? 7 : 5;
  static constexpr int kRingElements = kRing * kKeys * D;
  static constexpr int kStride = D + 8;  // of a warp's results: padded against bank conflicts
  static constexpr int kShared = (kRows * D + kWarps * kRingElements) * 2;
  static_assert(kShared <= kSharedLimit && kWarps * kRows * kStride * 4 <= kShared, "fits every GPU");
};

// The keys of a sequence that one of the queries sees, and where the cache has them.
struct Keys {
  int begin, end, length;
  int64_t row;  // of the cache, without pages
  bool valid;   // the lengths and the row are in range
};
FF_DEVICE Keys find_keys(const Decode& d, int batch) {
  const int length = d.cache_seqlens[batch], first = d.cache_leftpad ? d.cache_leftpad[batch] : 0;
  const int64_t row = d.cache_batch_idx ? d.cache_batch_idx[batch] : batch;
  const bool valid = length >= 0 && length <= d.capacity && first >= 0 && first <= length &&
                     (d.page_table || (row >= 0 && row < d.cache_rows));
  if (!valid) return {0, 0, 0, 0, false};
  return {max(first, length - d.seqlen_q + d.first_distance), min(length, length + d.last_distance), length, row, true};
}

// A warp starts copying 16 rows of a matrix, `at` elements from its beginning (lane l has row l's; -1: zeros).
template <int D, class T>
FF_DEVICE void load_rows(T* tile, const T* matrix, int64_t at, int cols, bool whole) {
  constexpr int kAcross = D % 64 == 0 ? 8 : 4, kDown = 32 / kAcross;
  const int lane = threadIdx.x % 32, row = lane / kAcross, piece = lane % kAcross;
  if (whole) {
#pragma unroll
    for (int r = 0; r < kKeys; r += kDown) {
      const int64_t from = __shfl_sync(~0u, at, r + row);
      const T* source = matrix + max(from, int64_t(0)) + piece * 8;
#pragma unroll
      for (int c = 0; c < D / 8; c += kAcross)
        cp_async16(tile + swizzled<D>(r + row, c + piece), source + c * 8, from >= 0 && (c + piece) * 8 < cols);
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < kKeys; r += kDown) {
      const int64_t from = __shfl_sync(~0u, at, r + row);
#pragma unroll 1
      for (int c = piece * 8; c < D; c += kAcross * 8) {
        T* to = tile + swizzled<D>(r + row, c / 8);
#pragma unroll
        for (int e = 0; e < 8; e++) to[e] = from >= 0 && c + e < cols ? matrix[from + c + e] : from_float<T>(0.f);
      }
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(DecodeTiles<D>::kThreads) decode_attention(const __grid_constant__ Decode d) {
  using Tiles = DecodeTiles<D>;
  constexpr int kWarps = Tiles::kWarps, kRing = Tiles::kRing, N = kKeys / 2;
  FF_DYNAMIC_SHARED(T, shared);
  FF_SHARED(float, tops, [kWarps][kRows]);
  FF_SHARED(float, sums, [kWarps][kRows]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  // The blocks that read the same keys are neighbours.
  const int first_row = int(blockIdx.x % d.row_blocks) * kRows, split = int(blockIdx.x / d.row_blocks) % d.splits;
  const int plane = int(blockIdx.x / d.row_blocks / d.splits);
  const int kv_head = plane % d.num_kv_heads, batch = plane / d.num_kv_heads;
  const auto head_of = [&](int row) { return kv_head * d.heads_per_kv + (first_row + row) / d.seqlen_q; };
  const auto query_of = [&](int row) { return (first_row + row) % d.seqlen_q; };
  const auto q_at = [&](int row) {
    return batch * d.q_stride[0] + head_of(row) * d.q_stride[1] + query_of(row) * d.q_stride[2];
  };
  if (warp == 0)
    load_rows<D>(shared, static_cast<const T*>(d.q), lane < kRows && first_row + lane < d.rows ? q_at(lane) : -1,
                 d.head_dim, d.q_whole);
  cp_async_commit();

  // The part's tiles, of which the warp has every kWarps-th.
  const Keys keys = find_keys(d, batch);
  const int tiles = keys.begin < keys.end ? (keys.end - keys.begin + kKeys - 1) / kKeys : 0;
  const int per_part = ((tiles + d.splits - 1) / d.splits + kWarps - 1) / kWarps * kWarps;
  const int first_tile = split * per_part + warp, end_tile = min(tiles, (split + 1) * per_part);
  const int steps = first_tile < end_tile ? 2 * ((end_tile - first_tile + kWarps - 1) / kWarps) : 0;
  const T* k = static_cast<const T*>(d.k) + kv_head * d.k_stride[1];
  const T* v = static_cast<const T*>(d.v) + kv_head * d.v_stride[1];
  T* ring = shared + kRows * D + warp * Tiles::kRingElements;
  bool missing = !keys.valid;
  int64_t k_at = -1, v_at = -1;  // of the lane's key in the tile that was asked for last
  const auto locate = [&](int tile) {
    const int key = keys.begin + tile * kKeys + lane % kKeys;
    k_at = v_at = -1;
    if (key >= keys.end) return;
    int64_t row = keys.row, position = key;
    if (d.page_table) {
      row = __ldg(d.page_table + batch * d.page_table_stride + key / d.page_size), position = key % d.page_size;
      if (row < 0 || row >= d.cache_rows) {
        missing = true;
        return;
      }
    }
    k_at = row * d.k_stride[0] + position * d.k_stride[2];
    v_at = row * d.v_stride[0] + position * d.v_stride[2];
  };
  // Even steps are about keys, odd ones about the same tile's values.
  const auto start = [&](int step) {
    if (step < steps) {
      T* to = ring + step % kRing * (kKeys * D);
      if (step % 2 == 0) {
        locate(first_tile + step / 2 * kWarps);
        load_rows<D>(to, k, k_at, d.head_dim, d.k_whole);
      } else {
        load_rows<D>(to, v, v_at, d.head_dim_v, d.v_whole);
      }
    }
    cp_async_commit();
  };
#pragma unroll 1
  for (int step = 0; step < kRing - 1; step++) start(step);

  int position[2];
  float slope[2] = {};
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = min(lane / 4 + 8 * h, d.rows - 1 - first_row);
    position[h] = keys.length - d.seqlen_q + query_of(row);
    if (d.alibi_slopes) slope[h] = d.alibi_slopes[batch * d.alibi_stride + head_of(row)] * kLog2e;
  }
  cp_async_wait<kRing - 1>();
  __syncthreads();
  RegisterRows<T, D> q;
  q.read(shared, 0);

  float out[1][D / 2] = {}, sum[2] = {}, top[2] = {-INFINITY, -INFINITY};
#pragma unroll 1
  for (int step = 0; step < steps; step += 2) {
    cp_async_wait<kRing - 2>();
    __syncwarp();  // the keys are there, and nobody reads the tile before any more
    start(step + kRing - 1);
    float p[1][N];
    multiply_transposed<T, D>(p, q, ring + step % kRing * (kKeys * D));
    const Place<false> at{0, keys.begin + (first_tile + step / 2 * kWarps) * kKeys + lane % 4 * 2};
#pragma unroll
    for (int i = 0; i < N; i++) {
      const int key = at.key_of(i), distance = key - position[i / 2 % 2];
      float& score = p[0][i];
      score = d.softcap > 0 ? tanh_exp2(score * d.scale * d.inverse_softcap) * d.softcap_log2 : score * d.scale_log2;
      score -= slope[i / 2 % 2] * float(distance < 0 ? -distance : distance);
      if (key >= keys.end || distance < d.first_distance || distance > d.last_distance) score = -INFINITY;
    }
    float factor[2], shift[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float most = top[h];
#pragma unroll
      for (int i = 2 * h; i < N; i += i % 2 ? 3 : 1) most = fmaxf(most, p[0][i]);
      most = max_of_quad(most);
      shift[h] = most == -INFINITY ? 0.f : most;
      factor[h] = exp2f(top[h] - shift[h]);
      top[h] = most;
      sum[h] *= factor[h];
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
      p[0][i] = exp2f(p[0][i] - shift[i / 2 % 2]);
      sum[i / 2 % 2] += p[0][i];
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) out[0][i] *= factor[i / 2 % 2];
    cp_async_wait<kRing - 2>();
    __syncwarp();  // the values are there, and nobody reads the keys any more
    start(step + kRing);
    multiply_add<T, D>(out, p, ring + (step + 1) % kRing * (kKeys * D));
  }
  cp_async_wait<0>();

  // The warps' results, (kWarps, kRows, kStride), in place of all tiles.
  missing = __any_sync(~0u, missing);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float total = sum_of_quad(sum[h]);
    if (lane % 4 == 0) {
      tops[warp][lane / 4 + 8 * h] = top[h];
      sums[warp][lane / 4 + 8 * h] = missing ? NAN : total;
    }
  }
  __syncthreads();
  float* results = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < D / 2; i += 2)
    *reinterpret_cast<float2*>(results + (warp * kRows + lane / 4 + i / 2 % 2 * 8) * Tiles::kStride + i / 4 * 8 +
                               lane % 4 * 2) = make_float2(out[0][i], out[0][i + 1]);
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * D; i += Tiles::kThreads) {
    const int row = i / D, col = i % D;
    if (first_row + row >= d.rows) break;
    if (col >= d.head_dim_v) continue;
    float most = -INFINITY, total = 0.f, value = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) most = fmaxf(most, tops[w][row]);
    const float shift = most == -INFINITY ? 0.f : most;
#pragma unroll
    for (int w = 0; w < kWarps; w++) {
      const float weight = exp2f(tops[w][row] - shift);
      total += weight * sums[w][row];
      value += weight * results[(w * kRows + row) * Tiles::kStride + col];
    }
    value = total == 0.f ? 0.f : value / total;  // NaN passes through
    const float lse = total == 0.f ? -INFINITY : shift + log2f(total);
    const int head = head_of(row), query = query_of(row);
    const int64_t result = (int64_t(batch) * d.num_heads + head) * d.seqlen_q + query;
    if (d.splits > 1) {
      if (total != 0.f) d.part[(split * d.all_rows + result) * d.head_dim_v + col] = value;
      if (col == 0) d.part_lse[split * d.all_rows + result] = lse;
    } else {
      static_cast<T*>(d.out)[batch * d.out_stride[0] + head * d.out_stride[1] + query * d.out_stride[2] + col] =
          from_float<T>(value);
      if (d.lse && col == 0) d.lse[result] = lse * kLn2;
    }
  }
}

// A warp per row: its parts, weighted by exp(lse of the part - lse). Parts without keys were not written.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) decode_attention_merge(const __grid_constant__ Decode d) {
  const int64_t row = int64_t(blockIdx.x) * (kMergeThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= d.all_rows) return;
  float weight[2], top = -INFINITY, total = 0.f;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int split = i * 32 + lane;
    weight[i] = split < d.splits ? d.part_lse[split * d.all_rows + row] : -INFINITY;
    top = fmaxf(top, weight[i]);
  }
#pragma unroll
  for (int other = 1; other < 32; other *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
  const float shift = top == -INFINITY ? 0.f : top;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    weight[i] = exp2f(weight[i] - shift);
    total += weight[i];
  }
#pragma unroll
  for (int other = 1; other < 32; other *= 2) total += __shfl_xor_sync(~0u, total, other);

  constexpr int kCols = 256 / 32;  // of a thread
  float value[kCols] = {};
#pragma unroll 2
  for (int split = 0; split < d.splits; split++) {
    const float mine = __shfl_sync(~0u, split < 32 ? weight[0] : weight[1], split % 32);
    if (mine == 0.f) continue;
    const float* part = d.part + (split * d.all_rows + row) * d.head_dim_v;
#pragma unroll
    for (int c = 0; c < kCols; c++)
      if (c * 32 + lane < d.head_dim_v) value[c] += mine * part[c * 32 + lane];
  }
  const int64_t head = row / d.seqlen_q;
  T* out = static_cast<T*>(d.out) + head / d.num_heads * d.out_stride[0] + head % d.num_heads * d.out_stride[1] +
           row % d.seqlen_q * d.out_stride[2];
#pragma unroll
  for (int c = 0; c < kCols; c++)
    if (c * 32 + lane < d.head_dim_v) out[c * 32 + lane] = from_float<T>(total == 0.f ? 0.f : value[c] / total);
  if (d.lse && lane == 0) d.lse[row] = total == 0.f ? -INFINITY : (shift + log2f(total)) * kLn2;
}

// ---- host -----------------------------------------------------------------------------------------------------------
int64_t row_blocks(const ff_decode_attention_args* a) {
  return (a->seqlen_q * (a->num_heads / a->num_kv_heads) + kRows - 1) / kRows;
}
// Two blocks for each multiprocessor, as far as there are keys for them.
int splits_of(const ff_decode_attention_args* a) {
  const int64_t blocks = std::max<int64_t>(a->batch * a->num_kv_heads * row_blocks(a), 1);
  const int64_t most = std::min<int64_t>(kMaxSplits, a->capacity / kKeysPerSplit);
  return int(std::max<int64_t>(std::min(2 * multiprocessors() / blocks, most), 1));
}
size_t workspace_bytes(const ff_decode_attention_args* a) {
  const int splits = splits_of(a);
  return splits > 1 ? size_t(splits) * a->batch * a->num_heads * a->seqlen_q * (a->head_dim_v + 1) * sizeof(float) : 0;
}

int check(const ff_decode_attention_args* a) {
  if (int status = check_decode_attention(a)) return status;
  if (!is_half_precision(a->dtype))
    return fail(FF_UNSUPPORTED, "dtype: %s has no CUDA kernel; accepted: bfloat16, float16", dtype_name(a->dtype));
  if (std::max({a->capacity, a->batch, a->num_heads * a->seqlen_q}) >= kMaxSeqlen)
    return fail(FF_UNSUPPORTED, "sizes: must be below %d", kMaxSeqlen);
  return FF_OK;
}

Decode make_decode(const ff_decode_attention_args* a) {
  Decode d{};
  d.q = a->q, d.k = a->k_cache, d.v = a->v_cache, d.out = a->out, d.lse = static_cast<float*>(a->lse);
  for (int i = 0; i < 3; i++) {
    d.q_stride[i] = a->q_stride[i], d.k_stride[i] = a->k_stride[i];
    d.v_stride[i] = a->v_stride[i], d.out_stride[i] = a->out_stride[i];
  }
  d.num_heads = int(a->num_heads), d.num_kv_heads = int(a->num_kv_heads);
  d.heads_per_kv = d.num_heads / d.num_kv_heads, d.seqlen_q = int(a->seqlen_q);
  d.head_dim = int(a->head_dim), d.head_dim_v = int(a->head_dim_v);
  d.rows = d.heads_per_kv * d.seqlen_q, d.row_blocks = int(row_blocks(a)), d.splits = splits_of(a);
  const auto whole = [&](const void* data, const int64_t(&stride)[3], int64_t dim) {
    return whole_vectors(a->dtype, {stride[0], stride[1], stride[2], dim}, {data});
  };
  d.q_whole = whole(a->q, a->q_stride, a->head_dim);
  d.k_whole = whole(a->k_cache, a->k_stride, a->head_dim), d.v_whole = whole(a->v_cache, a->v_stride, a->head_dim_v);
  d.cache_rows = a->cache_rows, d.all_rows = a->batch * a->num_heads * a->seqlen_q;
  d.capacity = int(a->capacity), d.page_size = int(a->page_size);
  const Range distances = seen_distances(a->causal, a->windowed, a->window_left, a->window_right);
  d.first_distance = distances.begin, d.last_distance = distances.end;
  d.scale = float(a->scale), d.scale_log2 = float(a->scale * 1.4426950408889634);
  d.softcap = float(a->softcap), d.softcap_log2 = float(a->softcap * 1.4426950408889634);
  d.inverse_softcap = a->softcap > 0 ? float(1 / a->softcap) : 0.f;
  d.cache_seqlens = a->cache_seqlens, d.cache_leftpad = a->cache_leftpad, d.cache_batch_idx = a->cache_batch_idx;
  d.page_table = a->page_table, d.page_table_stride = a->page_table_stride;
  d.alibi_slopes = a->alibi_slopes, d.alibi_stride = a->alibi_stride;
  d.part = static_cast<float*>(a->workspace);
  d.part_lse = d.part + d.splits * d.all_rows * d.head_dim_v;
  return d;
}

}  // namespace
}  // namespace ff

extern "C" size_t ff_cuda_decode_attention_workspace(const ff_decode_attention_args* a) {
  return ff::check(a) ? 0 : ff::workspace_bytes(a);
}

extern "C" int ff_cuda_decode_attention(const ff_decode_attention_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  if (a->batch * a->seqlen_q == 0) return FF_OK;
  if (int status = check_decode_attention_pointers(a)) return status;
  FF_REQUIRE(!workspace_bytes(a) || a->workspace, "workspace: must not be NULL");
  const Decode d = make_decode(a);
  const int64_t blocks = a->batch * d.num_kv_heads * d.splits * d.row_blocks;
  const int64_t merge_blocks = (d.all_rows + kMergeThreads / 32 - 1) / (kMergeThreads / 32);
  if (std::max(blocks, merge_blocks) > INT32_MAX)
    return fail(FF_UNSUPPORTED, "batch, num_heads, seqlen_q: too many queries");
  return for_tiles(a->dtype, std::max(a->head_dim, a->head_dim_v), [&](auto t, auto dim) {
    using T = decltype(t);
    using Tiles = DecodeTiles<dim.value>;
    const int status = launch("decode_attention", decode_attention<T, dim.value>, dim3(unsigned(blocks)),
                              dim3(Tiles::kThreads), Tiles::kShared, stream, d);
    if (status || d.splits == 1) return status;
    return launch("decode_attention_merge", decode_attention_merge<T>, dim3(unsigned(merge_blocks)),
                  dim3(kMergeThreads), 0, stream, d);
  });
}
