// How the kernels beside this file are started from Python: run_<kernels>(..., bug, arguments...) after configure().
#pragma once
#include "../../../csrc/cuda/common.cuh"

#ifdef FF_EMULATE
// Selects how the emulator behaves; false where there is no such order or completion.
extern "C" FF_API __attribute__((weak)) bool configure(const char* order, const char* completion, unsigned seed) {
  ff::emulation::settings.seed = seed;
  ff::emulation::late_operations = 0;
  return ff::emulation::set_order(order) && ff::emulation::set_completion(completion);
}
extern "C" FF_API __attribute__((weak)) uint64_t late_operations() { return ff::emulation::late_operations; }
#endif
