// The storage types of the tensors that kernels read and write.
#pragma once

#include <cstdint>

namespace pyattn {

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace pyattn
