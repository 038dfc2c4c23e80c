// Embedding on the CPU: the rows of up to three tables (tokens, positions, segments) added up, normalised and dropped out
// in one pass; the formula is in fastformer.h.
//
// Floor: forward, the rows that are taken, read, and as many written. Backward, dout read once per table and each table's
// gradient written once; with a norm or dropout the rows are gathered again (nothing but mean and rstd is kept), and the
// gradient of their sum is written and read in between.
//
// A table's gradient is computed by its rows' owners: a counting sort lists who took each row, every thread sums for its
// own rows and writes them, zeros included. No two threads write the same row, so the result depends on no order of theirs.
#include "dropout.h"
#include "layer_norm.h"

FF_DECLARE_IMPL(embedding_forward)
FF_DECLARE_IMPL(embedding_backward)

namespace ff {
namespace FF_ISA {

FF_INLINE int64_t index_of(const ff_embedding_table& table, int64_t i) {
  return table.ids ? table.ids[i] : table.offset + i;
}
template <class T> FF_INLINE const T* row_of(const ff_embedding_table& table, int64_t r) {
  return (const T*)table.weight + index_of(table, r % table.period) * table.stride;
}

// What a row of the output is the sum of.
template <class T> struct Summands {
  const T* from[3];
  FF_INLINE Summands(const ff_embedding_args* a, int64_t r) {
    for (int t = 0; t < 3; t++) from[t] = t < a->num_tables ? row_of<T>(a->tables[t], r) : nullptr;
  }
};

static bool is_copy(const ff_embedding_args* a) { return a->num_tables == 1 && a->scale == 1; }

// Asks for the beginning of a row that will be gathered next: nothing but the indices tells where it is. From there the
// hardware follows by itself; asking for all of it was slower.
template <class T> FF_INLINE void fetch_row(const T* row, int64_t n) {
  for (int64_t i = 0; i < std::min<int64_t>(n, 256 / sizeof(T)); i += 64 / sizeof(T)) fetch(row + i);
}

// out = the sum of N rows, rounded once.
template <int N, class T> FF_NOINLINE void sum_row(const Summands<T>& of, acc_t<T> scale, T* out, int64_t n) {
  using A = acc_t<T>;
  auto sum = [&](int64_t i, auto... k) FF_LAMBDA {
    auto v = load_n(of.from[0] + i, k...);
    if constexpr (sizeof...(k) == 0) v = v * scale;
    else v *= scale;
    if constexpr (N > 1) v += load_n(of.from[1] + i, k...);
    if constexpr (N > 2) v += load_n(of.from[2] + i, k...);
    store_n(out + i, v, k...);
  };
  for_row<A>(n, [&](int64_t i) FF_LAMBDA { sum(i); }, [&](int64_t i, int k) FF_LAMBDA { sum(i, k); });
}
template <class T> void sum_row(const ff_embedding_args* a, const Summands<T>& of, T* out) {
  const acc_t<T> scale = acc_t<T>(a->scale);
  if (a->num_tables == 1) sum_row<1>(of, scale, out, a->cols);
  else if (a->num_tables == 2) sum_row<2>(of, scale, out, a->cols);
  else sum_row<3>(of, scale, out, a->cols);
}

// to = from * keep; they may be the same row.
template <class T> static void drop_row(const ff_embedding_args* a, int64_t r, const T* from, T* to, float* keep) {
  dropout_scales(keep, a->cols, uint64_t(r), a->seed, a->dropout_p);
  auto drop = [&](int64_t i, auto... k) FF_LAMBDA {
    store_n(to + i, load_n(from + i, k...) * scales<T>(keep, i, k...), k...);
  };
  for_row<acc_t<T>>(a->cols, drop, drop);
}

template <class T, class P> static void forward_rows(const ff_embedding_args* a) {
  using A = acc_t<T>;
  const int64_t n = a->cols;
  const bool copy = is_copy(a);
  parallel_for(a->rows, n, [&](int64_t begin, int64_t end, int) {
    const Affine<T, P> affine(a->weight, a->bias, n, thread_buffer<A>(2 * n));
    float* keep = a->dropout_p > 0 ? keep_row(n) : nullptr;
    for (int64_t r = begin; r < end; r++) {
      const Summands<T> of(a, r);
      T* out = (T*)a->out + r * n;
      if (r + 1 < end) fetch_row(row_of<T>(a->tables[0], r + 1), n);
      if (copy) memcpy((void*)out, of.from[0], size_t(n) * sizeof(T));
      else sum_row(a, of, out);
      if (a->normalize) {  // in place, in L1
        const A mean = row_mean(out, n), rstd = row_rstd<true>(out, n, a->eps, mean, [](int64_t) {});
        normalize_row<true>(out, affine, out, n, mean, rstd, [](int64_t) {});
        if (a->mean) ((A*)a->mean)[r] = mean, ((A*)a->rstd)[r] = rstd;
      }
      if (keep) drop_row(a, r, out, out, keep);
    }
  });
}

int embedding_forward(const ff_embedding_args* a, void*) {
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    forward_rows<decltype(t), decltype(p)>(a);
    return FF_OK;
  });
}

// dsummed = the gradient of the sum, back through dropout and the norm, whose input is gathered anew.
template <class T, class P> static void through_norm(const ff_embedding_args* a) {
  using A = acc_t<T>;
  const int64_t n = a->cols;
  const int threads = num_threads(a->rows * n);
  const bool copy = is_copy(a);
  A* partial = (a->dweight || a->dbias) ? (A*)a->workspace : nullptr;
  if (partial) std::fill(partial, partial + int64_t(threads) * 2 * n, A(0));
  parallel_for(a->rows, n, [&](int64_t begin, int64_t end, int thread) {
    A* dw = a->dweight ? partial + int64_t(2 * thread) * n : nullptr;
    A* db = a->dbias ? partial + int64_t(2 * thread + 1) * n : nullptr;
    float* keep = a->dropout_p > 0 ? keep_row(n) : nullptr;
    A* buffer = thread_buffer<A>((2 + 2 * kRows) * n);
    const Affine<T, P> affine(a->weight, nullptr, n, buffer);
    T *sums = (T*)(buffer + 2 * n), *dropped = sums + kRows * n;
    auto block = [&](int64_t r, auto count) {
      constexpr int R = decltype(count)::value;
      const T *dout[R], *x[R];
      for (int j = 0; j < R; j++) {
        dout[j] = (const T*)a->dout + (r + j) * a->dout_stride;
        if (keep) drop_row(a, r + j, dout[j], dropped + j * n, keep), dout[j] = dropped + j * n;
        const Summands<T> of(a, r + j);
        x[j] = of.from[0];
        if (!copy) sum_row(a, of, sums + j * n), x[j] = sums + j * n;
      }
      auto finish = [&](int j, int64_t i, auto v, auto... k) FF_LAMBDA {
        store_n((T*)a->dsummed + (r + j) * n + i, v, k...);
      };
      backward_rows<true, false, R>(dout, x, affine, (const A*)a->mean + r, (const A*)a->rstd + r, dw, db, n, true,
                                    [](int, int64_t) {}, finish);
    };
    int64_t r = begin;
    for (; r + kRows <= end; r += kRows) block(r, std::integral_constant<int, kRows>{});
    for (; r < end; r++) block(r, std::integral_constant<int, 1>{});
  });
  if (partial) reduce_partials<T>(partial, threads, n, (P*)a->dweight, (P*)a->dbias);
}

template <class T> static void through_dropout(const ff_embedding_args* a) {
  parallel_for(a->rows, a->cols, [&](int64_t begin, int64_t end, int) {
    float* keep = keep_row(a->cols);
    for (int64_t r = begin; r < end; r++)
      drop_row(a, r, (const T*)a->dout + r * a->dout_stride, (T*)a->dsummed + r * a->cols, keep);
  });
}

// Who took each row of a table, in order: row v was taken by the indices order[start[v]] .. order[start[v + 1] - 1], and
// index i by the output's rows i, i + period, ...
struct Takers {
  int64_t *start, *order;
  Takers(const ff_embedding_table& table, int64_t indices, int64_t* room) : start(room), order(room + table.rows + 2) {
    std::fill(start, start + table.rows + 2, int64_t(0));
    auto each = [&](auto f) {
      for (int64_t i = 0; i < indices; i++) {
        const int64_t v = index_of(table, i);
        if (v != table.padding_idx) f(i, v);
      }
    };
    // Shifted by two, so that placing the indices leaves each row's start where it belongs.
    each([&](int64_t, int64_t v) { start[v + 2]++; });
    for (int64_t v = 2; v < table.rows + 2; v++) start[v] += start[v - 1];
    each([&](int64_t i, int64_t v) { order[start[v + 1]++] = i; });
  }
};
static size_t takers_bytes(const ff_embedding_table& table) { return size_t(table.rows + 2 + table.period) * 8; }

constexpr int64_t kTerms = 128;  // added up before they join the total, so that a row taken often keeps its digits

template <int K, class A> struct Block {
  Pair<A> pairs[K] = {};
  FF_INLINE void operator+=(const Block& other) {
    for (int j = 0; j < K; j++) pairs[j] += other.pairs[j];
  }
};

template <class V, class Each, class Load> FF_INLINE V sum_terms(Each each, Load load) {
  V total{}, part{};
  int64_t terms = 0;
  each([&](int64_t r) FF_LAMBDA {
    part += load(r);
    if (++terms == kTerms) total += part, part = V{}, terms = 0;
  });
  total += part;
  return total;
}

// out = scale * the sum of dout's rows that took row v, columns [begin, end).
template <class T>
static void sum_takers(const Takers& takers, int64_t v, int64_t period, int64_t repeats, const T* dout, int64_t stride,
                       acc_t<T> scale, T* out, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int W = vec<A>::W, K = 2;
  const int64_t *first = takers.order + takers.start[v], *last = takers.order + takers.start[v + 1];
  const int64_t terms = (last - first) * repeats;
  if (terms == 0) return (void)memset((void*)(out + begin), 0, size_t(end - begin) * sizeof(T));
  if (terms == 1 && scale == 1)
    return (void)memcpy((void*)(out + begin), dout + *first * stride + begin, size_t(end - begin) * sizeof(T));
  auto each = [&](auto f) FF_LAMBDA {
    for (const int64_t* i = first; i < last; i++)
      for (int64_t m = 0; m < repeats; m++) f(*i + m * period);
  };
  int64_t c = begin;
  for (; c + 2 * K * W <= end; c += 2 * K * W) {
    const auto sum = sum_terms<Block<K, A>>(each, [&](int64_t r) FF_LAMBDA {
      Block<K, A> b;
      for (int j = 0; j < K; j++) b.pairs[j] = load_pair(dout + r * stride + c + 2 * j * W);
      return b;
    });
    for (int j = 0; j < K; j++) store_pair(out + c + 2 * j * W, sum.pairs[j] * scale);
  }
  for (; c < end; c += W) {
    const int k = int(std::min<int64_t>(W, end - c));
    const auto load_row = [&](int64_t r) FF_LAMBDA { return load_n(dout + r * stride + c, k); };
    store_n(out + c, sum_terms<vec_t<A>>(each, load_row) * scale, k);
  }
}

template <class T>
static void table_gradient(const ff_embedding_args* a, const ff_embedding_table& table, const T* dout, int64_t stride,
                           double scale) {
  const int64_t n = a->cols, repeats = a->rows ? a->rows / table.period : 0;
  const Takers takers(table, repeats ? table.period : 0, (int64_t*)a->workspace);
  // Work, in rows read or written, up to row v: threads get equal parts of it.
  auto before = [&](int64_t v) { return takers.start[v] * repeats + v; };
  const int64_t work = before(table.rows);
  auto rows = [&](int64_t from, int64_t to, int64_t begin, int64_t end) {
    for (int64_t v = from; v < to; v++)
      sum_takers(takers, v, table.period, repeats, dout, stride, acc_t<T>(scale), (T*)table.dweight + v * n, begin, end);
  };
  auto row_at = [&](int64_t done) {  // the first row before which as much is done
    int64_t low = 0, high = table.rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (before(middle) < done) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  if (table.rows >= 8 * num_threads(work * n))
    return parallel_for(work, n, [&](int64_t b, int64_t e, int) { rows(row_at(b), row_at(e), 0, n); });
  // Few rows, such as two segments: each thread sums all of them, in columns of its own.
  const int64_t group = 64, groups = (n + group - 1) / group;
  parallel_for(groups, work * group,
               [&](int64_t b, int64_t e, int) { rows(0, table.rows, b * group, std::min(e * group, n)); });
}

int embedding_backward(const ff_embedding_args* a, void*) {
  return for_dtypes(a->dtype, a->param_dtype, [&](auto t, auto p) {
    using T = decltype(t);
    const T* dout = (const T*)a->dout;
    int64_t stride = a->dout_stride;
    if (a->normalize) through_norm<T, decltype(p)>(a);
    else if (a->dropout_p > 0) through_dropout<T>(a);
    if (a->normalize || a->dropout_p > 0) dout = (const T*)a->dsummed, stride = a->cols;
    for (int i = 0; i < a->num_tables; i++)
      if (a->tables[i].dweight) table_gradient(a, a->tables[i], dout, stride, i == 0 ? a->scale : 1.0);
    return FF_OK;
  });
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
static int check(const ff_embedding_args* a, bool gathers) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->num_tables >= 1 && a->num_tables <= 3, "num_tables: %d is not in [1, 3]", a->num_tables);
  FF_REQUIRE(a->eps >= 0, "eps: %g is negative", a->eps);
  FF_REQUIRE(a->dropout_p >= 0 && a->dropout_p <= 1, "dropout_p: %g is not in [0, 1]", a->dropout_p);
  for (int t = 0; t < a->num_tables; t++) {
    const ff_embedding_table& table = a->tables[t];
    FF_REQUIRE(table.rows >= 0 && (table.weight || table.rows == 0 || !gathers), "tables[%d].weight: must not be NULL", t);
    FF_REQUIRE(table.period >= 1 ? a->rows % table.period == 0 : a->rows == 0,
               "tables[%d].period: %lld does not divide %lld rows", t, (long long)table.period, (long long)a->rows);
    if (a->rows == 0) continue;
    for (int64_t i = 0; i < table.period; i++) {
      const int64_t index = ff::FF_ISA::index_of(table, i);
      FF_REQUIRE(index >= 0 && index < table.rows, "tables[%d].ids: entry %lld is %lld, not in [0, %lld)", t, (long long)i,
                 (long long)index, (long long)table.rows);
    }
  }
  return FF_OK;
}

extern "C" int ff_cpu_embedding_forward(const ff_embedding_args* a, void* stream) {
  if (int status = check(a, true)) return status;
  FF_REQUIRE(a->out || a->rows == 0, "out: must not be NULL");
  FF_REQUIRE(!a->mean == !a->rstd, "mean, rstd: both or neither");
  return FF_DISPATCH(embedding_forward)(a, stream);
}

extern "C" int ff_cpu_embedding_backward(const ff_embedding_args* a, void* stream) {
  if (int status = check(a, a && a->normalize)) return status;
  FF_REQUIRE(a->rows == 0 || a->dout, "dout: must not be NULL");
  FF_REQUIRE(a->rows == 0 || !a->normalize || (a->mean && a->rstd), "mean, rstd: must not be NULL");
  FF_REQUIRE(a->rows == 0 || a->dsummed || !(a->normalize || a->dropout_p > 0), "dsummed: must not be NULL");
  FF_REQUIRE(a->workspace, "workspace: must not be NULL");
  return FF_DISPATCH(embedding_backward)(a, stream);
}

extern "C" size_t ff_cpu_embedding_backward_workspace(const ff_embedding_args* a) {
  size_t bytes = 8;
  for (int t = 0; t < a->num_tables; t++)
    if (a->tables[t].dweight) bytes = std::max(bytes, ff::FF_ISA::takers_bytes(a->tables[t]));
  if (a->dweight || a->dbias)
    bytes = std::max(bytes, ff::FF_ISA::backward_workspace(a->rows, a->cols, a->dtype == FF_FLOAT64 ? 8 : 4));
  return bytes;
}
#endif
