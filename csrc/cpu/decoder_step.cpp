// One token through a whole GPT-2 decoder with a key/value cache: what generation at small batch consists of.
//
// Floor: every weight read once, so bytes of the model over bandwidth. One parallel region spans the whole step; the
// phases of a layer (attention projection, attention, output projection, and the two of the feed-forward) are separated
// by barriers, and each thread owns a range of output columns. Norms are small enough to be repeated by every thread.
// The products are those of linear.h, in columns but for the logits.
#include <sched.h>

#include <atomic>
#include <cmath>

#include "activation.h"
#include "layer_norm.h"
#include "linear.h"

FF_DECLARE_IMPL(decoder_step)
FF_DECLARE_IMPL(decoder_step_workspace)

namespace ff {
namespace FF_ISA {

using Args = ff_decoder_step_args;

static int step_threads(const Args* a) {
  const int64_t E = a->hidden_size;
  const int64_t weights = a->num_layers * (4 * E * E + 2 * E * a->intermediate_size) + a->vocab_size * E;
  return num_threads(weights);
}

// y (batch, N) += x (batch, K) w (K, N), columns [begin, end).
static void project(int64_t batch, const float* x, const float* w, int64_t K, int64_t N, float* y, int64_t begin,
                    int64_t end) {
  add_columns(batch, K, x, K, w, N, y, N, begin, end);
}

static void norm(const Args* a, const float* x, const void* weight, const void* bias, float* out) {
  const int64_t E = a->hidden_size;
  for (int64_t b = 0; b < a->batch; b++) {
    const float mean = row_mean(x + b * E, E), rstd = row_rstd<true>(x + b * E, E, a->eps, mean, [](int64_t) {});
    const Affine<float, float> affine(weight, bias, E, nullptr);
    normalize_row<true>(x + b * E, affine, out + b * E, E, mean, rstd, [](int64_t) {});
  }
}

static void start_with(int64_t batch, int64_t N, const void* bias, float* y, int64_t begin, int64_t end, bool add) {
  for (int64_t b = 0; b < batch; b++)
    for (int64_t c = begin; c < end; c++) {
      const float v = bias ? ((const float*)bias)[c] : 0.f;
      y[b * N + c] = add ? y[b * N + c] + v : v;
    }
}

static void gelu_in_place(float* y, int64_t n, bool tanh) {
  for_activation(tanh ? FF_GELU_TANH : FF_GELU, [&](auto kind) {
    for_row<float>(n, [&](int64_t i, int k) { store_n(y + i, activate<decltype(kind)::value>(load_n(y + i, k)), k); });
    return FF_OK;
  });
}

static float dot(const float* x, const float* y, int64_t n) {
  float product;
  dot_tile<1, 1>(n, x, 0, y, 0, 0, [&](int, int, float sum) FF_LAMBDA { product = sum; });
  return product;
}

// One head of one sequence: append k and v to the cache, then attend from q over [start, length].
static void attend(const Args* a, const ff_decoder_layer& layer, float scale, int64_t b, int64_t h, const float* qkv,
                   float* out, float* scores) {
  const int64_t E = a->hidden_size, D = E / a->num_heads, row = (b * a->num_heads + h) * a->max_seqlen * D;
  float *k = (float*)layer.k_cache + row, *v = (float*)layer.v_cache + row;
  const float* q = qkv + b * 3 * E + h * D;
  memcpy(k + a->length * D, q + E, size_t(D) * sizeof(float));
  memcpy(v + a->length * D, q + 2 * E, size_t(D) * sizeof(float));
  const int64_t start = a->cache_start ? a->cache_start[b] : 0;
  float max = -INFINITY, sum = 0;
  for (int64_t j = start; j <= a->length; j++) max = std::max(max, scores[j] = dot(q, k + j * D, D) * scale);
  for (int64_t j = start; j <= a->length; j += kW) {
    const int n = int(std::min<int64_t>(kW, a->length + 1 - j));
    f32v p = vexp_nonpositive((n == kW ? load(scores + j) : load_partial(scores + j, n, max)) - max);
    for (int i = n; i < kW; i++) p[i] = 0;
    store_n(scores + j, p, n);
    sum += hsum(p);
  }
  float* o = out + b * E + h * D;
  std::fill(o, o + D, 0.f);
  add_columns(1, a->length + 1 - start, scores + start, 0, v + start * D, D, o, 0, 0, D);
  for (int64_t c = 0; c < D; c++) o[c] /= sum;
}

int decoder_step(const Args* a, void*) {
  const int64_t B = a->batch, E = a->hidden_size, F = a->intermediate_size, V = a->vocab_size, H = a->num_heads;
  const int threads = step_threads(a);
  float *x = (float*)a->workspace, *qkv = x + B * E, *attended = qkv + 3 * B * E, *hidden = attended + B * E;
  float* own = hidden + B * F;
  auto run = [&](int t, int count, auto barrier) {
    float* normed = own + t * (B * E + a->max_seqlen);
    float* scores = normed + B * E;
    // Column ranges are whole cache lines wherever possible, so threads do not share one.
    auto range = [&](int64_t n, int64_t& begin, int64_t& end) {
      const int64_t lines = (n + 15) / 16;
      begin = std::min(n, lines * t / count * 16), end = std::min(n, lines * (t + 1) / count * 16);
    };
    int64_t begin, end;
    range(E, begin, end);
    for (int64_t b = 0; b < B; b++)
      for (int64_t c = begin; c < end; c++)
        x[b * E + c] = ((const float*)a->wte)[a->tokens[b] * E + c] + ((const float*)a->wpe)[a->positions[b] * E + c];
    barrier();
    for (int64_t l = 0; l < a->num_layers; l++) {
      const ff_decoder_layer& layer = a->layers[l];
      norm(a, x, layer.ln1_weight, layer.ln1_bias, normed);
      range(3 * E, begin, end);
      start_with(B, 3 * E, layer.qkv_bias, qkv, begin, end, false);
      project(B, normed, (const float*)layer.qkv_weight, E, 3 * E, qkv, begin, end);
      barrier();
      for (int64_t i = B * H * t / count; i < B * H * (t + 1) / count; i++)
        attend(a, layer, float(a->attention_scale[l]), i / H, i % H, qkv, attended, scores);
      barrier();
      range(E, begin, end);
      start_with(B, E, layer.proj_bias, x, begin, end, true);
      project(B, attended, (const float*)layer.proj_weight, E, E, x, begin, end);
      barrier();
      norm(a, x, layer.ln2_weight, layer.ln2_bias, normed);
      range(F, begin, end);
      start_with(B, F, layer.fc1_bias, hidden, begin, end, false);
      project(B, normed, (const float*)layer.fc1_weight, E, F, hidden, begin, end);
      for (int64_t b = 0; b < B; b++) gelu_in_place(hidden + b * F + begin, end - begin, a->tanh);
      barrier();
      range(E, begin, end);
      start_with(B, E, layer.fc2_bias, x, begin, end, true);
      project(B, hidden, (const float*)layer.fc2_weight, F, E, x, begin, end);
      barrier();
    }
    norm(a, x, a->ln_f_weight, a->ln_f_bias, normed);
    range(V, begin, end);
    dot_rows(B, E, normed, E, (const float*)a->head_weight, E, begin, end,
             [&](int64_t b, int64_t v, float sum) FF_LAMBDA { ((float*)a->logits)[b * V + v] = sum; });
  };
  if (threads == 1) {
    run(0, 1, [] {});
    return FF_OK;
  }
  // A barrier of OpenMP's own costs several microseconds here; there are five per layer.
  std::atomic<int> arrived{0}, generation{0};
#pragma omp parallel num_threads(threads)
  {
    const int count = omp_get_num_threads();
    run(omp_get_thread_num(), count, [&] {
      const int g = generation.load(std::memory_order_relaxed);
      if (arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
        arrived.store(0, std::memory_order_relaxed);
        generation.store(g + 1, std::memory_order_release);
      } else {
        for (int spins = 0; generation.load(std::memory_order_acquire) == g; spins++)
          if (spins > 10000) sched_yield();  // the other thread may have lost its core
      }
    });
  }
  return FF_OK;
}

size_t decoder_step_workspace(const Args* a) {
  const int64_t B = a->batch, E = a->hidden_size;
  return size_t(5 * B * E + B * a->intermediate_size + step_threads(a) * (B * E + a->max_seqlen)) * sizeof(float);
}

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
extern "C" int ff_cpu_decoder_step(const ff_decoder_step_args* a, void* stream) {
  FF_REQUIRE(a, "args: NULL");
  if (a->dtype != FF_FLOAT32) return ff::fail(FF_UNSUPPORTED, "dtype: %s is not float32", ff::dtype_name(a->dtype));
  FF_REQUIRE(a->batch >= 1 && a->num_layers >= 0 && a->hidden_size >= 1 && a->intermediate_size >= 1 && a->vocab_size >= 1,
             "batch, num_layers, hidden_size, intermediate_size, vocab_size: must be positive");
  FF_REQUIRE(a->num_heads >= 1 && a->hidden_size % a->num_heads == 0, "num_heads: %lld does not divide hidden_size %lld",
             (long long)a->num_heads, (long long)a->hidden_size);
  FF_REQUIRE(a->length >= 0 && a->length < a->max_seqlen, "length: %lld is not in [0, max_seqlen %lld)",
             (long long)a->length, (long long)a->max_seqlen);
  FF_REQUIRE(a->tokens && a->positions && a->wte && a->wpe && a->layers && a->attention_scale && a->head_weight &&
                 a->logits && a->workspace,
             "tokens, positions, wte, wpe, layers, attention_scale, head_weight, logits, workspace: must not be NULL");
  for (int64_t b = 0; b < a->batch; b++) {
    FF_REQUIRE(a->tokens[b] >= 0 && a->tokens[b] < a->vocab_size, "tokens: %lld is not in [0, %lld)",
               (long long)a->tokens[b], (long long)a->vocab_size);
    FF_REQUIRE(a->positions[b] >= 0, "positions: %lld is negative", (long long)a->positions[b]);
    FF_REQUIRE(!a->cache_start || (a->cache_start[b] >= 0 && a->cache_start[b] <= a->length),
               "cache_start: %lld is not in [0, %lld]", (long long)a->cache_start[b], (long long)a->length);
  }
  return FF_DISPATCH(decoder_step)(a, stream);
}

extern "C" size_t ff_cpu_decoder_step_workspace(const ff_decoder_step_args* a) {
  return FF_DISPATCH(decoder_step_workspace)(a);
}
#endif
