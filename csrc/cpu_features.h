// What processor and operating system together support.
#pragma once

namespace pyattn {

bool cpu_has_avx2();    // AVX2, FMA and F16C
bool cpu_has_avx512();  // AVX-512 F, BW, DQ and VL

}  // namespace pyattn
