// What every CPU kernel file shares: the choice of instruction set, dtype dispatch and threading.
//
// A kernel file is compiled once per instruction set. Its kernels live in namespace ff::FF_ISA and have the signature of
// the C function they implement; the C functions themselves are emitted once, by the compilation with FF_ENTRY defined,
// and jump through FF_DISPATCH.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>

#include "../checks.h"
#include "vec.h"

namespace ff {

enum class Isa { generic, avx2, avx512, avx512_bf16, amx };
extern Isa isa;  // chosen at load time in cpu.cpp

// Declares a kernel's implementations; each has the C function's own type.
#define FF_DECLARE_IMPL(name) FF_DECLARE_IMPL_OF(name, name)
// The same of a kernel without an entry of its own, with the arguments of `entry`.
#define FF_DECLARE_IMPL_OF(entry, name)                      \
  namespace ff {                                             \
  namespace generic { decltype(::ff_cpu_##entry) name; }     \
  namespace avx2 { decltype(::ff_cpu_##entry) name; }        \
  namespace avx512 { decltype(::ff_cpu_##entry) name; }      \
  namespace avx512_bf16 { decltype(::ff_cpu_##entry) name; } \
  namespace amx { decltype(::ff_cpu_##entry) name; }         \
  }
#if defined(__x86_64__)
#define FF_DISPATCH(name) \
  (::ff::isa >= ::ff::Isa::avx512 ? ::ff::avx512::name : ::ff::isa == ::ff::Isa::avx2 ? ::ff::avx2::name : ::ff::generic::name)
#else
#define FF_DISPATCH(name) ::ff::generic::name
#endif
// For the files that are also compiled for the instruction sets with bfloat16 products, which need a newer compiler.
#if defined(FF_BF16_ISAS)
#define FF_DISPATCH_BF16(name)                                   \
  (::ff::isa == ::ff::Isa::amx           ? ::ff::amx::name         \
   : ::ff::isa == ::ff::Isa::avx512_bf16 ? ::ff::avx512_bf16::name \
                                         : FF_DISPATCH(name))
#else
#define FF_DISPATCH_BF16(name) FF_DISPATCH(name)
#endif

namespace FF_ISA {

// Calls f(T{}) with the storage type of `dtype`.
template <class F> int for_dtype(int dtype, F f) {
  switch (dtype) {
    case FF_FLOAT32: return f(float{});
    case FF_BFLOAT16: return f(bf16{});
    case FF_FLOAT16: return f(fp16{});
    case FF_FLOAT64: return f(double{});
  }
  return fail(FF_INVALID_ARGUMENT, "dtype: %d is not an ff_dtype", dtype);
}
// Calls f(T{}, P{}) for data of `dtype` and parameters of `param_dtype`: the same, or float32 beside half precision.
template <class F> int for_dtypes(int dtype, int param_dtype, F f) {
  return for_dtype(dtype, [&](auto t) -> int {
    using T = decltype(t);
    if (param_dtype == dtype) return f(t, t);
    if constexpr (sizeof(T) == 2) {
      if (param_dtype == FF_FLOAT32) return f(t, float{});
    }
    return fail(FF_UNSUPPORTED, "param_dtype: %s beside %s data", dtype_name(param_dtype), dtype_name(dtype));
  });
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Threads worth waking for `work` elements: one per 16k, at most OpenMP's current limit. In a PyTorch process that
// limit is torch.get_num_threads(), and the threads are PyTorch's own (the same OpenMP runtime is already loaded).
inline int num_threads(int64_t work) {
  return int(std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), work / 16384)));
}

// Runs f(begin, end, thread) over [0, n) in equal contiguous parts: the split depends on n and the thread count only,
// so reductions repeat bit for bit.
template <class F> void parallel_for(int64_t n, int64_t work_per_item, F f) {
  int threads = int(std::min<int64_t>(num_threads(n * work_per_item), std::max<int64_t>(n, 1)));
  if (threads == 1) return f(int64_t(0), n, 0);
#pragma omp parallel num_threads(threads)
  {
    int t = omp_get_thread_num(), count = omp_get_num_threads();
    f(n * t / count, n * (t + 1) / count, t);
  }
}

}  // namespace FF_ISA
}  // namespace ff
