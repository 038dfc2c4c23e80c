// Error messages and the choice of instruction set: the only state the CPU kernels have.
#include "cpu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ff {

static thread_local char last_error[512] = "";

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

static bool supported(Isa wanted) {
  if (wanted == Isa::generic) return true;
#if defined(FF_ISA_ALWAYS_SUPPORTED)  // a test build, whose "avx512" kernels are compiled to AVX2 instructions
  return true;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (wanted == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

static bool parse(const char* name, Isa& out) {
  if (!strcmp(name, "generic")) out = Isa::generic;
  else if (!strcmp(name, "avx2")) out = Isa::avx2;
  else if (!strcmp(name, "avx512")) out = Isa::avx512;
  else return false;
  return true;
}

static Isa detect() {
  Isa wanted;
  const char* name = getenv("FASTFORMER_CPU_ISA");
  if (name && parse(name, wanted) && supported(wanted)) return wanted;
  return supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::generic;
}

Isa isa = detect();

}  // namespace ff

extern "C" {

const char* ff_last_error(void) { return ff::last_error; }

const char* ff_cpu_isa(void) {
  return ff::isa == ff::Isa::avx512 ? "avx512" : ff::isa == ff::Isa::avx2 ? "avx2" : "generic";
}

int ff_cpu_set_isa(const char* name) {
  ff::Isa wanted;
  if (!name || !ff::parse(name, wanted))
    return ff::fail(FF_INVALID_ARGUMENT, "name: '%s' is not one of generic, avx2, avx512", name ? name : "(null)");
  if (!ff::supported(wanted)) return ff::fail(FF_UNSUPPORTED, "name: this machine cannot run %s", name);
  ff::isa = wanted;
  return FF_OK;
}

}  // extern "C"
