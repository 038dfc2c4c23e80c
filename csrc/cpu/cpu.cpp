// Error messages and the choice of instruction set: the only state the CPU kernels have.
#include "cpu.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ff {

static thread_local char last_error[512] = "";

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

// From least to most demanding, as in Isa.
static const char* const names[] = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(__x86_64__) && !defined(FF_ISA_ALWAYS_SUPPORTED)
static bool supports_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}

// The processor has the tile registers and their bfloat16 product, and the system saves them: the 8 KB they hold are given
// to a process only when it asks, once for all of its threads.
static bool supports_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

static bool supported(Isa wanted) {
  if (wanted == Isa::generic) return true;
#if !defined(FF_BF16_ISAS)
  if (wanted > Isa::avx512) return false;
#endif
#if defined(FF_ISA_ALWAYS_SUPPORTED)  // a test build, whose AVX-512 kernels are compiled to AVX2 instructions
  return true;
#elif defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (wanted == Isa::avx2) return avx2;
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wanted == Isa::avx512) return avx512;
  bool avx512_bf16 = avx512 && supports_avx512_bf16();
  return wanted == Isa::avx512_bf16 ? avx512_bf16 : avx512_bf16 && supports_amx();
#else
  return false;
#endif
}

static bool parse(const char* name, Isa& out) {
  for (int i = 0; i < 5; i++)
    if (!strcmp(name, names[i])) return out = Isa(i), true;
  return false;
}

static Isa detect() {
  Isa wanted;
  const char* name = getenv("FASTFORMER_CPU_ISA");
  if (name && parse(name, wanted) && supported(wanted)) return wanted;
  for (Isa best : {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2})
    if (supported(best)) return best;
  return Isa::generic;
}

Isa isa = detect();

}  // namespace ff

extern "C" {

const char* ff_last_error(void) { return ff::last_error; }

const char* ff_cpu_isa(void) { return ff::names[int(ff::isa)]; }

int ff_cpu_set_isa(const char* name) {
  ff::Isa wanted;
  if (!name || !ff::parse(name, wanted))
    return ff::fail(FF_INVALID_ARGUMENT, "name: '%s' is not one of generic, avx2, avx512, avx512_bf16, amx",
                    name ? name : "(null)");
  if (!ff::supported(wanted)) return ff::fail(FF_UNSUPPORTED, "name: this machine cannot run %s", name);
  ff::isa = wanted;
  return FF_OK;
}

}  // extern "C"
