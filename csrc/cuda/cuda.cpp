// Error messages of the CUDA library: its only state. Weak, so that a library that holds the CPU kernels too keeps
// their messages and these in one place, cpu/cpu.cpp's.
#include <cstdarg>
#include <cstdio>

#include "../include/fastformer.h"

namespace ff {

static thread_local char last_error[512] = "";

__attribute__((weak)) int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace ff

extern "C" __attribute__((weak)) const char* ff_last_error(void) { return ff::last_error; }
