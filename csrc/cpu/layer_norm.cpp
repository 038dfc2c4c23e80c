// Layer normalisation on the CPU: out = (x - mean) * rstd * weight + bias, and its gradients.
//
// Floor: one read and one write of the tensor forward, two reads and one write backward. Rows go to threads in contiguous
// parts; everything per row happens while the row is in L1 or L2 (layer_norm.h).
#include "layer_norm.h"

FF_DECLARE_IMPL(layer_norm_forward)
FF_DECLARE_IMPL(layer_norm_backward)

namespace ff {
namespace FF_ISA {

int layer_norm_forward(const ff_layer_norm_args* a, void*) { return norm_forward<true>(a); }
int layer_norm_backward(const ff_layer_norm_args* a, void*) { return norm_backward<true>(a); }

}  // namespace FF_ISA
}  // namespace ff

#ifdef FF_ENTRY
extern "C" int ff_cpu_layer_norm_forward(const ff_layer_norm_args* a, void* stream) {
  if (int status = ff::check_norm_forward(a)) return status;
  FF_REQUIRE(!a->mean == !a->rstd, "mean, rstd: both or neither");
  return FF_DISPATCH(layer_norm_forward)(a, stream);
}

extern "C" int ff_cpu_layer_norm_backward(const ff_layer_norm_args* a, void* stream) {
  if (int status = ff::check_norm_backward(a)) return status;
  FF_REQUIRE(a->rows == 0 || a->mean, "mean: must not be NULL");
  return FF_DISPATCH(layer_norm_backward)(a, stream);
}

extern "C" size_t ff_cpu_layer_norm_backward_workspace(const ff_layer_norm_args* a) {
  return ff::FF_ISA::backward_workspace(a->rows, a->cols, a->dtype == FF_FLOAT64 ? 8 : 4);
}
#endif
