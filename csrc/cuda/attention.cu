// Attention on a GPU: out = dropout(softmax(scores)) v and its gradients; fastformer.h has the formula.
//
// Here: arguments, and the choice between the kernels. attention_*_sm80 covers every call and runs everywhere;
// attention_*_sm90 takes what it covers on Hopper (compute capability 9.0), whose tensor cores need other instructions.
//   nvcc -std=c++17 -O3 --use_fast_math -gencode=arch=compute_80,code=sm_80
//     -gencode=arch=compute_90a,code=sm_90a -cudart static -Xcompiler -fPIC,-fvisibility=hidden -c attention.cu
//   g++ -x c++ -std=c++17 -O2 -fno-strict-aliasing -fPIC -fvisibility=hidden -DFF_EMULATE -c attention.cu
#include <cstdlib>

#include "attention.cuh"

namespace ff {
namespace {

// Whether the current device runs the sm_90 kernels, as far as they go. Emulated, FASTFORMER_CUDA_FAMILY says.
bool is_hopper() {
#ifdef FF_EMULATE
  const char* family = getenv("FASTFORMER_CUDA_FAMILY");
  return family && !strcmp(family, "sm90");
#else
  static int capabilities[64];  // a repeated first query is harmless
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device < 0 || device >= 64) return false;
  if (capabilities[device] == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    capabilities[device] = major * 10 + minor;
  }
  return capabilities[device] == 90;
#endif
}

bool runs_sm90(const ff_attention_args* a, bool backward) {
  return is_hopper() && attention_supported_sm90(a, backward);
}

int check_strides(const char* name, const void* data, const int64_t (&stride)[3]) {
  if (aligned16(data) && (stride[0] | stride[1] | stride[2]) % 8 == 0) return FF_OK;
  return fail(FF_UNSUPPORTED, "%s: rows must start at multiples of 16 bytes", name);
}

int check(const ff_attention_args* a) {
  if (int status = check_attention(a)) return status;
  if (!is_half_precision(a->dtype))
    return fail(FF_UNSUPPORTED, "dtype: %s has no CUDA kernel; accepted: bfloat16, float16", dtype_name(a->dtype));
  if ((a->head_dim | a->head_dim_v) % 8)
    return fail(FF_UNSUPPORTED, "head_dim: %lld, %lld are not multiples of 8", (long long)a->head_dim,
                (long long)a->head_dim_v);
  if (std::max({a->seqlen_q, a->seqlen_k, a->max_distance, a->batch, a->num_heads}) >= kMaxSeqlen)
    return fail(FF_UNSUPPORTED, "sizes: must be below %d", kMaxSeqlen);
  FF_REQUIRE(a->batch * a->seqlen_q == 0 || a->lse, "lse: must not be NULL");
  if (int status = check_strides("q", a->q, a->q_stride)) return status;
  if (int status = check_strides("k", a->k, a->k_stride)) return status;
  if (int status = check_strides("v", a->v, a->v_stride)) return status;
  return check_strides("out", a->out, a->out_stride);
}

int check_backward(const ff_attention_args* a) {
  if (int status = check(a)) return status;
  if (int status = check_attention_backward(a)) return status;
  FF_REQUIRE(a->batch * a->seqlen_q == 0 || a->workspace, "workspace: must not be NULL");
  FF_REQUIRE(aligned16(a->workspace), "workspace: must be aligned to 16 bytes");
  if (int status = check_strides("dout", a->dout, a->dout_stride)) return status;
  if (int status = check_strides("dq", a->dq, a->dq_stride)) return status;
  if (int status = check_strides("dk", a->dk, a->dk_stride)) return status;
  return check_strides("dv", a->dv, a->dv_stride);
}

}  // namespace

}  // namespace ff

extern "C" size_t ff_cuda_attention_forward_workspace(const ff_attention_args*) { return 0; }

extern "C" int ff_cuda_attention_forward(const ff_attention_args* a, void* stream) {
  using namespace ff;
  if (int status = check(a)) return status;
  if (runs_sm90(a, false)) return attention_forward_sm90(a, stream);
  return attention_forward_sm80(a, stream);
}

extern "C" size_t ff_cuda_attention_backward_workspace(const ff_attention_args* a) {
  using namespace ff;
  if (!a) return 0;
  // Enough for either: which one runs may hang on strides, which the caller need not have set yet.
  const size_t bytes = attention_backward_workspace_sm80(a);
  return is_hopper() ? std::max(bytes, attention_backward_workspace_sm90(a)) : bytes;
}

extern "C" int ff_cuda_attention_backward(const ff_attention_args* a, void* stream) {
  using namespace ff;
  if (int status = check_backward(a)) return status;
  if (runs_sm90(a, true)) return attention_backward_sm90(a, stream);
  return attention_backward_sm80(a, stream);
}
