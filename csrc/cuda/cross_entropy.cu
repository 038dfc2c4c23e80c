// Cross-entropy of class indices or class probabilities per row on a GPU, and its gradients; the formula is in
// fastformer.h.
//
// The loss needs one read of the logits: (max, sum) against each thread's own maximum, merged once (softmax.cuh), and
// for label smoothing or probabilities two more sums. Where the gradient is asked for at once, the row is still in
// registers (on Hopper, of a cluster of 2 to 16 blocks) and is written without a second read; elsewhere, and for still
// longer rows, the second read comes from L2. Backward on its own is element by element, from the saved log-sum-exp.
// Floor: one read of the logits, and one write of the gradient; backward on its own, one of each again.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
//     -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c cross_entropy.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c cross_entropy.cu
#include "softmax.cuh"

namespace ff {
namespace {

template <class T> struct CrossEntropy {
  int64_t rows, cols, logits_stride, probabilities_stride, dloss_stride;
  int64_t virtual_cols;    // softmax.cuh
  int64_t ignore_index;
  int slice;               // of the virtual columns, for each block of a cluster
  float smoothing, uniform, z_loss;  // uniform: smoothing / cols
  const T* logits;         // (rows, cols)
  const int64_t* target;   // (rows), or null with probabilities
  const T* probabilities;  // (rows, cols) or null
  const float* weight;     // (cols) or null
  float* loss;             // (rows) or null
  float* lse;              // (rows) or null
  const float* dloss;      // (rows), with dlogits
  T* dlogits;              // (rows, cols) or null; may be the logits
  T* dprobabilities;       // (rows, cols) or null, with dlogits
};

// loss = sum_j c_j (lse - z_j) + one_hot (lse - z_t) + z_loss lse^2, where c_j, the coefficients, come from smoothing
// and probabilities (SPREAD: not all 0) and one_hot from the target.
template <class T, int E>
FF_DEVICE void coefficients(float (&c)[E], const CrossEntropy<T>& a, int64_t row, int64_t col) {
#pragma unroll
  for (int e = 0; e < E; e++) c[e] = a.uniform;
  if (a.probabilities) {
    T q[E];
    load_any<T, E>(q, a.probabilities + row * a.probabilities_stride, 1, col, a.cols);
#pragma unroll
    for (int e = 0; e < E; e++) c[e] += (1.f - a.smoothing) * to_float(q[e]);
  }
  if (a.weight) {
    float w[E];
    load_any<float, E>(w, a.weight, 1, col, a.cols);
#pragma unroll
    for (int e = 0; e < E; e++) c[e] *= w[e];
  }
}

// What a thread knows of its row before it has read it.
template <class T> struct Target {
  int64_t index;    // -1 with probabilities, or where it is out of range
  bool counts, valid;
  float logit, one_hot;
  float origin;     // logits are compared with it, so that their sum keeps its digits when they share a large offset

  FF_DEVICE Target(const CrossEntropy<T>& a, int64_t row, bool live) {
    index = -1, counts = valid = live, logit = one_hot = origin = 0;
    if (!live) return;
    const T* logits = a.logits + row * a.logits_stride;
    if (a.target) {
      index = __ldg(a.target + row);
      counts = index != a.ignore_index;
      valid = index >= 0 && index < a.cols;
      if (!valid) index = -1;
      if (valid) logit = to_float(logits[index]), one_hot = (1.f - a.smoothing) * (a.weight ? a.weight[index] : 1.f);
    } else {
      logit = to_float(logits[0]);
    }
    origin = logit - logit == 0 ? logit : 0.f;  // infinite or NaN: 0
  }
};

// The sums of the coefficients and of coefficient times (logit - origin), of E columns.
template <class T, int E>
FF_DEVICE void add_spread(float (&sum)[2], const CrossEntropy<T>& a, const float (&z)[E], float origin, int64_t row,
                          int64_t col) {
  float c[E];
  coefficients<T, E>(c, a, row, col);
#pragma unroll
  for (int e = 0; e < E; e++) {
    if (uint64_t(col + e) >= uint64_t(a.cols)) continue;
    sum[0] += c[e];
    sum[1] += c[e] * (z[e] - origin);
  }
}

// What the whole row says: the loss, and what its gradient takes.
template <class T> struct Row {
  float shift, inverse;        // p = exp(z - shift) * inverse
  float lse, loss;
  float of_p, one_hot, scale;  // dz_j = scale * (of_p * p_j - c_j - [j == target] * one_hot)
  int64_t target;

  FF_DEVICE Row(const CrossEntropy<T>& a, const Target<T>& t, const MaxSum& total, const float (&spread)[2],
                int64_t row, bool live) {
    shift = shift_of(total.max), inverse = 1.f / total.sum;
    const float log_sum = total.sum == 0 ? kNegInf : log_of_sum(total.sum);
    lse = shift + log_sum;
    loss = t.one_hot * ((shift - t.logit) + log_sum) + (spread[0] * ((shift - t.origin) + log_sum) - spread[1]) +
           a.z_loss * lse * lse;
    loss = !t.counts ? 0.f : t.valid ? loss : NAN;
    of_p = t.one_hot + spread[0] + 2.f * a.z_loss * lse, one_hot = t.one_hot, target = t.index;
    scale = 0;
    if (live && a.dlogits) scale = t.counts ? t.valid ? a.dloss[row * a.dloss_stride] : NAN : 0.f;
    ignored = !t.counts;
  }
  // Makes the gradient of E logits.
  template <bool SPREAD, int E>
  FF_DEVICE void gradient(float (&d)[E], const CrossEntropy<T>& a, const float (&z)[E], int64_t row,
                          int64_t col) const {
    float c[E];
    if constexpr (SPREAD) coefficients<T, E>(c, a, row, col);
#pragma unroll
    for (int e = 0; e < E; e++) {
      d[e] = of_p * (__expf(z[e] - shift) * inverse) - (SPREAD ? c[e] : 0.f);
      if (col + e == target) d[e] -= one_hot;
      d[e] = ignored ? 0.f : d[e] * scale;
    }
  }
  bool ignored;
};

// The gradient of the probabilities: scale * (1 - smoothing) * w_j * (lse - z_j).
template <class T, int E>
FF_DEVICE void store_dprobabilities(const CrossEntropy<T>& a, const Row<T>& r, const float (&z)[E], int64_t row,
                                    int64_t col) {
  float d[E], w[E];
#pragma unroll
  for (int e = 0; e < E; e++) w[e] = 1;
  if (a.weight) load_any<float, E>(w, a.weight, 1, col, a.cols);
#pragma unroll
  for (int e = 0; e < E; e++) d[e] = r.scale * (1.f - a.smoothing) * w[e] * (r.lse - z[e]);
  store_any<T, E>(a.dprobabilities + row * a.cols, col, a.cols, d);
}

template <class T, int E> FF_DEVICE void to_floats(float (&z)[E], const Pack<T, E>& x, int64_t col, int64_t cols) {
#pragma unroll
  for (int e = 0; e < E; e++) z[e] = uint64_t(col + e) < uint64_t(cols) ? x[e] : kNegInf;
}

template <class T> FF_DEVICE void store_loss(const CrossEntropy<T>& a, const Row<T>& r, int64_t row) {
  if (a.loss) a.loss[row] = r.loss;
  if (a.lse) a.lse[row] = r.lse;
}

// The row in registers; plans and clusters as for softmax.
constexpr int kRowThreads = 512;
template <bool SPREAD, class T, int E, int V, bool CLUSTER>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_forward(const CrossEntropy<T> a) {
  FF_CLUSTERS_ONLY(CLUSTER);
  constexpr int kSums = SPREAD ? 4 : 2;
  FF_SHARED(float, partial, [2][32][2]);
  FF_SHARED(float, partial_spread, [2][32][2]);
  FF_SHARED(float, exchanged, [2][CLUSTER ? kMaxCluster : 1][kSums]);
  RowMaxSum row_max_sum(partial);
  RowSum<2> row_sum(partial_spread);
  ClusterExchange<CLUSTER, kSums> exchange(exchanged);
  const Slice<CLUSTER> slice(a.virtual_cols, a.slice);
  for (int64_t first = slice.first_row; first < a.rows; first += slice.row_step) {
    const int64_t row = first + threadIdx.y;
    const bool live = row < a.rows;
    const T* logits = a.logits + row * a.logits_stride;
    const int64_t begin = slice.begin - offset_of<T, E>(logits);
    // Where pack i begins; beyond the row for what is not this thread's.
    const auto col_of = [&](int i) {
      return live && slice.begin + column<E, V>(i) < slice.end ? begin + column<E, V>(i) : a.cols;
    };
    Pack<T, E> x[V];
#pragma unroll
    for (int i = 0; i < V; i++) x[i] = load_window<T, E>(logits, col_of(i), a.cols);
    const Target<T> target(a, row, live);

    MaxSum m;
    float spread[2] = {0, 0}, z[E];
#pragma unroll
    for (int i = 0; i < V; i++) {
      to_floats<T, E>(z, x[i], col_of(i), a.cols);
#pragma unroll
      for (int e = 0; e < E; e++) m.max = fmaxf(m.max, z[e]);
    }
    const float shift = shift_of(m.max);
#pragma unroll
    for (int i = 0; i < V; i++) {
      to_floats<T, E>(z, x[i], col_of(i), a.cols);
#pragma unroll
      for (int e = 0; e < E; e++) m.sum += __expf(z[e] - shift);
      if constexpr (SPREAD) add_spread<T, E>(spread, a, z, target.origin, row, col_of(i));
    }
    MaxSum total = row_max_sum(m);
    if constexpr (SPREAD) row_sum(spread);
    if constexpr (CLUSTER) {
      float mine[kSums] = {total.max, total.sum};
      if constexpr (SPREAD) mine[kSums - 2] = spread[0], mine[kSums - 1] = spread[1];
      const auto& all = exchange(mine);
      total = {all[0][0], all[0][1]};
      for (int r = 1; r < slice.blocks; r++) merge(total, {all[r][0], all[r][1]});
      if constexpr (SPREAD) {
        spread[0] = spread[1] = 0;
        for (int r = 0; r < slice.blocks; r++) spread[0] += all[r][kSums - 2], spread[1] += all[r][kSums - 1];
      }
    }
    const Row<T> r(a, target, total, spread, row, live);
    if (live && threadIdx.x == 0 && slice.rank == 0) store_loss(a, r, row);
    if (!a.dlogits) continue;
#pragma unroll
    for (int i = 0; i < V; i++) {
      const int64_t col = col_of(i);
      if (col >= a.cols) continue;
      float d[E];
      to_floats<T, E>(z, x[i], col, a.cols);
      r.template gradient<SPREAD, E>(d, a, z, row, col);
      store_window<T, E>(a.dlogits + row * a.cols, col, a.cols, d);
      if (SPREAD && a.dprobabilities) store_dprobabilities<T, E>(a, r, z, row, col);
    }
  }
}

// One block per row, any number of columns.
template <bool SPREAD, class T, int E>
__global__ void __launch_bounds__(kLongThreads) cross_entropy_forward_long(const CrossEntropy<T> a) {
  constexpr int kUnroll = SPREAD ? 1 : 4;  // coefficients take the registers
  FF_SHARED(float, partial, [2][32][2]);
  FF_SHARED(float, partial_spread, [2][32][2]);
  RowMaxSum row_max_sum(partial);
  RowSum<2> row_sum(partial_spread);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* logits = a.logits + row * a.logits_stride;
    const int64_t begin = int64_t(threadIdx.x) * E - offset_of<T, E>(logits), step = int64_t(blockDim.x) * E;
    const Target<T> target(a, row, true);
    MaxSum m;
    float spread[2] = {0, 0}, z[E];
#pragma unroll kUnroll
    for (int64_t col = begin; col < a.cols; col += step) {
      to_floats<T, E>(z, load_window<T, E>(logits, col, a.cols), col, a.cols);
      add_numbers<E>(m, z);
      if constexpr (SPREAD) add_spread<T, E>(spread, a, z, target.origin, row, col);
    }
    const MaxSum total = row_max_sum(m);
    if constexpr (SPREAD) row_sum(spread);
    const Row<T> r(a, target, total, spread, row, true);
    if (threadIdx.x == 0) store_loss(a, r, row);
    if (!a.dlogits) continue;
    for (int64_t col = begin; col < a.cols; col += step) {
      float d[E];
      to_floats<T, E>(z, load_window<T, E>(logits, col, a.cols), col, a.cols);
      r.template gradient<SPREAD, E>(d, a, z, row, col);
      store_window<T, E>(a.dlogits + row * a.cols, col, a.cols, d);
      if (SPREAD && a.dprobabilities) store_dprobabilities<T, E>(a, r, z, row, col);
    }
  }
}

// The gradient of class indices from the saved log-sum-exp: a block has blockDim.y rows and every gridDim.y-th group of
// their columns.
constexpr int kElementwiseThreads = 256, kElementwisePacks = 4;
template <class T, int E>
__global__ void __launch_bounds__(kElementwiseThreads) cross_entropy_backward(const CrossEntropy<T> a) {
  FF_SHARED(float, partial, [2][32][1]);
  RowSum<1> row_sum(partial);
  // sum_j c_j, the same for all rows.
  float spread[2] = {a.smoothing, 0};
  if (a.weight && a.smoothing > 0) {
    float sum[1] = {0};
    for (int64_t col = threadIdx.x; col < a.cols; col += blockDim.x) sum[0] += __ldg(a.weight + col);
    row_sum(sum);
    spread[0] = a.uniform * sum[0];
  }
  const int64_t step = int64_t(gridDim.y) * blockDim.x * E;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows;
       row += int64_t(gridDim.x) * blockDim.y) {
    const T* logits = a.logits + row * a.logits_stride;
    const Target<T> target(a, row, true);
    Row<T> r(a, target, MaxSum{0.f, 1.f}, spread, row, true);
    r.shift = r.lse = __ldg(a.lse + row);
    r.of_p = target.one_hot + spread[0] + 2.f * a.z_loss * r.lse;
    const int64_t begin = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * E - offset_of<T, E>(logits);
#pragma unroll kElementwisePacks
    for (int64_t col = begin; col < a.cols; col += step) {
      float z[E], d[E];
      to_floats<T, E>(z, load_window<T, E>(logits, col, a.cols), col, a.cols);
      if (a.smoothing > 0) r.template gradient<true, E>(d, a, z, row, col);
      else r.template gradient<false, E>(d, a, z, row, col);
      store_window<T, E>(a.dlogits + row * a.cols, col, a.cols, d);
    }
  }
}

// data *= *factor, `count` elements; nothing where the factor is 1.
template <class T>
__global__ void __launch_bounds__(kElementwiseThreads) scale_gradient(T* data, const T* factor, int64_t count) {
  const float scale = to_float(*factor);
  if (scale == 1.f) return;
  constexpr int E = kVector<T>;
  const int64_t step = int64_t(gridDim.x) * blockDim.x * E;
#pragma unroll kElementwisePacks
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * E - offset_of<T, E>(data); i < count; i += step) {
    const Pack<T, E> x = load_window<T, E>(data, i, count);
    float y[E];
#pragma unroll
    for (int e = 0; e < E; e++) y[e] = x[e] * scale;
    store_window<T, E>(data, i, count, y);
  }
}

// ---- arguments and launching ----------------------------------------------------------------------------------------
int check(const ff_cross_entropy_args* a) {
  FF_REQUIRE(a, "args: NULL");
  FF_REQUIRE(a->rows >= 0 && a->cols >= 1, "rows, cols: %lld x %lld", (long long)a->rows, (long long)a->cols);
  FF_REQUIRE(a->label_smoothing >= 0 && a->label_smoothing <= 1, "label_smoothing: %g is not in [0, 1]",
             a->label_smoothing);
  FF_REQUIRE(a->rows == 0 || a->logits, "logits: must not be NULL");
  FF_REQUIRE(a->rows == 0 || !a->target != !a->probabilities, "target, probabilities: exactly one must not be NULL");
  FF_REQUIRE(!a->dprobabilities || a->probabilities, "dprobabilities: there are no probabilities");
  return check_dtypes(a->dtype, a->dtype);
}

template <class T> CrossEntropy<T> make_arguments(const ff_cross_entropy_args* a) {
  CrossEntropy<T> k{};
  k.rows = a->rows, k.cols = a->cols, k.logits_stride = a->logits_stride;
  k.probabilities_stride = a->probabilities_stride, k.dloss_stride = a->dloss_stride;
  k.ignore_index = a->ignore_index, k.z_loss = float(a->z_loss);
  k.smoothing = float(a->label_smoothing), k.uniform = float(a->label_smoothing / double(a->cols));
  k.logits = static_cast<const T*>(a->logits), k.target = a->probabilities ? nullptr : a->target;
  k.probabilities = static_cast<const T*>(a->probabilities), k.weight = static_cast<const float*>(a->weight);
  k.loss = static_cast<float*>(a->loss), k.lse = static_cast<float*>(a->lse);
  k.dloss = static_cast<const float*>(a->dloss), k.dlogits = static_cast<T*>(a->dlogits);
  k.dprobabilities = static_cast<T*>(a->dprobabilities);
  return k;
}

template <bool SPREAD, class T, int E>
int launch_forward(const char* name, CrossEntropy<T> a, void* stream) {
  a.virtual_cols = virtual_columns(a.cols, a.logits_stride, a.logits, E, sizeof(T));
  const auto beyond = [&] {
    return launch(name, cross_entropy_forward_long<SPREAD, T, E>, grid_of(a.rows), kLongThreads, 0, stream, a);
  };
  if constexpr (E > 1) {
    // Without a gradient nothing is read twice, and a cluster would only synchronise.
    if (!a.dlogits && !forward_plan((a.virtual_cols + E - 1) / E, kRowThreads)) return beyond();
    const auto run = [&](auto packs, auto in_cluster, int cluster, dim3 grid, dim3 block) {
      return launch_clusters(name,
                             cross_entropy_forward<SPREAD, T, E, decltype(packs)::value, decltype(in_cluster)::value>,
                             cluster, grid, block, 0, stream, a);
    };
    return launch_rows<SPREAD ? 4 : kForwardClusterPacks, kRowThreads, E>(a, run, beyond);
  }
  return beyond();
}

int run_forward(const char* name, const ff_cross_entropy_args* a, void* stream) {
  const bool vector = !a->dlogits || same_offsets(a->dtype, {{a->logits, a->logits_stride}, {a->dlogits, a->cols}});
  const bool spread = a->label_smoothing > 0 || a->probabilities;
  return for_dtypes(a->dtype, a->dtype, [&](auto t, auto) {
    using T = decltype(t);
    const CrossEntropy<T> k = make_arguments<T>(a);
    constexpr int E = kVector<T>;
    const auto run = [&](auto with_spread) {
      constexpr bool SPREAD = decltype(with_spread)::value;
      return vector ? launch_forward<SPREAD, T, E>(name, k, stream) : launch_forward<SPREAD, T, 1>(name, k, stream);
    };
    return spread ? run(std::true_type{}) : run(std::false_type{});
  });
}

template <class T, int E> int launch_backward(const char* name, const CrossEntropy<T>& a, void* stream) {
  const int64_t packs = (virtual_columns(a.cols, a.logits_stride, a.logits, E, sizeof(T)) + E - 1) / E;
  int threads = 8;
  while (threads < packs && threads < kElementwiseThreads) threads *= 2;
  const dim3 block(unsigned(threads), unsigned(kElementwiseThreads / threads));
  dim3 grid = forward_grid(a.rows, block);
  const int64_t groups = (packs + threads * kElementwisePacks - 1) / (threads * kElementwisePacks);
  grid.y = unsigned(groups < 65535 ? groups : 65535);
  return launch(name, cross_entropy_backward<T, E>, grid, block, 0, stream, a);
}

}  // namespace
}  // namespace ff

extern "C" int ff_cuda_cross_entropy_forward(const ff_cross_entropy_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  if (a->rows == 0) return FF_OK;
  FF_REQUIRE(a->loss && a->lse, "loss, lse: must not be NULL");
  FF_REQUIRE(!a->dlogits || a->dloss, "dloss: must not be NULL beside dlogits");
  FF_REQUIRE(!a->dprobabilities || a->dlogits, "dprobabilities: needs dlogits");
  return run_forward("cross_entropy_forward", a, stream);
}

extern "C" int ff_cuda_cross_entropy_backward(const ff_cross_entropy_args* a, void* stream) {
  using namespace ff;
  const char* name = "cross_entropy_backward";
  if (int status = check(a)) return status;
  if (a->rows == 0) return FF_OK;
  FF_REQUIRE(a->dloss && a->dlogits, "dloss, dlogits: must not be NULL");
  if (a->probabilities) {  // they have to be summed again: the forward pass, with its gradient
    ff_cross_entropy_args again = *a;
    again.loss = again.lse = nullptr;
    return run_forward(name, &again, stream);
  }
  FF_REQUIRE(a->lse, "lse: must not be NULL");
  const bool vector = same_offsets(a->dtype, {{a->logits, a->logits_stride}, {a->dlogits, a->cols}});
  return for_dtypes(a->dtype, a->dtype, [&](auto t, auto) {
    using T = decltype(t);
    const CrossEntropy<T> k = make_arguments<T>(a);
    return vector ? launch_backward<T, kVector<T>>(name, k, stream) : launch_backward<T, 1>(name, k, stream);
  });
}

extern "C" int ff_cuda_cross_entropy_scale(const ff_cross_entropy_args* a, void* stream) {
  using namespace ff;
  FF_REQUIRE(a, "args: NULL");
  const int64_t count = a->rows * a->cols;
  if (count <= 0) return FF_OK;
  FF_REQUIRE(a->dloss && a->dlogits, "dloss, dlogits: must not be NULL");
  if (int status = check_dtypes(a->dtype, a->dtype)) return status;
  return for_dtypes(a->dtype, a->dtype, [&](auto t, auto) {
    using T = decltype(t);
    const int64_t each = kElementwiseThreads * kElementwisePacks * kVector<T>;
    return launch("cross_entropy_scale", scale_gradient<T>, grid_of((count + kVector<T> - 1 + each - 1) / each),
                  kElementwiseThreads, 0, stream, static_cast<T*>(a->dlogits), static_cast<const T*>(a->dloss), count);
  });
}
