// summed = residual + dropout(x); out = rms_norm(summed), in one pass over memory (add_layer_norm.h).
//
// Floor: two reads and two writes forward; three reads and one write (two with dropout) backward.
#include "add_layer_norm.h"

FF_DECLARE_IMPL(add_rms_norm_forward)
FF_DECLARE_IMPL(add_rms_norm_backward)

namespace ff {
namespace FF_ISA {

int add_rms_norm_forward(const ff_add_rms_norm_args* a, void*) { return add_norm_forward<false>(a); }
int add_rms_norm_backward(const ff_add_rms_norm_args* a, void*) { return add_norm_backward<false>(a); }

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
extern "C" int ff_cpu_add_rms_norm_forward(const ff_add_rms_norm_args* a, void* stream) {
  if (int status = ff::check_add_norm_forward(a)) return status;
  return FF_DISPATCH(add_rms_norm_forward)(a, stream);
}

extern "C" int ff_cpu_add_rms_norm_backward(const ff_add_rms_norm_args* a, void* stream) {
  if (int status = ff::check_add_norm_backward(a)) return status;
  return FF_DISPATCH(add_rms_norm_backward)(a, stream);
}

extern "C" size_t ff_cpu_add_rms_norm_backward_workspace(const ff_add_rms_norm_args* a) {
  return ff::FF_ISA::backward_workspace(a->rows, a->cols, a->dtype == FF_FLOAT64 ? 8 : 4);
}
#endif
