// Memory that is about to be written for the first time.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyattn {

// From this size on glibc's malloc may give memory fresh from the system at every call, whatever was freed before.
constexpr size_t kLargeBytes = size_t{32} << 20;

// Asks for huge pages under a large buffer, as NumPy does for its own: memory that the system gives page by page costs
// a fault and a cleared page per 4 KB, which at 62 MB of float32 gradient is 50 ms, seven times what computing it
// takes; with 2 MB pages it is 12 (Zen 3, a virtual machine). It is advice: where it cannot be followed, nothing
// happens.
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < kLargeBytes) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace pyattn
