// Attention of a few new queries against a key/value cache on the CPU: one step of generation.
//
//   s_j = cap(scale q . k_j) - slope |distance|,   out = sum_j softmax(s)_j v_j
//
// The work is reading the cache once, so keys and values are used as they lie: a copy into panels would read and write them
// once more. All query heads that share a key/value head, and all new positions, are rows of one small product, so a key
// that was read serves them together. Every kSplit keys are a task of their own, whose partial results (maximum, sum,
// weighted values) are merged in order; the cut depends on the keys' positions alone, so a sequence gives the same bits in
// any batch and at any number of threads. Floor: the bytes of K and V over the memory bandwidth.
//
// attention's forward of a few queries is the same with whatever else that adds to the scores: ignored keys at the ends of
// a block are not even read, those between two that count get -inf.
#include <vector>

#include "attention.h"
#include "softmax_row.h"

FF_DECLARE_IMPL(decode_attention)
FF_DECLARE_IMPL(decode_attention_workspace)

namespace ff {
namespace FF_ISA {

constexpr int64_t kSplit = 512;  // keys of a task
constexpr int64_t kKeys = 128;   // keys whose scores are held at once: with their values they fit L2
constexpr int64_t kRows = 64;    // query rows of a task; a longer prompt reads the cache once per 64

// What the kernel runs: decode_attention, or attention with what that adds to the scores, its caches keys and values that
// are full (cache_seqlens is NULL then).
struct Call : ff_decode_attention_args {
  const ff_attention_args* added = nullptr;
  const uint8_t* padding(int64_t b) const {
    return added && added->key_padding_mask ? added->key_padding_mask + b * added->key_padding_mask_stride : nullptr;
  }
  int64_t length(int64_t b) const { return cache_seqlens ? cache_seqlens[b] : capacity; }
};

// Keys of sequence b that some query sees: [begin, end).
struct Keys { int64_t begin, end; };
static Keys visible(const Call* a, int64_t b, int64_t position) {
  Keys keys{a->cache_leftpad ? a->cache_leftpad[b] : 0, a->length(b)};
  if (a->causal) keys.end = std::min(keys.end, position + 1);
  if (a->windowed && a->window_left >= 0) keys.begin = std::max(keys.begin, position - a->window_left);
  if (a->windowed && a->window_right >= 0) keys.end = std::min(keys.end, position + a->window_right + 1);
  return keys;
}
static Keys visible_to_any(const Call* a, int64_t b) {
  const int64_t last = a->length(b) - 1;
  return {visible(a, b, last - a->seqlen_q + 1).begin, visible(a, b, last).end};
}
static int64_t splits_of(Keys keys) {
  return keys.end > keys.begin ? (keys.end - 1) / kSplit - keys.begin / kSplit + 1 : 0;
}

// How the work is cut, and where its buffers lie in the workspace.
template <class T> struct Plan {
  using A = acc_t<T>;
  int64_t rows, blocks, ldo, ldq, splits = 0, keys = 0, threads, per_thread, partial = 0;
  explicit Plan(const Call* a) {
    constexpr int W = vec<A>::W;
    rows = a->seqlen_q * (a->num_heads / a->num_kv_heads);
    blocks = (rows + kRows - 1) / kRows;
    ldo = round_up(a->head_dim_v, W), ldq = round_up(a->head_dim, W);
    for (int64_t b = 0; b < a->batch; b++) {
      const Keys k = visible_to_any(a, b);
      splits = std::max(splits, splits_of(k)), keys += std::max<int64_t>(0, k.end - k.begin);
    }
    threads = num_threads(keys * a->num_kv_heads * (a->head_dim + a->head_dim_v) * std::max<int64_t>(1, rows / 4));
    per_thread = kRows * (ldq + kKeys + ldo) + (a->added ? 2 * kKeys : 0);
    if (splits > 1) partial = a->batch * a->num_kv_heads * rows * splits;
  }
  size_t bytes() const {
    return (size_t(threads * per_thread) + size_t(partial * ldo)) * sizeof(A) + size_t(partial) * sizeof(Row<A>) + 64;
  }
};

// The sum over lanes of four vectors at once.
FF_INLINE void hsum4(const f32v* v, float* to) {
  typedef float f32x4 __attribute__((vector_size(16)));
  f32x4 q[4];
  for (int i = 0; i < 4; i++) {
    f32x4 part[FF_VEC_BYTES / 16];
    memcpy(part, v + i, sizeof part);
    for (int n = FF_VEC_BYTES / 32; n; n /= 2)
      for (int j = 0; j < n; j++) part[j] += part[j + n];
    q[i] = part[0];
  }
  const f32x4 ab = __builtin_shuffle(q[0], q[1], i32x4{0, 4, 1, 5}) + __builtin_shuffle(q[0], q[1], i32x4{2, 6, 3, 7});
  const f32x4 cd = __builtin_shuffle(q[2], q[3], i32x4{0, 4, 1, 5}) + __builtin_shuffle(q[2], q[3], i32x4{2, 6, 3, 7});
  const f32x4 sums = __builtin_shuffle(ab, cd, i32x4{0, 1, 4, 5}) + __builtin_shuffle(ab, cd, i32x4{2, 3, 6, 7});
  memcpy(to, &sums, sizeof sums);
}
FF_INLINE void hsum4(const f64v* v, double* to) {
  for (int i = 0; i < 4; i++) to[i] = hsum(v[i]);
}

// s[r][j] = q_r . k_j for R rows and n keys. The tail of q is zero.
template <class T, int R>
FF_INLINE void dot_rows(const acc_t<T>* q, int64_t ldq, const T* k, int64_t stride, int64_t n, int64_t D, acc_t<T>* s) {
  using A = acc_t<T>;
  constexpr int W = vec<A>::W;
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) {
    vec_t<A> sum[R][4] = {};
    auto add = [&](int64_t c, auto read) FF_LAMBDA {
      vec_t<A> key[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) key[i] = read(k + (j + i) * stride + c);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const vec_t<A> x = load(q + r * ldq + c);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sum[r][i] += x * key[i];
      }
    };
    int64_t c = 0;
    for (; c + W <= D; c += W) add(c, [](const T* p) FF_LAMBDA { return load(p); });
    if (c < D) add(c, [&](const T* p) FF_LAMBDA { return load_partial(p, int(D - c)); });
    for (int r = 0; r < R; r++) hsum4(sum[r], s + r * kKeys + j);
  }
  for (; j < n; j++) {
    vec_t<A> sum[R] = {};
    int64_t c = 0;
    for (; c + W <= D; c += W)
      for (int r = 0; r < R; r++) sum[r] += load(q + r * ldq + c) * load(k + j * stride + c);
    if (c < D)
      for (int r = 0; r < R; r++) sum[r] += load(q + r * ldq + c) * load_partial(k + j * stride + c, int(D - c));
    for (int r = 0; r < R; r++) s[r * kKeys + j] = hsum(sum[r]);
  }
}

// o[r] += sum_j p[r][j] v_j for R rows and n keys, C vectors of columns at a time, which stay in registers.
template <class T, int R, int C>
FF_INLINE void add_columns(const acc_t<T>* p, const T* v, int64_t stride, int64_t n, int64_t Dv, int64_t c, acc_t<T>* o,
                           int64_t ldo) {
  using A = acc_t<T>;
  constexpr int W = vec<A>::W;
  vec_t<A> sum[R][C];
  const int tail = int(std::min<int64_t>(W, Dv - c - (C - 1) * W));
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < C; i++) sum[r][i] = load(o + r * ldo + c + i * W);
  auto add = [&](int64_t j, auto last) FF_LAMBDA {
    vec_t<A> x[C];
#pragma GCC unroll 8
    for (int i = 0; i + 1 < C; i++) x[i] = load(v + j * stride + c + i * W);
    x[C - 1] = last(v + j * stride + c + (C - 1) * W);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int i = 0; i < C; i++) sum[r][i] += p[r * kKeys + j] * x[i];
  };
  if (tail == W)
    for (int64_t j = 0; j < n; j++) add(j, [](const T* x) FF_LAMBDA { return load(x); });
  else
    for (int64_t j = 0; j < n; j++) add(j, [&](const T* x) FF_LAMBDA { return load_partial(x, tail); });
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int i = 0; i < C; i++) store(o + r * ldo + c + i * W, sum[r][i]);
}
template <class T, int R, int C = (FF_VEC_BYTES == 64 ? 16 : 8) / R>
FF_INLINE void add_rows(const acc_t<T>* p, const T* v, int64_t stride, int64_t n, int64_t Dv, acc_t<T>* o, int64_t ldo,
                        int64_t c = 0) {
  constexpr int W = vec<acc_t<T>>::W;
  for (; c + (C - 1) * W < Dv; c += C * W) add_columns<T, R, C>(p, v, stride, n, Dv, c, o, ldo);
  if constexpr (C > 1) add_rows<T, R, C / 2>(p, v, stride, n, Dv, o, ldo, c);
}

// One task: the rows [first, first + rows) of key/value head `head` of sequence b, over the keys [begin, end).
template <class T> struct Task {
  using A = acc_t<T>;
  static constexpr int W = vec<A>::W;
  static constexpr A kInf = std::numeric_limits<A>::infinity();
  const Call* a;
  const Plan<T>& plan;
  A *q, *s, *o, *padding, *line;  // the last two only beside what attention adds, for one block of keys
  int64_t b, head, first, rows;
  A scale;
  Row<A> state[kRows];

  Task(const Call* a, const Plan<T>& plan, A* memory)
      : a(a), plan(plan), q(memory), s(q + kRows * plan.ldq), o(s + kRows * kKeys), padding(o + kRows * plan.ldo),
        line(padding + kKeys) {}

  int64_t query_head(int64_t r) const { return head * (a->num_heads / a->num_kv_heads) + (first + r) / a->seqlen_q; }
  int64_t query(int64_t r) const { return (first + r) % a->seqlen_q; }
  int64_t position(int64_t r) const { return a->length(b) - a->seqlen_q + query(r); }

  void start() {
    // The sign goes into q, where it is exact; the size multiplies whole scores, so that it rounds once and the largest
    // score stays the largest.
    const A sign = a->scale < 0 ? A(-1) : a->scale == 0 ? A(0) : A(1);
    scale = A(a->scale == 0 ? 1 : std::abs(a->scale));
    for (int64_t r = 0; r < rows; r++) {
      const T* from = (const T*)a->q + b * a->q_stride[0] + query_head(r) * a->q_stride[1] + query(r) * a->q_stride[2];
      A* to = q + r * plan.ldq;
      int64_t c = 0;
      for (; c + W <= a->head_dim; c += W) store(to + c, load(from + c) * sign);
      if (c < a->head_dim) store(to + c, load_partial(from + c, int(a->head_dim - c)) * sign);
      state[r] = {};
    }
    std::fill(o, o + rows * plan.ldo, A(0));
  }

  // Calls f(offset of the first key from j, how many, k, v) for each stretch of keys that lie at one distance.
  template <class F> FF_INLINE void stretches(int64_t j, int64_t n, F f) const {
    const int64_t length = a->page_table ? a->page_size : a->capacity;
    for (int64_t i = 0; i < n;) {
      const int64_t within = (j + i) % length, count = std::min(n - i, length - within);
      const int64_t row = a->page_table        ? a->page_table[b * a->page_table_stride + (j + i) / length]
                          : a->cache_batch_idx ? a->cache_batch_idx[b]
                                               : b;
      f(i, count, (const T*)a->k_cache + row * a->k_stride[0] + head * a->k_stride[1] + within * a->k_stride[2],
        (const T*)a->v_cache + row * a->v_stride[0] + head * a->v_stride[1] + within * a->v_stride[2]);
      i += count;
    }
  }
  // Calls f(row, how many as a constant) over all rows: as many at a time as leave their sums in registers.
  template <class F> FF_INLINE void row_tiles(F f) const {
    int64_t r = 0;
    if constexpr (FF_VEC_BYTES == 64)
      for (; r + 4 <= rows; r += 4) f(r, std::integral_constant<int, 4>{});
    for (; r + 2 <= rows; r += 2) f(r, std::integral_constant<int, 2>{});
    if (r < rows) f(r, std::integral_constant<int, 1>{});
  }

  void run(int64_t begin, int64_t end) {
    start();
    for (int64_t block = begin; block < end; block += kKeys) {
      const Keys keys = unpadded({block, std::min(end, block + kKeys)});
      const int64_t j = keys.begin, n = keys.end - j;
      if (n == 0) continue;
      stretches(j, n, [&](int64_t i, int64_t count, const T* k, const T*) FF_LAMBDA {
        row_tiles([&](int64_t r, auto R) FF_LAMBDA {
          dot_rows<T, decltype(R)::value>(q + r * plan.ldq, plan.ldq, k, a->k_stride[2], count, a->head_dim,
                                          s + r * kKeys + i);
        });
      });
      for (int64_t r = 0; r < rows; r++) softmax_row(r, j, n);
      stretches(j, n, [&](int64_t i, int64_t count, const T*, const T* v) FF_LAMBDA {
        row_tiles([&](int64_t r, auto R) FF_LAMBDA {
          add_rows<T, decltype(R)::value>(s + r * kKeys + i, v, a->v_stride[2], count, a->head_dim_v, o + r * plan.ldo,
                                          plan.ldo);
        });
      });
    }
  }

  // The keys without those at both ends that are ignored; of the rest, `padding` is what is added to their scores.
  Keys unpadded(Keys keys) const {
    const uint8_t* ignored = a->padding(b);
    if (!ignored) return keys;
    while (keys.begin < keys.end && ignored[keys.begin]) keys.begin++;
    while (keys.end > keys.begin && ignored[keys.end - 1]) keys.end--;
    const int64_t n = keys.end - keys.begin;
    for (int64_t i = 0; i < n; i++) padding[i] = ignored[keys.begin + i] ? -kInf : A(0);
    std::fill(padding + n, padding + round_up(n, W), -kInf);
    return keys;
  }

  // Turns the n scores of row r and the keys from j on into exp(score - max), and updates the row's maximum, sum and o.
  FF_NOINLINE void softmax_row(int64_t r, int64_t j, int64_t n) {
    A* z = s + r * kKeys;
    const int64_t padded = round_up(n, W);
    std::fill(z + n, z + padded, -kInf);
    A factor_of_z = scale;
    const A* of_padding = a->padding(b) ? padding : nullptr;
    if (a->added && Additions<T>::any(a->added)) {
      const bool lined = has_line(a->added);
      if (lined) Additions<T>::of_distances(a->added, b, query_head(r), j - position(r), padded, line);
      Additions<T>::add_row(a->added, b, query_head(r), query(r), j, n, lined ? line : nullptr, of_padding, z, scale, nullptr);
      std::fill(z + n, z + padded, -kInf);
      factor_of_z = 1, of_padding = nullptr;
    } else if (a->softcap != 0 || a->alibi_slopes) {
      const A slope = a->alibi_slopes ? A(a->alibi_slopes[b * a->alibi_stride + query_head(r)]) : A(0);
      final_scores(z, padded, slope, A(j - position(r)));
      std::fill(z + n, z + padded, -kInf);
      factor_of_z = 1;
    }
    const Keys seen = visible(a, b, position(r));
    if (seen.begin > j) std::fill(z, z + std::min(n, seen.begin - j), -kInf);
    if (seen.end < j + n) std::fill(z + std::max<int64_t>(0, seen.end - j), z + n, -kInf);

    const A factor = state[r].add(z, factor_of_z, 0, padded, of_padding);
    if (factor != 1)
      for (int64_t c = 0; c < plan.ldo; c += W) store(o + r * plan.ldo + c, load(o + r * plan.ldo + c) * factor);
  }

  // z = cap(scale z) - slope |distance|; `distance` is the first key's.
  FF_INLINE void final_scores(A* z, int64_t n, A slope, A distance) const {
    vec_t<A> lane;
    for (int i = 0; i < W; i++) lane[i] = A(i);
    const A cap = A(a->softcap), inverse_cap = cap != 0 ? scale / cap : A(0);
    for (int64_t i = 0; i < n; i += W) {
      vec_t<A> x = load(z + i);
      x = cap != 0 ? vtanh(x * inverse_cap) * cap : x * scale;
      const vec_t<A> d = lane + (distance + A(i));
      store(z + i, x - slope * (d < 0 ? -d : d));
    }
  }
};

// Query head h's result at new position i of sequence b.
template <class T>
FF_INLINE void write_row(const Call* a, int64_t b, int64_t h, int64_t i, Row<acc_t<T>> row, const acc_t<T>* o) {
  T* to = (T*)a->out + b * a->out_stride[0] + h * a->out_stride[1] + i * a->out_stride[2];
  row.write(o, a->head_dim_v, to, a->lse ? (acc_t<T>*)a->lse + (b * a->num_heads + h) * a->seqlen_q + i : nullptr);
}

// The partial results of one row, n of them, added up in order; o has room for the sum.
template <class A> FF_INLINE Row<A> merge(const Row<A>* parts, const A* part_o, int64_t n, A* o, int64_t ldo) {
  constexpr int W = vec<A>::W;
  A top = parts[0].max;
  for (int64_t s = 1; s < n; s++) top = std::max(top, parts[s].max);
  const A shift = top == -std::numeric_limits<A>::infinity() ? A(0) : top;
  Row<A> row;
  row.max = top;
  std::fill(o, o + ldo, A(0));
  for (int64_t s = 0; s < n; s++) {
    const A factor = std::exp(parts[s].max - shift);
    row.sum += parts[s].sum * factor;
    for (int64_t c = 0; c < ldo; c += W) store(o + c, load(o + c) + load(part_o + s * ldo + c) * factor);
  }
  return row;
}

template <class T> static void decode(const Call* a) {
  using A = acc_t<T>;
  const Plan<T> plan(a);
  const int64_t heads = a->num_kv_heads, groups = a->num_heads / heads, splits = std::max<int64_t>(1, plan.splits);
  A* memory = (A*)round_up(int64_t(a->workspace), 64);
  A* partial_o = memory + plan.threads * plan.per_thread;
  Row<A>* partial = (Row<A>*)(partial_o + plan.partial * plan.ldo);
  const int64_t tasks = a->batch * heads * plan.blocks * splits;
  // A task that finds no keys, because its sequence is shorter, is over at once: hence handed out one by one.
#pragma omp parallel num_threads(int(plan.threads)) if (plan.threads > 1)
  {
    Task<T> task(a, plan, memory + omp_get_thread_num() * plan.per_thread);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < tasks; t++) {
      const int64_t split = t % splits, block = t / splits % plan.blocks, plane = t / splits / plan.blocks;
      task.b = plane / heads, task.head = plane % heads;
      task.first = block * kRows, task.rows = std::min(kRows, plan.rows - task.first);
      const Keys keys = visible_to_any(a, task.b);
      const int64_t own = splits_of(keys), from = (keys.begin / kSplit + split) * kSplit;
      if (split >= std::max<int64_t>(own, 1)) continue;
      task.run(std::max(keys.begin, from), std::min(keys.end, from + kSplit));
      for (int64_t r = 0; r < task.rows; r++) {
        const A* o = task.o + r * plan.ldo;
        if (own <= 1) {
          write_row<T>(a, task.b, task.query_head(r), task.query(r), task.state[r], o);
        } else {
          const int64_t to = (plane * plan.rows + task.first + r) * splits + split;
          partial[to] = task.state[r];
          std::copy(o, o + plan.ldo, partial_o + to * plan.ldo);
        }
      }
    }
    if (splits > 1) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < a->batch * heads * plan.rows; i++) {
        const int64_t row = i % plan.rows, plane = i / plan.rows, b = plane / heads;
        const int64_t own = splits_of(visible_to_any(a, b));
        if (own <= 1) continue;
        const Row<A> sum = merge(partial + i * splits, partial_o + i * splits * plan.ldo, own, task.o, plan.ldo);
        write_row<T>(a, b, plane % heads * groups + row / a->seqlen_q, row % a->seqlen_q, sum, task.o);
      }
    }
  }
}

static int run(const Call& call) {
  return for_dtype(call.dtype, [&](auto t) -> int {
    if (call.batch > 0 && call.seqlen_q > 0) decode<decltype(t)>(&call);
    return FF_OK;
  });
}

static size_t workspace(const Call& call) {
  size_t bytes = 0;
  for_dtype(call.dtype, [&](auto t) -> int {
    bytes = Plan<decltype(t)>(&call).bytes();
    return FF_OK;
  });
  return bytes;
}

int decode_attention(const ff_decode_attention_args* a, void*) { return run(Call{*a}); }

size_t decode_attention_workspace(const ff_decode_attention_args* a) { return workspace(Call{*a}); }

static Call of_attention(const ff_attention_args* a) {
  Call d{};
  d.added = a;
  d.dtype = a->dtype, d.batch = d.cache_rows = a->batch, d.num_heads = a->num_heads, d.num_kv_heads = a->num_kv_heads;
  d.seqlen_q = a->seqlen_q, d.head_dim = a->head_dim, d.head_dim_v = a->head_dim_v, d.capacity = a->seqlen_k;
  d.scale = a->scale, d.causal = a->causal;
  d.windowed = a->windowed, d.window_left = a->window_left, d.window_right = a->window_right;
  d.q = a->q, d.k_cache = a->k, d.v_cache = a->v, d.out = a->out, d.lse = a->lse, d.workspace = a->workspace;
  for (int i = 0; i < 3; i++) {
    d.q_stride[i] = a->q_stride[i], d.k_stride[i] = a->k_stride[i];
    d.v_stride[i] = a->v_stride[i], d.out_stride[i] = a->out_stride[i];
  }
  return d;
}

int attention_of_few_queries(const ff_attention_args* a, void*) { return run(of_attention(a)); }

size_t attention_of_few_queries_workspace(const ff_attention_args* a) { return workspace(of_attention(a)); }

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
static int check(const ff_decode_attention_args* a) {
  if (int status = ff::check_decode_attention(a)) return status;
  if (int status = ff::check_decode_attention_pointers(a)) return status;
  for (int64_t b = 0; b < a->batch; b++) {
    const int64_t length = a->cache_seqlens[b], begin = a->cache_leftpad ? a->cache_leftpad[b] : 0;
    FF_REQUIRE(length >= 0 && length <= a->capacity, "cache_seqlens: %lld of sequence %lld is not in [0, %lld]",
               (long long)length, (long long)b, (long long)a->capacity);
    FF_REQUIRE(begin >= 0 && begin <= length, "cache_leftpad: %lld of sequence %lld is not in [0, %lld]",
               (long long)begin, (long long)b, (long long)length);
    if (a->page_table) {
      for (int64_t i = begin / a->page_size; i * a->page_size < length; i++) {
        const int64_t page = a->page_table[b * a->page_table_stride + i];
        FF_REQUIRE(page >= 0 && page < a->cache_rows, "page_table: page %lld of sequence %lld is not in [0, %lld)",
                   (long long)page, (long long)b, (long long)a->cache_rows);
      }
    } else {
      const int64_t row = a->cache_batch_idx ? a->cache_batch_idx[b] : b;
      FF_REQUIRE(row >= 0 && row < a->cache_rows, "cache_batch_idx: row %lld of sequence %lld is not in [0, %lld)",
                 (long long)row, (long long)b, (long long)a->cache_rows);
    }
  }
  return FF_OK;
}

extern "C" int ff_cpu_decode_attention(const ff_decode_attention_args* a, void* stream) {
  if (int status = check(a)) return status;
  FF_REQUIRE(a->workspace, "workspace: must not be NULL");
  return FF_DISPATCH(decode_attention)(a, stream);
}

extern "C" size_t ff_cpu_decode_attention_workspace(const ff_decode_attention_args* a) {
  return check(a) ? 0 : FF_DISPATCH(decode_attention_workspace)(a);  // whose size depends on the lengths
}
#endif
