// Error messages of the CUDA library: its only state.
#include <cstdarg>
#include <cstdio>

#include "../include/fastformer.h"

namespace ff {

static thread_local char last_error[512] = "";

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace ff

extern "C" const char* ff_last_error(void) { return ff::last_error; }
