// Large buffers, in pages of 2 MB instead of 4 KB.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyattn {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Asks for them where the buffer has room for one, as NumPy does for its own. It is advice: where it cannot be
// followed, nothing happens. (static, since kernels.cpp is compiled several times and may leave no weak symbol.)
static inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < kHugePage) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace pyattn
