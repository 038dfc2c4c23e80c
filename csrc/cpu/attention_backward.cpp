// Attention backward on the CPU: the gradients of q, k, v and of what is added to the scores, from the saved log-sum-exp,
// recomputing the probabilities block by block.
//
//   P = exp(scale q k^T + bias - lse)    dP = keep (dO V^T)             dV += (keep P)^T dO
//   dZ = P (dP - delta)                  delta = sum(dO O) - dlse       dbias += dZ
//   dS = dZ (1 - tanh^2) with a softcap  dK += scale dS^T Q             dQ += scale dS K
// (Dao et al. 2022, appendix B.4.) Five tile products per pair of blocks, all operands packed once per head. A thread
// works on whole key/value heads; when there are too few of them, a head is cut into interleaved key blocks ("parts"),
// each with its own dQ, added up in part order afterwards: no atomics, so results repeat bit for bit. A bias that several
// heads or sequences share gets its gradient from one thread per key block, which adds them up in their order: the first of
// them writes, so that memory the size of the scores is not filled with zeros and read once more.
//
// With bfloat16 products (tile_bf16.h) keep P and dS are rounded to bfloat16, dS after dbias took its part of it, and both
// are transposed for dV and dK: those products have K, the queries, in pairs, and K lies along the rows of an operand.
#include <utility>

#include "attention.h"

FF_DECLARE_IMPL(attention_backward)
FF_DECLARE_IMPL(attention_backward_workspace)

namespace ff {
namespace FF_ISA {

constexpr int64_t kRows = FF_BF16_DOT ? 64 : 48;  // queries per block
constexpr int64_t kCols = 96;  // keys per block: whole tiles both as columns (kNR) and as rows of the products for dK, dV (kMR)

struct BackwardSplit {
  int threads, parts;
  bool by_part;  // thread t takes part t of every head, because the heads' gradients of the bias share memory
};
static BackwardSplit split(const ff_attention_args* a) {
  const int threads = num_threads(2 * work_of_scores(a));
  const int64_t heads = a->batch * a->num_kv_heads, blocks = (a->seqlen_k + kCols - 1) / kCols;
  const int parts = int(std::max<int64_t>(1, std::min<int64_t>(threads, blocks)));
  const bool shared_bias =
      a->dbias && ((a->batch > 1 && a->dbias_stride[0] == 0) || (a->num_heads > 1 && a->dbias_stride[1] == 0));
  if (shared_bias) return {parts, parts, true};
  if (heads >= 4 * threads || heads % threads == 0) return {threads, 1, false};
  return {threads, parts, false};
}

// Sizes in elements of one thread's buffers, in the order they lie in its share of the workspace.
template <class T> struct BackwardPlan {
  using A = acc_t<T>;
  using E = operand_t<T>;
  static constexpr bool kRounds = !std::is_same<E, A>::value;
  // Padded: depth_q, depth_v to whole steps of K, ldq, ldv to whole panels, rows and keys to whole tiles.
  int64_t D, Dv, depth_q, depth_v, ldq, ldv, rows, keys;
  int64_t k_t, v_t, k, dk, dv, q, q_panels, dout, dout_panels, dq, statistics, tiles, columns, line, padding, dline, keep,
      total;
  int64_t ddistance;              // one thread's, in double; after the threads' buffers
  int64_t all_rows;               // of dQ, of one head of all sequences, each rounded up to whole blocks
  int64_t shared_dq;              // all parts together, (parts, Hq, all_rows, ldq); after that
  BackwardPlan(const ff_attention_args* a, int parts) {
    constexpr int NR = tile_shape<E>::kNR, KR = tile_shape<E>::kKR, W = vec<A>::W;
    D = a->head_dim, Dv = a->head_dim_v;
    depth_q = round_up(D, KR), depth_v = round_up(Dv, KR);
    ldq = round_up(D, NR), ldv = round_up(Dv, NR);
    rows = round_up(a->seqlen_q, kRows), keys = round_up(a->seqlen_k, kCols);
    k_t = room<E, A>(keys * depth_q), v_t = room<E, A>(keys * depth_v), k = room<E, A>(keys * ldq);
    dk = keys * ldq, dv = keys * ldv;
    q = room<E, A>(rows * depth_q), q_panels = room<E, A>(rows * ldq);
    dout = room<E, A>(rows * depth_v), dout_panels = room<E, A>(rows * ldv);
    dq = parts == 1 ? rows * ldq : 0;
    statistics = 2 * rows;
    tiles = (2 + (a->softcap > 0) + (a->dropout_p > 0)) * kRows * kCols;
    columns = kRounds ? room<E, A>(kRows * kCols) : 0;
    line = Additions<T>::line_size(a), padding = Additions<T>::padding_size(a);
    dline = a->ddistance_bias ? a->seqlen_q + a->seqlen_k + 2 * W : 0;
    keep = a->dropout_p > 0 ? 128 : 0;
    total = 64;
    for (int64_t n : {k_t, v_t, k, dk, dv, q, q_panels, dout, dout_panels, dq, statistics, tiles, columns, columns, line,
                      padding, dline, keep})
      total += round_up(n, 64);
    ddistance = a->ddistance_bias ? a->num_heads * (2 * a->max_distance + 1) : 0;
    all_rows = a->cu_seqlens_q ? (a->total_q / kRows + a->batch + 1) * kRows : a->batch * rows;
    shared_dq = parts == 1 ? 0 : parts * a->num_heads * all_rows * ldq;
  }
  // Where a sequence's rows begin among all_rows.
  int64_t first_row(const ff_attention_args* a, const Sequence& s) const {
    return a->cu_seqlens_q ? (s.first_q / kRows + s.index) * kRows : s.index * rows;
  }
};

template <class T> struct Backward {
  using A = acc_t<T>;
  using E = operand_t<T>;
  static constexpr bool kRounds = BackwardPlan<T>::kRounds;
  static constexpr int MR = tile_shape<E>::kMR, NR = tile_shape<E>::kNR, W = vec<A>::W;
  static_assert(kRows % MR == 0 && kCols % MR == 0 && kCols % NR == 0 && kCols % 32 == 0, "whole tiles");
  static_assert(!kRounds || kRows % 32 == 0, "whole blocks of round_transposed");
  const ff_attention_args* a;
  BackwardPlan<T> plan;
  int parts;
  Additions<T> additions;
  E *k_t, *v_t, *k, *q, *q_panels, *dout, *dout_panels, *p_columns, *ds_columns;
  A *dk, *dv, *own_dq, *lse, *delta, *p, *ds, *tanh, *dropped, *dline;
  float* keep;
  double* ddistance;
  A dbias_of_block[kCols];

  Backward(const ff_attention_args* args, const BackwardSplit& how, int thread)
      : a(args), plan(args, how.parts), parts(how.parts), additions{args} {
    A* here = (A*)round_up(int64_t((A*)a->workspace + thread * plan.total), 64);
    auto take = [&](int64_t n) {
      A* taken = here;
      here += round_up(n, 64);
      return taken;
    };
    auto take_operand = [&](int64_t n) { return (E*)take(n); };
    k_t = take_operand(plan.k_t), v_t = take_operand(plan.v_t), k = take_operand(plan.k);
    dk = take(plan.dk), dv = take(plan.dv);
    q = take_operand(plan.q), q_panels = take_operand(plan.q_panels);
    dout = take_operand(plan.dout), dout_panels = take_operand(plan.dout_panels);
    own_dq = take(plan.dq), lse = take(plan.statistics), delta = lse + plan.rows;
    p = take(plan.tiles), ds = p + kRows * kCols;
    dropped = a->dropout_p > 0 ? ds + kRows * kCols : p;
    tanh = a->softcap > 0 ? ds + (1 + (a->dropout_p > 0)) * kRows * kCols : nullptr;
    p_columns = take_operand(plan.columns), ds_columns = take_operand(plan.columns);
    additions.line = take(plan.line), additions.padding = take(plan.padding);
    dline = take(plan.dline), keep = (float*)take(plan.keep);
    ddistance = distance_gradients(a, plan, how) + thread * plan.ddistance;
    std::fill(ddistance, ddistance + plan.ddistance, 0.0);
  }
  static double* distance_gradients(const ff_attention_args* a, const BackwardPlan<T>& plan, const BackwardSplit& how) {
    return (double*)round_up(int64_t((A*)a->workspace + how.threads * plan.total), 64);
  }
  static A* shared_dq(const ff_attention_args* a, const BackwardPlan<T>& plan, const BackwardSplit& how) {
    return (A*)round_up(int64_t(distance_gradients(a, plan, how) + how.threads * plan.ddistance), 64);
  }

  // One key/value head (one part of its key blocks), all query heads that read it. `shared`: dQ of all parts.
  void head(const Sequence& s, int64_t kv, int part, A* shared) {
    const int64_t Sk = s.seqlen_k, groups = a->num_heads / a->num_kv_heads;
    const T* kp = at<const T>(a, a->k, a->k_stride, s, kv, s.first_k);
    const T* vp = at<const T>(a, a->v, a->v_stride, s, kv, s.first_k);
    pack_transposed(kp, a->k_stride[2], Sk, plan.D, k_t);
    pack_transposed(vp, a->v_stride[2], Sk, plan.Dv, v_t);
    pack_panels(kp, a->k_stride[2], Sk, plan.D, k, plan.keys, A(1));
    std::fill(dk, dk + round_up(Sk, kCols) * plan.ldq, A(0));
    std::fill(dv, dv + round_up(Sk, kCols) * plan.ldv, A(0));
    for (int64_t h = kv * groups; h < (kv + 1) * groups; h++) {
      A* dq = own_dq;
      if (parts > 1) dq = shared + ((part * a->num_heads + h) * plan.all_rows + plan.first_row(a, s)) * plan.ldq;
      std::fill(dq, dq + round_up(s.seqlen_q, kRows) * plan.ldq, A(0));
      additions.start(s, h);
      if (a->ddistance_bias) std::fill(dline, dline + plan.dline, A(0));
      pack_queries(s, h);
      for (int64_t j = part * kCols; j < Sk; j += parts * kCols) key_block(s, h, j, dq);
      if (a->ddistance_bias) add_distances(s, h);
      if (parts == 1)
        write(dq, plan.ldq, s.seqlen_q, plan.D, at<T>(a, a->dq, a->dq_stride, s, h, s.first_q), a->dq_stride[2], A(a->scale));
    }
    const A size = A(Scale(a->scale).size);  // its sign is in the packed q
    for (int64_t j = part * kCols; j < Sk; j += parts * kCols) {
      const int64_t n = std::min(kCols, Sk - j);
      write(dk + j * plan.ldq, plan.ldq, n, plan.D, at<T>(a, a->dk, a->dk_stride, s, kv, s.first_k + j), a->dk_stride[2], size);
      write(dv + j * plan.ldv, plan.ldv, n, plan.Dv, at<T>(a, a->dv, a->dv_stride, s, kv, s.first_k + j), a->dv_stride[2], A(1));
    }
  }

  void pack_queries(const Sequence& s, int64_t h) {
    const int64_t Sq = s.seqlen_q, padded = round_up(Sq, kRows);
    const T* qp = at<const T>(a, a->q, a->q_stride, s, h, s.first_q);
    const T* dop = at<const T>(a, a->dout, a->dout_stride, s, h, s.first_q);
    const T* op = at<const T>(a, a->out, a->out_stride, s, h, s.first_q);
    const A sign = A(Scale(a->scale).sign);
    pack_rows(qp, a->q_stride[2], Sq, plan.D, q, plan.depth_q, sign);
    std::fill(q + Sq * plan.depth_q, q + padded * plan.depth_q, E{});
    pack_panels(qp, a->q_stride[2], Sq, plan.D, q_panels, plan.rows, sign);
    pack_rows(dop, a->dout_stride[2], Sq, plan.Dv, dout, plan.depth_v, A(1));
    std::fill(dout + Sq * plan.depth_v, dout + padded * plan.depth_v, E{});
    pack_panels(dop, a->dout_stride[2], Sq, plan.Dv, dout_panels, plan.rows, A(1));
    const int64_t row = s.row(a, h);
    for (int64_t i = 0; i < Sq; i++) {
      const A l = ((const A*)a->lse)[row + i];
      lse[i] = std::isinf(l) && l < 0 ? A(0) : l;  // a row without keys: every score is -inf anyway
      delta[i] = a->dlse ? -((const A*)a->dlse)[row + i] : A(0);
      if (s.seqlen_k <= kCols) continue;  // gradient_row has all it needs for the rest
      double sum = 0;
      const T* o = op + i * a->out_stride[2];
      const E* d = dout + i * plan.depth_v;
      vec_t<A> acc{};
      int64_t c = 0;
      for (; c + W <= plan.Dv; c += W) acc += load(o + c) * load(d + c);
      sum = double(hsum(acc));
      for (; c < plan.Dv; c++) sum += double(to_float(o[c])) * double(to_float(d[c]));
      delta[i] += A(sum);
    }
  }

  // Keys [j, j + kCols) and every block of queries that sees some of them.
  void key_block(const Sequence& s, int64_t h, int64_t j, A* dq) {
    const int64_t keys = std::min(kCols, s.seqlen_k - j);
    // The first query that sees this block under the causal rule, rounded down to a whole block.
    const int64_t begin = a->causal ? std::max<int64_t>(0, j - s.offset) / kRows * kRows : 0;
    const bool rowless = a->dbias && a->dbias_stride[2] == 0;  // one row for all queries: summed by block first
    const bool first = a->dbias && (s.index == 0 || a->dbias_stride[0]) && (h == 0 || a->dbias_stride[1]);
    auto no_gradient = [&](int64_t from, int64_t to) {
      for (int64_t i = from; first && i < to; i++) std::fill_n(dbias(s, h, i, j), keys, A(0));
    };
    no_gradient(0, rowless ? 1 : std::min(begin, s.seqlen_q));
    for (int64_t i = begin; i < s.seqlen_q; i += kRows) {
      const int64_t rows = std::min(kRows, s.seqlen_q - i), strips = round_up(rows, MR);
      Range seen[kRows];  // by each query, from 0
      int64_t last = 0;
      for (int64_t r = 0; r < rows; r++) {
        const Range all = s.visible(a, i + r);
        seen[r].begin = std::min(keys, std::max<int64_t>(0, all.begin - j));
        seen[r].end = std::max(seen[r].begin, std::min(keys, all.end - j));
        if (seen[r].end > seen[r].begin) last = std::max(last, seen[r].end);
      }
      if (last == 0) {
        const bool passed = s.visible(a, i).begin >= j + keys;  // by the window, which moves on
        if (!rowless) no_gradient(i, passed ? s.seqlen_q : i + rows);
        if (passed) break;
        continue;
      }
      // On the edges of what is visible about half of each product is known to vanish.
      Extent scores[kRows / MR], gradients[kRows / MR], of_keys[kCols / MR], to_q[kRows / MR];
      for (int64_t m = 0; m < strips; m += MR) {
        const int64_t n = std::min(last, seen[std::min(m + MR, rows) - 1].end);
        scores[m / MR] = {n, 0, plan.D}, gradients[m / MR] = {n, 0, plan.Dv}, to_q[m / MR] = {plan.ldq, seen[m].begin, n};
      }
      for (int64_t m = 0; m < last; m += MR) {
        int64_t first = 0, end = rows;
        while (first < rows && seen[first].end <= m) first++;
        while (end > first && seen[end - 1].begin >= m + MR) end--;
        of_keys[m / MR] = {std::max(plan.ldq, plan.ldv), first, end};
      }
      const int64_t padded = round_up(last, NR), wide = std::min<int64_t>(kCols, round_up(padded, MR));
      auto dot_rows = [&](const Extent* needs, const E* rows_of_q, const E* rows_of_k, int64_t depth, A* to) FF_LAMBDA {
        matmul<E, false>(strips, padded, needs, rows_of_q + i * depth, depth, rows_of_k + j * depth, NR * depth, to, kCols,
                         false);
      };
      dot_rows(scores, q, k_t, plan.depth_q, p);
      dot_rows(gradients, dout, v_t, plan.depth_v, ds);
      if (rowless) std::fill(dbias_of_block, dbias_of_block + kCols, A(0));
      if (additions.any(a) || a->dropout_p > 0)
        for (int64_t r = 0; r < rows; r++) gradient_row<false>(s, h, i, r, j, seen[r], wide, first && !rowless ? keys : 0);
      else
        for (int64_t r = 0; r < rows; r++) gradient_row<true>(s, h, i, r, j, seen[r], wide, 0);
      if (rowless) add_row(dbias_of_block, dbias(s, h, 0, j), {0, keys});
      for (int64_t r = rows; r < strips; r++) std::fill(ds + r * kCols, ds + r * kCols + wide, A(0));
      // The left operands of the last three: (keep P)^T and dS^T, dS.
      constexpr int64_t ld_columns = kRounds ? kRows : kCols, ld_rows = kCols * sizeof(A) / sizeof(E);
      if constexpr (kRounds) round_operands(rows, strips, wide);
      else p_columns = dropped, ds_columns = ds;
      const E* const ds_rows = (const E*)ds;
      matmul<E, !kRounds>(last, plan.ldv, of_keys, p_columns, ld_columns, dout_panels + i * NR, plan.rows * NR,
                          dv + j * plan.ldv, plan.ldv, true);
      matmul<E, !kRounds>(last, plan.ldq, of_keys, ds_columns, ld_columns, q_panels + i * NR, plan.rows * NR,
                          dk + j * plan.ldq, plan.ldq, true);
      matmul<E, false>(strips, plan.ldq, to_q, ds_rows, ld_rows, k + j * NR, plan.keys * NR, dq + i * plan.ldq, plan.ldq,
                       true);
    }
  }

  void round_operands(int64_t rows, int64_t strips, int64_t wide) {
    const int64_t padded = round_up(rows, 32);
    for (A* block : {dropped, ds})
      for (int64_t r = rows; r < padded; r++) std::fill(block + r * kCols, block + r * kCols + wide, A(0));
    round_transposed(dropped, kCols, padded, wide, p_columns, kRows);
    round_transposed(ds, kCols, padded, wide, ds_columns, kRows);
    for (int64_t r = 0; r < strips; r++) round_row(ds + r * kCols, 0, wide);
  }

  // In row r of the block: scores -> probabilities, dP -> dS, where the keys [seen.begin, seen.end) count; the other
  // elements up to `padded` become 0. Adds dZ to the gradients of what was added to the scores. Plain: nothing was, and
  // nothing dropped. `written`: elements of dbias that become dZ instead of growing by it.
  template <bool Plain>
  FF_INLINE void gradient_row(const Sequence& s, int64_t h, int64_t i, int64_t r, int64_t j, Range seen, int64_t padded,
                              int64_t written) {
    A *const pr = p + r * kCols, *const dr = ds + r * kCols, *const out = Plain ? pr : dropped + r * kCols;
    A* const t = Plain || !tanh ? nullptr : tanh + r * kCols;
    const int64_t begin = seen.begin / W * W, end = round_up(seen.end, W);
    const bool drops = !Plain && a->dropout_p > 0;
    const A* padding = a->key_padding_mask ? additions.padding + j : nullptr;
    A scale = A(Scale(a->scale).size);
    if (!Plain && additions.any(a)) {
      additions.add(pr + begin, scale, i + r, j + begin, seen.end - begin, t ? t + begin : nullptr);
      scale = 1, padding = nullptr;
    }
    if (drops && seen.begin < seen.end)
      dropout_scales(keep, seen.end, uint64_t(s.row(a, h) + i + r), a->seed, a->dropout_p, j);
    auto probability = [&](int64_t c) FF_LAMBDA {
      vec_t<A> z = load(pr + c);
      if (padding) z += load(padding + c);
      // lse stays in base e: turned to base 2 it would be rounded a second time, and that error is one of p.
      return vexp_below(z, scale, lse[i + r]);
    };
    // dP, from what dropout left of it.
    auto gradient = [&](int64_t c) FF_LAMBDA { return drops ? load(dr + c) * kept(c) : load(dr + c); };
    auto finish = [&](int64_t c, vec_t<A> of_p, A d) FF_LAMBDA {
      store(dr + c, of_p * (gradient(c) - d));
      store(out + c, drops ? of_p * kept(c) : of_p);
    };
    if (s.seqlen_k <= kCols) {
      // The whole row is here: its sum corrects the rounding of lse, and delta is exact, not a sum over the rounded output.
      for (auto [row, nothing] : {std::pair{pr, -std::numeric_limits<A>::infinity()}, std::pair{dr, A(0)}}) {
        std::fill(row + begin, row + seen.begin, nothing);
        std::fill(row + seen.end, row + end, nothing);
      }
      vec_t<A> total{}, weighted{};
      for (int64_t c = begin; c < end; c += W) {
        const vec_t<A> e = probability(c);
        store(pr + c, e);
        total += e, weighted += e * gradient(c);
      }
      const A sum = hsum(total), inverse = sum == 0 ? A(0) : 1 / sum, d = hsum(weighted) * inverse + delta[i + r];
      for (int64_t c = begin; c < end; c += W) finish(c, load(pr + c) * inverse, d);
    } else {
      const A d = delta[i + r];
      for (int64_t c = begin; c < end; c += W) finish(c, probability(c), d);
    }
    auto clear = [&](A* row) {
      std::fill(row, row + seen.begin, A(0));
      std::fill(row + seen.end, row + padded, A(0));
    };
    clear(out), clear(dr);
    if (Plain) return;
    if (written) {
      A* to = dbias(s, h, i + r, j);
      std::copy_n(dr, std::min(written, padded), to);
      if (padded < written) std::fill(to + padded, to + written, A(0));
    } else if (a->dbias) add_row(dr, a->dbias_stride[2] ? dbias(s, h, i + r, j) : dbias_of_block, seen);
    if (a->ddistance_bias) add_row(dr, dline + additions.zero() - (i + r + s.offset) + j, seen);
    if (t) {
      for (int64_t c = begin; c < seen.end; c += W) store(dr + c, load(dr + c) * (A(1) - load(t + c) * load(t + c)));
      clear(dr);  // where the keys are hidden, so is whatever the cap's tanh was
    }
  }

  // The dropout scales of W keys of the row at hand.
  FF_INLINE vec_t<A> kept(int64_t c) const {
    if constexpr (sizeof(A) == 4) return load(keep + c);
    vec_t<A> v;
    for (int x = 0; x < W; x++) v[x] = keep[c + x];
    return v;
  }

  FF_INLINE A* dbias(const Sequence& s, int64_t h, int64_t i, int64_t j) const {
    return (A*)a->dbias + s.index * a->dbias_stride[0] + h * a->dbias_stride[1] + i * a->dbias_stride[2] + j;
  }

  FF_INLINE static void add_row(const A* from, A* to, Range which) {
    int64_t c = which.begin;
    for (; c + W <= which.end; c += W) store(to + c, load(to + c) + load(from + c));
    for (; c < which.end; c++) to[c] += from[c];
  }

  // dline, a sum per distance, to the sums per clamped distance.
  void add_distances(const Sequence& s, int64_t h) {
    const int64_t M = a->max_distance, zero = additions.zero();
    double* to = ddistance + h * (2 * M + 1) + M;
    for (int64_t i = 0; i < s.seqlen_q + s.seqlen_k; i++) to[std::max(-M, std::min(i - zero, M))] += double(dline[i]);
  }

  static void write(const A* from, int64_t ld, int64_t rows, int64_t cols, T* to, int64_t stride, A scale) {
    for (int64_t r = 0; r < rows; r++) {
      int64_t c = 0;
      for (; c + W <= cols; c += W) store(to + r * stride + c, load(from + r * ld + c) * scale);
      if (c < cols) store_partial(to + r * stride + c, load(from + r * ld + c) * scale, int(cols - c));
    }
  }
};

template <class T> static void backward(const ff_attention_args* a) {
  using A = acc_t<T>;
  const BackwardSplit how = split(a);
  const BackwardPlan<T> plan(a, how.parts);
  A* shared = Backward<T>::shared_dq(a, plan, how);
  const Shares shares{a, kRows, a->num_kv_heads};
  const int64_t total = shares.total();
  int team = 1;
  auto run = [&](int thread, int count) {
    [[maybe_unused]] const typename Product<operand_t<T>>::Session session;
    Backward<T> worker(a, how, thread);
    if (thread == 0) team = count;
    const int64_t begin = how.by_part ? 0 : total * thread / count, end = how.by_part ? total : total * (thread + 1) / count;
    shares.heads_in(begin, end, [&](const Sequence& s, int64_t kv, int64_t start) {
      const int64_t weight = shares.head(s);
      for (int part = 0; part < how.parts; part++) {
        const int64_t at = start + weight * part / how.parts;
        if (how.by_part ? part % count == thread : at >= begin && at < end) worker.head(s, kv, part, shared);
      }
    });
  };
  if (how.threads == 1) run(0, 1);
  else {
#pragma omp parallel num_threads(how.threads)
    run(omp_get_thread_num(), omp_get_num_threads());
  }
  if (a->ddistance_bias) {
    const double* sums = Backward<T>::distance_gradients(a, plan, how);
    for (int64_t i = 0; i < plan.ddistance; i++) {
      double sum = 0;
      for (int t = 0; t < team; t++) sum += sums[t * plan.ddistance + i];
      ((A*)a->ddistance_bias)[i] = A(sum);
    }
  }
  if (how.parts == 1) return;
  for (int64_t b = 0; b < a->batch; b++) {
    const Sequence s(a, b);
    parallel_for(a->num_heads * s.seqlen_q, plan.D * how.parts, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; r++) {
        const int64_t h = r / s.seqlen_q, i = r % s.seqlen_q;
        A* row = shared + (h * plan.all_rows + plan.first_row(a, s) + i) * plan.ldq;
        for (int part = 1; part < how.parts; part++) {
          const A* other = row + part * a->num_heads * plan.all_rows * plan.ldq;
          for (int64_t c = 0; c < plan.D; c++) row[c] += other[c];
        }
        Backward<T>::write(row, plan.ldq, 1, plan.D, at<T>(a, a->dq, a->dq_stride, s, h, s.first_q + i), a->dq_stride[2],
                           A(a->scale));
      }
    });
  }
}

int attention_backward(const ff_attention_args* a, [[maybe_unused]] void* stream) {
  FF_LEAVE_OTHER_DTYPES(attention_backward(a, stream));
  return for_attention_dtype(a, [&](auto t) -> int {
    if (a->batch > 0) backward<decltype(t)>(a);
    return FF_OK;
  });
}

size_t attention_backward_workspace(const ff_attention_args* a) {
  FF_LEAVE_OTHER_DTYPES(attention_backward_workspace(a));
  const BackwardSplit how = split(a);
  size_t bytes = 0;
  for_attention_dtype(a, [&](auto t) -> int {
    const BackwardPlan<decltype(t)> plan(a, how.parts);
    bytes = size_t(how.threads * plan.total + plan.shared_dq + 64) * sizeof(acc_t<decltype(t)>) +
            size_t(how.threads * plan.ddistance) * sizeof(double) + 128;
    return FF_OK;
  });
  return bytes;
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
extern "C" int ff_cpu_attention_backward(const ff_attention_args* a, void* stream) {
  if (int status = ff::check_attention_backward(a)) return status;
  FF_REQUIRE(a->workspace, "workspace: must not be NULL");
  return FF_DISPATCH_BF16(attention_backward)(a, stream);
}

extern "C" size_t ff_cpu_attention_backward_workspace(const ff_attention_args* a) {
  return FF_DISPATCH_BF16(attention_backward_workspace)(a);
}
#endif
