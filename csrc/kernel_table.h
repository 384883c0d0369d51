// The kernels of one compiled variant.
#pragma once

#include "attention.h"
#include "cross_entropy.h"
#include "embedding_bag.h"

namespace pyattn {

struct Kernels {
  const char* isa;
  AttentionKernels attention;
  CrossEntropyKernels cross_entropy;
  EmbeddingBagKernels embedding_bag;
};

}  // namespace pyattn
