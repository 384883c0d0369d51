#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "cpu_features.h"

namespace pyattn {

// Defined by kernels.cpp, once per variant.
#define PYATTN_DECLARE_VARIANT(variant) \
  namespace variant {                   \
  extern const Kernels kKernels;        \
  }
PYATTN_DECLARE_VARIANT(avx512)
PYATTN_DECLARE_VARIANT(avx2)
PYATTN_DECLARE_VARIANT(base)
#undef PYATTN_DECLARE_VARIANT

namespace {

struct Variant {
  const Kernels* kernels;
  bool (*available)();
};

// In order of preference; the last one runs everywhere.
constexpr Variant kVariants[] = {
#ifdef PYATTN_HAVE_AVX512
    {&avx512::kKernels, cpu_has_avx512},
#endif
#ifdef PYATTN_HAVE_AVX2
    {&avx2::kKernels, cpu_has_avx2},
#endif
    {&base::kKernels, [] { return true; }},
};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Kernels& choose() {
  const char* forced = std::getenv("PYATTN_ISA");
  if (forced != nullptr && *forced == '\0') forced = nullptr;
  for (const Variant& variant : kVariants) {
    if (variant.available() && (forced == nullptr || std::string(forced) == variant.kernels->isa)) {
      return *variant.kernels;
    }
  }
  bool compiled = false;
  for (const std::string& isa : compiled_isas()) compiled |= isa == forced;
  throw std::runtime_error("PYATTN_ISA=" + std::string(forced) +
                           (compiled ? " is not supported by this machine" : " is not a variant of this build") +
                           "; compiled: " + join(compiled_isas()) + "; available here: " + join(available_isas()) +
                           ". Unset PYATTN_ISA to use the best one.");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : kVariants) names.push_back(variant.kernels->isa);
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : kVariants) {
    if (variant.available()) names.push_back(variant.kernels->isa);
  }
  return names;
}

}  // namespace pyattn
