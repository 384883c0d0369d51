#include "cpu_features.h"

namespace pyattn {

// The compiler's run-time library reads CPUID and, through XGETBV, whether the operating system saves the wide
// registers; it reports a feature only if both agree. F16C has no name there in older compilers, but no processor has
// AVX2 without it.
#if defined(__x86_64__) || defined(__i386__)

bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }

#endif

}  // namespace pyattn
