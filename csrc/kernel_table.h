// The kernels of one compiled variant.
#pragma once

#include "attention.h"
#include "cross_entropy.h"
#include "embedding_bag.h"
#include "linear_cross_entropy.h"
#include "lstm.h"

namespace pyattn {

struct Kernels {
  const char* isa;
  AttentionKernels attention;
  CrossEntropyKernels cross_entropy;
  EmbeddingBagKernels embedding_bag;
  LinearCrossEntropyKernels linear_cross_entropy;
  LstmKernels lstm;
};

}  // namespace pyattn
