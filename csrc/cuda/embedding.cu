// Embedding on a GPU: the rows of up to three tables added up, normalised and dropped out in one pass; the formula:
// fastformer.h.
//
// Forward: a row of the output stays in registers from the tables to its place, so it reads the rows that are taken and
// writes as many: the floor. A row too long for one block's registers is summed first and then goes through
// layer_norm's own kernels, in place. Backward: the gradient goes back through dropout and the norm, whose input is
// gathered anew and which is layer_norm's kernel again; then each table's rows are summed by their owners
// (embedding_gradient.cuh).
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c embedding.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c embedding.cu
#include "embedding_gradient.cuh"
#include "layer_norm_forward.cuh"
#include "philox.cuh"
#include "sort.cuh"

namespace ff {
namespace {

template <class T> struct EmbeddingForward {
  int64_t rows, cols;
  int num_tables;
  struct Table {
    const T* weight;     // (rows, cols), rows `stride` apart
    int64_t rows, stride;
    const int64_t* ids;  // (period), or null: the i-th index is offset + i
    int64_t period, offset;
  } tables[3];
  float scale;           // of the first
  int normalize, float_parameters;
  float eps, inverse_cols;
  const void* weight;    // (cols) or null, float or T
  const void* bias;      // (cols) or null
  T* out;                // (rows, cols)
  float* mean;           // (rows), with normalize
  float* rstd;           // (rows), with normalize
  Dropout dropout;
};

// The row of a table that `row` of the output takes; null for an index out of range.
template <class Table> FF_DEVICE auto row_of(const Table& table, int64_t row) {
  const int64_t place = row < table.period ? row : uint32_t(row) % uint32_t(table.period);  // check(): they fit
  const int64_t index = table.ids ? __ldg(table.ids + place) : table.offset + place;
  return index >= 0 && index < table.rows ? table.weight + index * table.stride : nullptr;
}

// A block per rows, with V packs of E elements per thread (row.cuh). Without a norm, blocks may share a row: grid.y.
template <class T, int E, int V>
__global__ void __launch_bounds__(forward_max_threads<T, E>(), 1) embedding_forward(const EmbeddingForward<T> a) {
  FF_SHARED(float, partial, [2][32][1]);
  RowSum<1> row_sum(partial);
  const int64_t begin = int64_t(blockIdx.y) * blockDim.x * V * E;
  const auto col_of = [&](int i) { return begin + column<E, V>(i); };
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < a.rows; first += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.rows;
    const auto inside = [&](int i) { return live && col_of(i) < a.cols; };
    float sum[V][E] = {};
    for (int t = 0; t < a.num_tables; t++) {
      const T* from = live ? row_of(a.tables[t], row) : nullptr;
      const float scale = t == 0 ? a.scale : 1.f;
      Pack<T, E> taken[V];
#pragma unroll
      for (int i = 0; i < V; i++)
        taken[i] = from && inside(i) ? load<T, E>(from + col_of(i)) : zero_pack<T, E>();
#pragma unroll
      for (int i = 0; i < V; i++) {
#pragma unroll
        for (int e = 0; e < E; e++) sum[i][e] += from || !live ? taken[i][e] * scale : NAN;
      }
    }
    Pack<T, E> x[V];  // rounded: backward gathers this very sum
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = inside(i) ? make_pack<T, E>(sum[i]) : zero_pack<T, E>();
    float mean = 0, rstd = 1;
    if (a.normalize) {
      float squares;
      row_moments<false>(x, inside, a.inverse_cols, row_sum, mean, squares);
      rstd = rsqrtf(squares * a.inverse_cols + a.eps);
      if (live && threadIdx.x == 0) a.mean[row] = mean, a.rstd[row] = rstd;
    }
#pragma unroll
    for (int i = 0; i < V; i++) {
      float y[E];
#pragma unroll
      for (int e = 0; e < E; e++) y[e] = (x[i][e] - mean) * rstd;
      if (a.normalize && inside(i)) {
        if (a.float_parameters)
          apply_affine(y, static_cast<const float*>(a.weight), static_cast<const float*>(a.bias), col_of(i));
        else
          apply_affine(y, static_cast<const T*>(a.weight), static_cast<const T*>(a.bias), col_of(i));
      }
      if (a.dropout.on) {
        const uint32_t keep = keep_bits<E>(a.dropout, row, col_of(i));
#pragma unroll
        for (int e = 0; e < E; e++) y[e] *= a.dropout.factor(keep, e);
      }
      if (inside(i)) store_streaming(a.out + row * a.cols + col_of(i), make_pack<T, E>(y));
    }
  }
}

// ---- launching ------------------------------------------------------------------------------------------------------
template <class T> const RowPlan* plan_of(const EmbeddingForward<T>& k, bool vector) {
  constexpr int E = kVector<T>;
  return vector ? forward_plan(k.cols / E, forward_max_threads<T, E>()) : choose_plan(kForwardScalarPlans, k.cols);
}

template <class T> int launch_forward(const char* name, const EmbeddingForward<T>& k, bool vector, void* stream) {
  if (k.rows == 0) return FF_OK;
  constexpr RowPlan kShared{0, 128, 4}, kScalarShared{0, 128, 8};  // rows that blocks share
  const RowPlan* plan = plan_of(k, vector);
  if (!plan) plan = vector ? &kShared : &kScalarShared;
  const dim3 block = forward_block(*plan);
  dim3 grid = forward_grid(k.rows, block);
  const auto run = [&](auto pack, auto packs) {
    constexpr int E = decltype(pack)::value, V = decltype(packs)::value;
    const int64_t width = int64_t(block.x) * V * E;
    grid.y = unsigned((k.cols + width - 1) / width);
    return launch(name, embedding_forward<T, E, V>, grid, block, 0, stream, k);
  };
  if (!vector) return run(std::integral_constant<int, 1>{}, std::integral_constant<int, 8>{});
  constexpr std::integral_constant<int, kVector<T>> pack{};
  if (plan->per_thread == 1) return run(pack, std::integral_constant<int, 1>{});
  return run(pack, std::integral_constant<int, 4>{});
}

// The sum of the tables' rows, without norm and dropout, into `out`.
template <class T> EmbeddingForward<T> make_sum(const ff_embedding_args* a, void* out) {
  EmbeddingForward<T> k{};
  k.rows = a->rows, k.cols = a->cols, k.num_tables = a->num_tables, k.scale = float(a->scale);
  for (int t = 0; t < a->num_tables; t++) {
    const ff_embedding_table& from = a->tables[t];
    k.tables[t] = {static_cast<const T*>(from.weight), from.rows, from.stride, from.ids, from.period, from.offset};
  }
  k.out = static_cast<T*>(out);
  return k;
}
// `from` (rows, cols) with the mask of dropout: a table whose r-th row is taken by row r.
template <class T>
EmbeddingForward<T> make_dropped(const ff_embedding_args* a, const void* from, int64_t stride, void* out) {
  EmbeddingForward<T> k{};
  k.rows = a->rows, k.cols = a->cols, k.num_tables = 1, k.scale = 1;
  k.tables[0] = {static_cast<const T*>(from), a->rows, stride, nullptr, a->rows, 0};
  k.out = static_cast<T*>(out), k.dropout = make_dropout(a->dropout_p, a->seed);
  return k;
}

bool tables_in_packs(const ff_embedding_args* a) {
  for (int t = 0; t < a->num_tables; t++)
    if (!whole_vectors(a->dtype, {a->tables[t].stride}, {a->tables[t].weight})) return false;
  return whole_vectors(a->dtype, {a->cols}, {});
}

int check(const ff_embedding_args* a, bool gathers) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  if (a->rows >= INT32_MAX)
    return fail(FF_UNSUPPORTED, "rows: %lld; fewer than 2^31 have a CUDA kernel", (long long)a->rows);
  FF_REQUIRE(a->num_tables >= 1 && a->num_tables <= 3, "num_tables: %d is not in [1, 3]", a->num_tables);
  FF_REQUIRE(a->eps >= 0, "eps: %g is negative", a->eps);
  FF_REQUIRE(a->dropout_p >= 0 && a->dropout_p <= 1, "dropout_p: %g is not in [0, 1]", a->dropout_p);
  for (int t = 0; t < a->num_tables; t++) {
    const ff_embedding_table& table = a->tables[t];
    FF_REQUIRE(table.rows >= 0 && (table.weight || table.rows == 0 || !gathers), "tables[%d].weight: must not be NULL",
               t);
    FF_REQUIRE(table.period >= 1 ? a->rows % table.period == 0 : a->rows == 0,
               "tables[%d].period: %lld does not divide %lld rows", t, (long long)table.period, (long long)a->rows);
    if (table.rows >= INT32_MAX)
      return fail(FF_UNSUPPORTED, "tables[%d].rows: %lld; fewer than 2^31 have a CUDA kernel", t,
                  (long long)table.rows);
  }
  return check_dtypes(a->dtype, a->param_dtype);
}

ff_layer_norm_args norm_args(const ff_embedding_args* a, void* x) {
  ff_layer_norm_args n{};
  n.dtype = a->dtype, n.param_dtype = a->param_dtype, n.rows = a->rows, n.cols = a->cols, n.x_stride = a->cols;
  n.eps = a->eps, n.x = x, n.weight = a->weight, n.bias = a->bias, n.mean = a->mean, n.rstd = a->rstd;
  n.dweight = a->dweight, n.dbias = a->dbias;
  return n;
}

// Memory of backward: first for the norm, with the gradient behind its dropout, then for one table after another.
size_t dropped_bytes(const ff_embedding_args* a) {
  const bool both = a->normalize && a->dropout_p > 0;
  return both ? (size_t(a->rows) * size_t(a->cols) * dtype_bytes(a->dtype) + 15) / 16 * 16 : 0;
}
size_t table_bytes(const ff_embedding_args* a, const ff_embedding_table& table) {
  const size_t groups = size_t(group_count(a->rows)) * size_t(a->cols) * sizeof(float);
  return (groups + 15) / 16 * 16 + (table.ids ? sort_bytes(table.period, table.rows) : 0);
}

template <class T>
int table_gradient(const char* name, const ff_embedding_args* a, const ff_embedding_table& table, const void* dout,
                   int64_t dout_stride, double scale, void* stream) {
  if (table.rows == 0) return FF_OK;
  TableGradient<T> k{};
  k.dout = static_cast<const T*>(dout), k.dout_stride = dout_stride, k.cols = a->cols, k.rows = table.rows;
  k.period = a->rows ? table.period : 0, k.repeats = a->rows ? a->rows / table.period : 0;
  k.offset = table.offset, k.padding_idx = table.padding_idx;
  k.scale = float(scale), k.dweight = static_cast<T*>(table.dweight);
  char* at = static_cast<char*>(a->workspace);
  if (a->rows && table.ids) {
    SortBuffers buffers;
    int last = 0;
    at += sort_bytes(table.period, table.rows, at, &buffers);
    if (int status = sort_ids(name, table.ids, table.period, table.rows, buffers, last, stream)) return status;
    k.keys = buffers.keys[last], k.order = buffers.order[last], k.start = buffers.start;
  }
  if (group_count(a->rows) > 0) k.groups = reinterpret_cast<float*>(at);
  const bool vector = whole_vectors(a->dtype, {a->cols, dout_stride}, {dout, table.dweight});
  return vector ? launch_table_gradient<T, kVector<T>>(name, k, stream) : launch_table_gradient<T, 1>(name, k, stream);
}

}  // namespace
}  // namespace ff

extern "C" int ff_cuda_embedding_forward(const ff_embedding_args* a, void* stream) {
  using namespace ff;
  const char* name = "embedding_forward";
  if (int status = check(a, true)) return status;
  if (a->rows == 0) return FF_OK;
  FF_REQUIRE(a->out, "out: must not be NULL");
  FF_REQUIRE(!a->normalize || (a->mean && a->rstd), "mean, rstd: must not be NULL");
  return for_dtypes(a->dtype, a->dtype, [&](auto t, auto) {
    using T = decltype(t);
    EmbeddingForward<T> k = make_sum<T>(a, a->out);
    const bool vector = tables_in_packs(a) && whole_vectors(a->dtype, {}, {a->out, a->weight, a->bias});
    const bool in_registers = !a->normalize || plan_of(k, vector);
    if (in_registers) {
      k.normalize = a->normalize, k.float_parameters = a->param_dtype == FF_FLOAT32;
      k.eps = float(a->eps), k.inverse_cols = float(1.0 / double(a->cols));
      k.weight = a->weight, k.bias = a->bias;
      k.mean = static_cast<float*>(a->mean), k.rstd = static_cast<float*>(a->rstd);
      k.dropout = make_dropout(a->dropout_p, a->seed);
    }
    if (int status = launch_forward(name, k, vector, stream)) return status;
    if (in_registers) return int(FF_OK);
    ff_layer_norm_args norm = norm_args(a, a->out);  // a thread of it writes where it alone has read
    norm.out = a->out;
    if (int status = ff_cuda_layer_norm_forward(&norm, stream)) return status;
    if (a->dropout_p == 0) return int(FF_OK);
    return launch_forward(name, make_dropped<T>(a, a->out, a->cols, a->out), vector, stream);
  });
}

extern "C" size_t ff_cuda_embedding_backward_workspace(const ff_embedding_args* a) {
  using namespace ff;
  if (!a || a->rows <= 0 || a->cols <= 0) return 0;
  size_t bytes = dropped_bytes(a);
  if (a->normalize) {
    const ff_layer_norm_args norm = norm_args(a, nullptr);
    bytes += ff_cuda_layer_norm_backward_workspace(&norm);
  }
  for (int t = 0; t < a->num_tables; t++)
    if (a->tables[t].dweight && table_bytes(a, a->tables[t]) > bytes) bytes = table_bytes(a, a->tables[t]);
  return bytes;
}

extern "C" int ff_cuda_embedding_backward(const ff_embedding_args* a, void* stream) {
  using namespace ff;
  const char* name = "embedding_backward";
  if (int status = check(a, a && a->normalize)) return status;
  const bool copies = a->normalize || a->dropout_p > 0;
  FF_REQUIRE(a->rows == 0 || a->dout, "dout: must not be NULL");
  FF_REQUIRE(a->rows == 0 || !a->normalize || (a->mean && a->rstd), "mean, rstd: must not be NULL");
  FF_REQUIRE(a->rows == 0 || a->dsummed || !copies, "dsummed: must not be NULL");
  FF_REQUIRE(aligned16(a->workspace), "workspace: must be aligned to 16 bytes");
  FF_REQUIRE(a->workspace || !ff_cuda_embedding_backward_workspace(a), "workspace: must not be NULL");
  bool any = false;
  for (int t = 0; t < a->num_tables; t++) any |= a->tables[t].dweight != nullptr;
  return for_dtypes(a->dtype, a->dtype, [&](auto t, auto) {
    using T = decltype(t);
    const void* dout = a->dout;
    int64_t stride = a->dout_stride;
    char* const workspace = static_cast<char*>(a->workspace);
    if (a->dropout_p > 0) {
      void* dropped = a->normalize ? static_cast<void*>(workspace) : a->dsummed;
      const bool vector = whole_vectors(a->dtype, {a->cols, stride}, {dout, dropped});
      if (int status = launch_forward(name, make_dropped<T>(a, dout, stride, dropped), vector, stream)) return status;
      dout = dropped, stride = a->cols;
    }
    if (a->normalize) {
      const bool vector = tables_in_packs(a) && aligned16(a->dsummed);
      if (int status = launch_forward(name, make_sum<T>(a, a->dsummed), vector, stream)) return status;
      ff_layer_norm_args norm = norm_args(a, a->dsummed);
      norm.dout = dout, norm.dout_stride = stride, norm.dx = any ? a->dsummed : nullptr;  // in place, as in forward
      norm.workspace = workspace + dropped_bytes(a);
      if (int status = ff_cuda_layer_norm_backward(&norm, stream)) return status;
      dout = a->dsummed, stride = a->cols;
    }
    for (int i = 0; i < a->num_tables; i++) {
      if (!a->tables[i].dweight) continue;
      const double scale = i == 0 ? a->scale : 1.0;
      if (int status = table_gradient<T>(name, a, a->tables[i], dout, stride, scale, stream)) return status;
    }
    return int(FF_OK);
  });
}
