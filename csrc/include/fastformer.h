/* fastformer: the public C interface of every kernel.
 *
 * One struct of arguments and one function per kernel and device; nothing here needs torch or Python.
 *
 *     ff_cpu_layer_norm_forward(&args, NULL)          host memory
 *     ff_cuda_layer_norm_forward(&args, stream)       device memory; enqueued on the cudaStream_t, never synchronised
 *
 * Rules that hold for all of them
 *   - Zero-initialise the struct, then set the fields the operation uses (C: `ff_layer_norm_args a = {.x = x, ...};`).
 *     Fields are only ever appended, so code written against an older header keeps working after a rebuild.
 *   - Returns an ff_status. Arguments are checked before anything is written; ff_last_error() has the message (per thread).
 *   - A kernel allocates nothing. Where `workspace` is listed, ff_<device>_<op>_workspace(&args) gives its size in bytes.
 *   - Strides and sizes count elements, not bytes. The last dimension is always contiguous.
 *   - "acc" is float for FF_FLOAT32, FF_BFLOAT16 and FF_FLOAT16 data, double for FF_FLOAT64 (CPU only).
 *   - A pointer marked "or NULL" switches its feature off.
 */
#ifndef FASTFORMER_H
#define FASTFORMER_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FF_API __declspec(dllexport)
#else
#define FF_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ff_status {
  FF_OK = 0,
  FF_INVALID_ARGUMENT = 1, /* a field is missing, out of range or inconsistent */
  FF_UNSUPPORTED = 2,      /* valid, but this kernel does not cover it (dtype, head_dim, ...) */
  FF_DEVICE_ERROR = 3      /* the CUDA runtime reported an error */
} ff_status;

typedef enum ff_dtype { FF_FLOAT32 = 0, FF_BFLOAT16 = 1, FF_FLOAT16 = 2, FF_FLOAT64 = 3 } ff_dtype;

/* Message of the last call on this thread that did not return FF_OK. Valid until the next call on this thread. */
FF_API const char* ff_last_error(void);
/* The instruction set the CPU kernels use: "generic", "avx2", "avx512", or "avx512_bf16" or "amx", whose bfloat16 products
 * attention has. FASTFORMER_CPU_ISA overrides the detection. */
FF_API const char* ff_cpu_isa(void);
/* Selects an instruction set by name; FF_UNSUPPORTED where this machine cannot run it. Not thread-safe. */
FF_API int ff_cpu_set_isa(const char* name);

/* Declare the function of one kernel on one device ("cpu" ignores the stream), and the size of its workspace. */
#define FF_KERNEL(device, name, args_type) FF_API int ff_##device##_##name(const args_type* a, void* stream)
#define FF_WORKSPACE(device, name, args_type) FF_API size_t ff_##device##_##name##_workspace(const args_type* a)

/* Dropout everywhere: element (row, col) is kept iff philox4x32_10(key = seed, counter = (c, row_lo, row_hi, 0))[w] >=
 * dropout_p * 2^32, with c = (col / 32) * 8 + col % 8 and w = (col / 8) % 4: eight counters give 32 neighbouring columns,
 * so a vector unit needs no shuffle. Kept values are scaled by 1 / (1 - dropout_p). The mask is a function of
 * (seed, row, col) alone: the same in forward and backward, on every device, for every tiling. */

/* ---- layer_norm ------------------------------------------------------------------------------------------------------
 * out = (x - mean) * rstd * weight + bias over rows of `cols` elements, rstd = 1 / sqrt(var + eps), biased variance. */
typedef struct ff_layer_norm_args {
  ff_dtype dtype;          /* of x, out, dout, dx */
  ff_dtype param_dtype;    /* of weight, bias, dweight, dbias: dtype, or FF_FLOAT32 beside half-precision data */
  int64_t rows, cols;
  int64_t x_stride;        /* between rows of x (out and dx are contiguous) */
  int64_t dout_stride;     /* between rows of dout */
  double eps;
  const void* x;           /* (rows, cols) */
  const void* weight;      /* (cols) or NULL = 1 */
  const void* bias;        /* (cols) or NULL = 0 */
  void* out;               /* forward: (rows, cols) */
  void* mean;              /* (rows) acc, written by forward (on the CPU NULL = not wanted), read by backward */
  void* rstd;              /* (rows) acc, likewise */
  const void* dout;        /* backward: (rows, cols) */
  void* dx;                /* backward: (rows, cols) or NULL */
  void* dweight;           /* backward: (cols) or NULL */
  void* dbias;             /* backward: (cols) or NULL */
  void* workspace;         /* backward */
} ff_layer_norm_args;
FF_KERNEL(cpu, layer_norm_forward, ff_layer_norm_args);
FF_KERNEL(cuda, layer_norm_forward, ff_layer_norm_args);
FF_KERNEL(cpu, layer_norm_backward, ff_layer_norm_args);
FF_KERNEL(cuda, layer_norm_backward, ff_layer_norm_args);
FF_WORKSPACE(cpu, layer_norm_backward, ff_layer_norm_args);
FF_WORKSPACE(cuda, layer_norm_backward, ff_layer_norm_args);

/* ---- add_layer_norm --------------------------------------------------------------------------------------------------
 * summed = residual + dropout(x);  out = layer_norm(summed). Backward takes the gradients of both outputs. */
typedef struct ff_add_layer_norm_args {
  ff_dtype dtype, param_dtype;
  int64_t rows, cols;
  int64_t x_stride, residual_stride;
  int64_t dout_stride, dsummed_stride;
  double eps;
  double dropout_p;        /* 0 = no dropout */
  uint64_t seed;
  const void* x;           /* forward: (rows, cols) */
  const void* residual;    /* forward: (rows, cols) */
  const void* weight;      /* (cols) or NULL */
  const void* bias;        /* (cols) or NULL */
  void* out;               /* forward: (rows, cols) */
  void* summed;            /* (rows, cols), written by forward, read by backward */
  void* mean;              /* (rows) acc, as in layer_norm */
  void* rstd;              /* (rows) acc */
  const void* dout;        /* backward: (rows, cols) */
  const void* dsummed;     /* backward: (rows, cols) or NULL = 0 */
  void* dx;                /* backward: (rows, cols), or NULL (without dropout it equals dresidual) */
  void* dresidual;         /* backward: (rows, cols) */
  void* dweight;           /* backward: (cols) or NULL */
  void* dbias;             /* backward: (cols) or NULL */
  void* workspace;         /* backward */
} ff_add_layer_norm_args;
FF_KERNEL(cpu, add_layer_norm_forward, ff_add_layer_norm_args);
FF_KERNEL(cuda, add_layer_norm_forward, ff_add_layer_norm_args);
FF_KERNEL(cpu, add_layer_norm_backward, ff_add_layer_norm_args);
FF_KERNEL(cuda, add_layer_norm_backward, ff_add_layer_norm_args);
FF_WORKSPACE(cpu, add_layer_norm_backward, ff_add_layer_norm_args);
FF_WORKSPACE(cuda, add_layer_norm_backward, ff_add_layer_norm_args);

/* ---- rms_norm, add_rms_norm ------------------------------------------------------------------------------------------
 * out = x * rstd * weight + bias, rstd = 1 / sqrt(mean(x^2) + eps), and the same of summed = residual + dropout(x). The
 * arguments are those of layer_norm and add_layer_norm; `mean` is neither written nor read. */
typedef ff_layer_norm_args ff_rms_norm_args;
FF_KERNEL(cpu, rms_norm_forward, ff_rms_norm_args);
FF_KERNEL(cuda, rms_norm_forward, ff_rms_norm_args);
FF_KERNEL(cpu, rms_norm_backward, ff_rms_norm_args);
FF_KERNEL(cuda, rms_norm_backward, ff_rms_norm_args);
FF_WORKSPACE(cpu, rms_norm_backward, ff_rms_norm_args);
FF_WORKSPACE(cuda, rms_norm_backward, ff_rms_norm_args);
typedef ff_add_layer_norm_args ff_add_rms_norm_args;
FF_KERNEL(cpu, add_rms_norm_forward, ff_add_rms_norm_args);
FF_KERNEL(cuda, add_rms_norm_forward, ff_add_rms_norm_args);
FF_KERNEL(cpu, add_rms_norm_backward, ff_add_rms_norm_args);
FF_KERNEL(cuda, add_rms_norm_backward, ff_add_rms_norm_args);
FF_WORKSPACE(cpu, add_rms_norm_backward, ff_add_rms_norm_args);
FF_WORKSPACE(cuda, add_rms_norm_backward, ff_add_rms_norm_args);

/* ---- softmax ---------------------------------------------------------------------------------------------------------
 * out = softmax(scale * x + bias + mask) over rows, or its logarithm. A row without any element gives zeros (-inf for the
 * logarithm) and no gradient.
 *
 * Row r is row (i, j, k) of a tensor whose leading dimensions are row_shape, r = (i * row_shape[1] + j) * row_shape[2] + k.
 * Column c takes part if mask[i, j, k, c] != 0 and, under causal, c <= k + cols - row_shape[2]. */
typedef struct ff_softmax_args {
  ff_dtype dtype;
  int64_t rows, cols;
  int64_t x_stride, dout_stride;
  double scale;
  int log;                 /* 1: log_softmax */
  const void* x;           /* forward: (rows, cols) */
  void* out;               /* (rows, cols), written by forward, read by backward */
  const void* dout;        /* backward: (rows, cols) */
  void* dx;                /* backward: (rows, cols) */
  /* All that follows may be zero; row_shape is read where causal, mask or bias is set. */
  int64_t row_shape[3];    /* their product is rows */
  int causal;
  const uint8_t* mask;     /* row_shape x (cols), nonzero = takes part, or NULL; stride 0 broadcasts */
  int64_t mask_stride[4];  /* the last is 1, or 0 to broadcast */
  const void* bias;        /* row_shape x (cols) in bias_dtype, the data's or acc, or NULL: added. dbias = dx / scale, summed */
  ff_dtype bias_dtype;
  int64_t bias_stride[4];
} ff_softmax_args;
FF_KERNEL(cpu, softmax_forward, ff_softmax_args);
FF_KERNEL(cuda, softmax_forward, ff_softmax_args);
FF_KERNEL(cpu, softmax_backward, ff_softmax_args);
FF_KERNEL(cuda, softmax_backward, ff_softmax_args);

/* ---- activation ------------------------------------------------------------------------------------------------------
 * out = dropout(act(x + bias) * (up + up_bias)), the second factor only where `up` is given (Shazeer 2020: with silu it is
 * SwiGLU, with gelu GeGLU; x is the gate). The epilogue of a feed-forward's first matmul; backward reduces the bias
 * gradients in its one pass. relu max(z, 0); gelu z * Phi(z); gelu_tanh its tanh approximation; silu z * sigmoid(z).
 *
 * In place: out may be x or up, dx and dup any of x, up and dout, with the same stride. */
typedef enum ff_activation { FF_RELU = 0, FF_GELU = 1, FF_GELU_TANH = 2, FF_SILU = 3 } ff_activation;
typedef struct ff_activation_args {
  ff_dtype dtype;
  ff_activation kind;
  int64_t rows, cols;
  int64_t x_stride, up_stride, out_stride, dout_stride, dx_stride, dup_stride; /* between rows */
  double dropout_p;        /* 0 = no dropout */
  uint64_t seed;
  const void* x;           /* (rows, cols) */
  const void* bias;        /* (cols) or NULL */
  const void* up;          /* (rows, cols) or NULL */
  const void* up_bias;     /* (cols) or NULL, with up */
  void* out;               /* forward: (rows, cols); backward: the same once more, or NULL */
  const void* dout;        /* backward: (rows, cols) */
  void* dx;                /* backward: (rows, cols) */
  void* dup;               /* backward: (rows, cols), with up */
  void* dbias;             /* backward: (cols) or NULL */
  void* dup_bias;          /* backward: (cols) or NULL, with up */
  void* workspace;         /* backward, with dbias or dup_bias */
} ff_activation_args;
FF_KERNEL(cpu, activation_forward, ff_activation_args);
FF_KERNEL(cuda, activation_forward, ff_activation_args);
FF_KERNEL(cpu, activation_backward, ff_activation_args);
FF_KERNEL(cuda, activation_backward, ff_activation_args);
FF_WORKSPACE(cpu, activation_backward, ff_activation_args);
FF_WORKSPACE(cuda, activation_backward, ff_activation_args);

/* ---- linear_activation -----------------------------------------------------------------------------------------------
 * The first matmul of a feed-forward with the activation above as its epilogue, and the backward pass of both.
 * Forward:  gate = x w1^T, up = x w_up^T;  out = dropout(act(gate + b1) * (up + b_up)), the second factor only where w_up is
 * given; gate and up are stored where they are wanted.
 * Backward: d = dout w2, the gradient of out;  dgate and dup as activation has them, from the stored gate and up;  db1 and
 * db_up, their sums over the rows.
 *
 * Weights may lie either way round: one of their strides is 1. x, dout and the weights start at a multiple of 16 bytes, and
 * their other stride is a multiple of 8; sizes are anything. FF_BFLOAT16 and FF_FLOAT16, compute capability 9.0. */
typedef struct ff_linear_activation_args {
  ff_dtype dtype;
  ff_activation kind;
  int64_t rows, cols;      /* of the hidden tensor */
  int64_t inner;           /* the width summed over: of x or dout, positive */
  double dropout_p;        /* 0 = no dropout */
  uint64_t seed;
  const void* x;           /* forward: (rows, inner) */
  int64_t x_stride;        /* between rows */
  const void* w1;          /* forward: (cols, inner) */
  const void* w_up;        /* forward: (cols, inner) or NULL */
  int64_t w_stride[2];     /* of w1 and w_up */
  const void* b1;          /* (cols) or NULL */
  const void* b_up;        /* (cols) or NULL */
  void* out;               /* forward: (rows, cols) */
  void* gate;              /* (rows, cols): written by forward, or NULL; read by backward */
  void* up;                /* (rows, cols): written by forward, or NULL; read by backward, NULL = there was no w_up */
  const void* dout;        /* backward: (rows, inner) */
  int64_t dout_stride;
  const void* w2;          /* backward: (inner, cols) */
  int64_t w2_stride[2];
  void* dgate;             /* backward: (rows, cols) */
  void* dup;               /* backward: (rows, cols), with up */
  int64_t dgate_stride;    /* between rows of dgate and of dup */
  void* db1;               /* backward: (cols) or NULL */
  void* db_up;             /* backward: (cols) or NULL, with up */
  void* workspace;         /* backward, with db1 or db_up */
} ff_linear_activation_args;
FF_KERNEL(cuda, linear_activation_forward, ff_linear_activation_args);
FF_KERNEL(cuda, linear_activation_backward, ff_linear_activation_args);
FF_WORKSPACE(cuda, linear_activation_backward, ff_linear_activation_args);

/* ---- cross_entropy ---------------------------------------------------------------------------------------------------
 * With z = logits, V = cols, s = label_smoothing and class weights w (1 where NULL):
 * loss = (1 - s) * w[t] * (lse - z[t]) + s / V * sum_j w[j] * (lse - z[j]) + z_loss * lse^2;  0 where target ==
 * ignore_index. With probabilities q instead of target: sum_j ((1 - s) q[j] + s / V) * w[j] * (lse - z[j]) + z_loss * lse^2.
 * A target outside [0, V) that is not ignore_index: FF_INVALID_ARGUMENT on the CPU before anything is written; a NaN
 * loss and gradient row on a GPU, where looking first would cost a synchronisation. */
typedef struct ff_cross_entropy_args {
  ff_dtype dtype;          /* of logits, dlogits */
  int64_t rows, cols;
  int64_t logits_stride;
  int64_t ignore_index;
  double label_smoothing;
  const void* logits;      /* (rows, cols) */
  const int64_t* target;   /* (rows) */
  const void* weight;      /* (cols) acc, or NULL */
  void* loss;              /* forward: (rows) acc */
  void* lse;               /* (rows) acc, log-sum-exp: written by forward, read by backward */
  const void* dloss;       /* backward: (rows) acc, stride dloss_stride (0 broadcasts one value) */
  int64_t dloss_stride;
  void* dlogits;           /* backward: (rows, cols); forward: or NULL, the gradient for dloss, from the same pass */
  /* All that follows may be zero. */
  double z_loss;
  const void* probabilities;   /* (rows, cols) in dtype, instead of target */
  int64_t probabilities_stride;
  void* dprobabilities;        /* backward: (rows, cols) in dtype, or NULL */
} ff_cross_entropy_args;
FF_KERNEL(cpu, cross_entropy_forward, ff_cross_entropy_args);
FF_KERNEL(cuda, cross_entropy_forward, ff_cross_entropy_args);
FF_KERNEL(cpu, cross_entropy_backward, ff_cross_entropy_args);
FF_KERNEL(cuda, cross_entropy_backward, ff_cross_entropy_args);
/* dlogits *= dloss[0], here in dtype, for a gradient that forward has written. Where that is 1, which only the device knows,
 * it goes nowhere near the memory. */
FF_KERNEL(cuda, cross_entropy_scale, ff_cross_entropy_args);

/* ---- embedding -------------------------------------------------------------------------------------------------------
 * summed = scale * tables[0][ids] + tables[1][ids] + ...;  out = dropout(layer_norm(summed)), the norm where `normalize` is
 * set. Row r of the output takes row ids[r % period] of each table.
 * dweight of a table is dense: each of its rows is written once, with the sum over the output's rows that took it in their
 * order, so it repeats bit for bit.
 *
 * An index outside [0, rows): FF_INVALID_ARGUMENT on the CPU before anything is written; on a GPU, where looking first
 * would cost a synchronisation, a NaN row and no access out of bounds. */
typedef struct ff_embedding_table {
  const void* weight;      /* (rows, cols) in dtype */
  int64_t rows;
  int64_t stride;          /* between rows of weight (dweight is contiguous) */
  const int64_t* ids;      /* (period), or NULL: the i-th index is offset + i */
  int64_t period, offset;
  int64_t padding_idx;     /* the row whose gradient is zero, -1 = none */
  void* dweight;           /* backward: (rows, cols) in dtype, or NULL */
} ff_embedding_table;
typedef struct ff_embedding_args {
  ff_dtype dtype;          /* of the tables, out, dout, dsummed */
  ff_dtype param_dtype;    /* of weight, bias, dweight, dbias, as in layer_norm */
  int64_t rows, cols;
  int num_tables;          /* 1 .. 3 */
  ff_embedding_table tables[3];
  double scale;            /* of the first table's rows */
  int normalize;
  double eps;
  double dropout_p;        /* 0 = no dropout */
  uint64_t seed;
  const void* weight;      /* (cols) or NULL: the norm's */
  const void* bias;        /* (cols) or NULL */
  void* out;               /* forward: (rows, cols) */
  void* mean;              /* (rows) acc, as in layer_norm */
  void* rstd;              /* (rows) acc */
  const void* dout;        /* backward: (rows, cols), rows dout_stride apart */
  int64_t dout_stride;
  void* dsummed;           /* backward, with normalize or dropout: (rows, cols), written */
  void* dweight;           /* backward: (cols) or NULL */
  void* dbias;             /* backward: (cols) or NULL */
  void* workspace;         /* backward */
} ff_embedding_args;
FF_KERNEL(cpu, embedding_forward, ff_embedding_args);
FF_KERNEL(cuda, embedding_forward, ff_embedding_args);
FF_KERNEL(cpu, embedding_backward, ff_embedding_args);
FF_KERNEL(cuda, embedding_backward, ff_embedding_args);
FF_WORKSPACE(cpu, embedding_backward, ff_embedding_args);
FF_WORKSPACE(cuda, embedding_backward, ff_embedding_args);

/* ---- rotary ----------------------------------------------------------------------------------------------------------
 * Rotary position embedding of q and, where it is not NULL, k: with half = rotary_dim / 2 and i < half each pair
 *   (x0, x1) = (x[i], x[i + half]), or (x[2 i], x[2 i + 1]) if interleaved,
 * becomes (x0 cos[p, i] - x1 sin[p, i], x1 cos[p, i] + x0 sin[p, i]); elements from rotary_dim on are copied. Position s of sequence b has the row p = position_ids[b, s] of cos and sin, or
 * offset + b * batch_offset + s where that is NULL. The gradient is the same with `inverse`, which turns the other way.
 * Strides are (batch, head, position). q_out may be q and k_out k.
 *
 * A row outside [0, positions): as an index of embedding. */
typedef struct ff_rotary_args {
  ff_dtype dtype;          /* of q, k */
  ff_dtype table_dtype;    /* of cos, sin: dtype, or FF_FLOAT32 beside half-precision data */
  int64_t batch, num_heads, num_kv_heads, seqlen, head_dim, rotary_dim;
  int interleaved, inverse;
  const void* q;           /* (B, Hq, S, D) */
  void* q_out;
  const void* k;           /* (B, Hkv, S, D) or NULL */
  void* k_out;
  int64_t q_stride[3], q_out_stride[3], k_stride[3], k_out_stride[3];
  const void* cos;         /* (positions, rotary_dim / 2) */
  const void* sin;
  int64_t positions, cos_stride, sin_stride;
  const int64_t* position_ids;     /* (B, S) or NULL */
  int64_t position_ids_stride[2];  /* 0 broadcasts */
  int64_t offset, batch_offset;
} ff_rotary_args;
FF_KERNEL(cpu, rotary, ff_rotary_args);
FF_KERNEL(cuda, rotary, ff_rotary_args);

/* ---- attention -------------------------------------------------------------------------------------------------------
 * out = dropout(softmax(cap(scale * q k^T) + bias + mask)) v per batch and head, never holding the (Sq, Sk) matrix, with
 * cap(s) = softcap * tanh(s / softcap). Query head h reads key/value head h / (num_heads / num_kv_heads). Strides are
 * (batch, head, position), and (batch, head, query, key) for mask and bias; the last dimension is contiguous everywhere.
 *
 * Query i sits at position p(i) = i + Sk - Sq (the ends are aligned), or at i with top_left. It sees key j if
 *   j <= p(i) under causal,  p(i) - window_left <= j <= p(i) + window_right under windowed (-1 = unbounded),
 *   mask[b, h, i, j] != 0,  key_padding_mask[b, j] == 0.
 * A query that sees no key gives zeros (lse = -inf) and no gradient. The bias is the sum of
 *   bias[b, h, i, j],  distance_bias[h, clamp(j - p(i), -max_distance, max_distance) + max_distance],
 *   -alibi_slopes[b, h] * |j - p(i)|.
 *
 * Packed sequences: with cu_seqlens_q and cu_seqlens_k (batch + 1, from 0, not decreasing), sequence b has the positions
 * cu_seqlens[b] .. cu_seqlens[b + 1] - 1 of tensors without a batch dimension (its stride is not read), seqlen_q and
 * seqlen_k are the longest, and mask, bias and key_padding_mask are NULL.
 *
 * The row of query i of head h in sequence b, which numbers lse and the rows of the dropout mask (as in add_layer_norm,
 * with the key's index j as the column), is (b * num_heads + h) * seqlen_q + i, or, packed, h * total_q +
 * cu_seqlens_q[b] + i. "acc" is float, double for FF_FLOAT64. */
typedef struct ff_attention_args {
  ff_dtype dtype;
  int64_t batch, num_heads, num_kv_heads, seqlen_q, seqlen_k, head_dim, head_dim_v;
  double scale;
  int causal;
  const uint8_t* key_padding_mask; /* (batch, Sk), nonzero = ignored, or NULL */
  int64_t key_padding_mask_stride; /* between batches */
  const void* q;           /* (B, Hq, Sq, D) */
  const void* k;           /* (B, Hkv, Sk, D) */
  const void* v;           /* (B, Hkv, Sk, Dv) */
  void* out;               /* (B, Hq, Sq, Dv), written by forward, read by backward */
  void* lse;               /* acc, by row: natural log-sum-exp of the scores with everything added; forward: or NULL
                              where no backward follows, which on the CPU is faster for a few queries */
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  const void* dout;        /* backward: (B, Hq, Sq, Dv) */
  const void* dlse;        /* backward: acc, by row, gradient of lse, or NULL */
  void* dq;                /* backward: (B, Hq, Sq, D) */
  void* dk;                /* backward: (B, Hkv, Sk, D) */
  void* dv;                /* backward: (B, Hkv, Sk, Dv) */
  int64_t dout_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];
  void* workspace;         /* both directions */
  /* All that follows may be zero. */
  int top_left;
  int windowed;
  int64_t window_left, window_right;
  double softcap;          /* 0 = none */
  double dropout_p;        /* in [0, 1] */
  uint64_t seed;
  const uint8_t* mask;     /* (B, Hq, Sq, Sk), nonzero = visible; stride 0 broadcasts */
  int64_t mask_stride[4];  /* the last is 1 */
  const void* bias;        /* (B, Hq, Sq, Sk) in bias_dtype: the data's or acc; stride 0 broadcasts */
  ff_dtype bias_dtype;
  int64_t bias_stride[4];  /* the last is 1 */
  const void* distance_bias;  /* (Hq, 2 * max_distance + 1) acc, contiguous */
  int64_t max_distance;
  const float* alibi_slopes;  /* (B, Hq) */
  int64_t alibi_stride;       /* between batches, 0 broadcasts */
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  int64_t total_q, total_k;   /* packed positions */
  void* dbias;             /* backward: acc, or NULL; where its stride is 0 the gradient is summed. CUDA: zeros on entry */
  int64_t dbias_stride[4]; /* the last is 1 */
  void* ddistance_bias;    /* backward: (Hq, 2 * max_distance + 1) acc, or NULL */
} ff_attention_args;
FF_KERNEL(cpu, attention_forward, ff_attention_args);
FF_KERNEL(cuda, attention_forward, ff_attention_args);
FF_KERNEL(cpu, attention_backward, ff_attention_args);
FF_KERNEL(cuda, attention_backward, ff_attention_args);
FF_WORKSPACE(cpu, attention_forward, ff_attention_args);
FF_WORKSPACE(cuda, attention_forward, ff_attention_args);
FF_WORKSPACE(cpu, attention_backward, ff_attention_args);
FF_WORKSPACE(cuda, attention_backward, ff_attention_args);

/* ---- decode_attention ------------------------------------------------------------------------------------------------
 * Attention of a few new queries per sequence against a key/value cache, without gradients:
 * out = softmax(cap(scale * q k^T) - alibi_slopes * |distance| + mask) v, cap as in attention. Query head h reads key/value
 * head h / (num_heads / num_kv_heads).
 *
 * Sequence b's key j is position j of row cache_batch_idx[b] (b where NULL) of the cache, (cache_rows, Hkv, capacity, D), or,
 * with a page table, position j % page_size of page page_table[b, j / page_size] of (cache_rows, Hkv, page_size, D). Its keys
 * are cache_leftpad[b] (0 where NULL) .. cache_seqlens[b] - 1, and query i sits at position p(i) = cache_seqlens[b] - Sq + i.
 * It sees key j if j <= p(i) under causal and p(i) - window_left <= j <= p(i) + window_right under windowed (-1 =
 * unbounded). A query that sees no key gives zeros, lse = -inf.
 *
 * A length, index or page out of range: FF_INVALID_ARGUMENT on the CPU before anything is written; on a GPU, where looking
 * first would cost a synchronisation, NaN for that sequence, and no access out of bounds. */
typedef struct ff_decode_attention_args {
  ff_dtype dtype;
  int64_t batch, num_heads, num_kv_heads, seqlen_q, head_dim, head_dim_v;
  int64_t cache_rows;      /* of the cache, or its pages */
  int64_t capacity;        /* keys a sequence has room for: of a row, or page_size times the pages in the table */
  double scale, softcap;   /* softcap 0 = none */
  int causal, windowed;
  int64_t window_left, window_right;
  const void* q;           /* (B, Hq, Sq, D) */
  const void* k_cache;
  const void* v_cache;
  void* out;               /* (B, Hq, Sq, Dv) */
  void* lse;               /* (B, Hq, Sq) acc, natural log-sum-exp of the scores, or NULL */
  int64_t q_stride[3], out_stride[3];  /* batch, head, position */
  int64_t k_stride[3], v_stride[3];    /* row or page, head, position */
  const int32_t* cache_seqlens;   /* (B) */
  const int32_t* cache_leftpad;   /* (B) or NULL */
  const int32_t* cache_batch_idx; /* (B) or NULL */
  const int32_t* page_table;      /* (B, capacity / page_size) or NULL; only the pages that hold keys are looked at */
  int64_t page_table_stride, page_size;
  const float* alibi_slopes;      /* (B, Hq) or NULL */
  int64_t alibi_stride;           /* between batches, 0 broadcasts */
  void* workspace;         /* on the CPU its size depends on the values of cache_seqlens */
} ff_decode_attention_args;
FF_KERNEL(cpu, decode_attention, ff_decode_attention_args);
FF_KERNEL(cuda, decode_attention, ff_decode_attention_args);
FF_WORKSPACE(cpu, decode_attention, ff_decode_attention_args);
FF_WORKSPACE(cuda, decode_attention, ff_decode_attention_args);

/* ---- linear ----------------------------------------------------------------------------------------------------------
 * out = x weight^T + start for a few rows, the weight read once for all of them (eight at a time). Sums are float32.
 * FF_FLOAT32, FF_BFLOAT16 and FF_FLOAT16. */
typedef struct ff_linear_args {
  ff_dtype dtype;            /* of x, weight, start, out */
  int64_t rows, in_features, out_features;
  int64_t x_stride, start_stride, out_stride; /* between rows; start_stride 0: one row, a bias */
  int64_t weight_stride[2];  /* of (out_features, in_features); one of them is 1 */
  const void* x;             /* (rows, in_features) */
  const void* weight;        /* (out_features, in_features) */
  const void* start;         /* (rows, out_features) or NULL; may be out */
  void* out;                 /* (rows, out_features) */
  void* workspace;
} ff_linear_args;
FF_KERNEL(cpu, linear, ff_linear_args);
FF_WORKSPACE(cpu, linear, ff_linear_args);

/* ---- decoder_step ----------------------------------------------------------------------------------------------------
 * One token through a whole pre-norm GPT-2 decoder with a key/value cache, for each of `batch` sequences:
 * x = wte[token] + wpe[position]; per layer x += proj(attention(ln_1(x))), x += fc2(gelu(fc1(ln_2(x)))); logits =
 * ln_f(x) head^T. Generation at small batch reads every weight once per token and computes little with it: one call per
 * token leaves nothing but that. CPU, FF_FLOAT32. */
typedef struct ff_decoder_layer {
  const void *ln1_weight, *ln1_bias;   /* (E) */
  const void *qkv_weight, *qkv_bias;   /* (E, 3E) row-major = GPT-2's Conv1D layout, (3E) */
  const void *proj_weight, *proj_bias; /* (E, E), (E) */
  const void *ln2_weight, *ln2_bias;   /* (E) */
  const void *fc1_weight, *fc1_bias;   /* (E, F), (F) */
  const void *fc2_weight, *fc2_bias;   /* (F, E), (E) */
  void *k_cache, *v_cache;             /* (batch, H, max_seqlen, E / H) */
} ff_decoder_layer;
typedef struct ff_decoder_step_args {
  ff_dtype dtype;
  int64_t batch, num_layers, hidden_size, num_heads, intermediate_size, vocab_size, max_seqlen;
  double eps;
  int tanh;                            /* GELU form */
  int64_t length;                      /* tokens already in the cache: the new one is written at this index */
  const int64_t* cache_start;          /* (batch) first cached index a sequence may see (left padding), or NULL = 0 */
  const int64_t* tokens;               /* (batch) in [0, vocab_size) */
  const int64_t* positions;            /* (batch) rows of wpe */
  const void *wte, *wpe;               /* (V, E), (positions, E) */
  const ff_decoder_layer* layers;      /* (num_layers) */
  const double* attention_scale;       /* (num_layers) */
  const void *ln_f_weight, *ln_f_bias; /* (E) */
  const void* head_weight;             /* (V, E) */
  void* logits;                        /* (batch, V) */
  void* workspace;
} ff_decoder_step_args;
FF_KERNEL(cpu, decoder_step, ff_decoder_step_args);
FF_WORKSPACE(cpu, decoder_step, ff_decoder_step_args);

#ifdef __cplusplus
}
#endif
#endif
