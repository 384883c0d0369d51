// The raw-pointer contract of the kernels of linear layer and cross-entropy in one: no Python, no Torch.
//
// The logits are x W^T + bias; pyattn/reference.py defines what is computed of them. All strides are in elements and
// may be anything, 0 included. Nothing but the class indices is checked here: bindings.cpp has done the rest.
#pragma once

#include <cstdint>

#include "cross_entropy.h"

namespace pyattn {

// A row is a sample (row_rank is 0 or 1), and its target a class index: `probabilities` are absent.
struct LinearCrossEntropyProblem : CrossEntropyTargets {
  int64_t D = 0;               // features
  RowTensor x, w;              // [rows, D] and [C, D]: `cls` is the stride of features
  const void* bias = nullptr;  // [C], in that dtype; optional
  int64_t bias_stride = 0;

  // Gradients, in that dtype; those that are absent are not computed. dw and dbias are contiguous.
  RowTensor dx, dw;
  void* dbias = nullptr;
};

// The gradients are those of the loss, which is then not kNone: they take a third product of the logits' size, where
// the backward takes three, as it makes the logits again.
struct LinearCrossEntropyForward : LinearCrossEntropyProblem {
  RowTensor loss;                   // in that dtype; row strides are used if nothing is reduced
  void *m = nullptr, *l = nullptr;  // optional: [rows] in the compute type, as cross-entropy has them
};

struct LinearCrossEntropyBackward : LinearCrossEntropyProblem {
  RowTensor dloss;  // in that dtype; strides 0 if the loss was reduced
  const void *m = nullptr, *l = nullptr;
};

// As for cross-entropy: -1, or the first row whose index is no class and not ignored; bitwise the same for any number
// of threads.
struct LinearCrossEntropyKernels {
  int64_t (*forward)(const LinearCrossEntropyForward&);
  int64_t (*backward)(const LinearCrossEntropyBackward&);
};

}  // namespace pyattn
