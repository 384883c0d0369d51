// The raw-pointer contract of the cross-entropy kernels: no Python, no Torch.
//
// A row is one softmax over C classes, wherever the class axis lies among the axes of the input; pyattn/reference.py
// defines what is computed. All strides are in elements and may be anything, 0 included. Nothing but the class indices
// is checked here: bindings.cpp has done the rest.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyattn {

constexpr int kMaxRowRank = 7;

// A tensor [*rows, classes], whatever the order of its axes in memory; or [*rows], without use for `cls`.
struct RowTensor {
  void* data = nullptr;  // nullptr: the tensor is absent
  Dtype dtype = Dtype::kFloat32;
  int64_t row[kMaxRowRank] = {};
  int64_t cls = 0;
};

enum class Reduction : uint8_t { kNone, kMean, kSum };

// What is asked of the logits, wherever they come from.
struct CrossEntropyTargets {
  int row_rank = 0;
  int64_t row_shape[kMaxRowRank] = {};
  int64_t rows = 1, C = 0;  // rows is the product of row_shape
  Dtype dtype = Dtype::kFloat32;

  RowTensor probabilities;  // of the classes, in that dtype; if absent, there are
  RowTensor indices;        // int64, or one byte each (the dtype field is not used)
  bool byte_indices = false;
  const void* weight = nullptr;  // [C], in that dtype; optional
  int64_t weight_stride = 0;

  Reduction reduction = Reduction::kMean;
  int64_t ignore_index = 0;
  double label_smoothing = 0;
  int threads = 1;
};

struct CrossEntropyProblem : CrossEntropyTargets {
  RowTensor input;
};

// m, the maximum of a row, and l, the sum of e^(x - m), are [rows] in the compute type: float, or double for double.
struct CrossEntropyForward : CrossEntropyProblem {
  RowTensor loss;                   // in input's dtype; row strides are used if nothing is reduced
  void *m = nullptr, *l = nullptr;  // optional
};

struct CrossEntropyBackward : CrossEntropyProblem {
  RowTensor dloss;  // in input's dtype; strides 0 if the loss was reduced
  const void *m = nullptr, *l = nullptr;
  RowTensor dinput;  // in input's dtype
};

// The functions return -1, or the first row whose index is no class and not ignored; then the outputs hold nothing of
// use. Bitwise the same for any number of threads; they throw nothing but std::bad_alloc.
struct CrossEntropyKernels {
  int64_t (*forward)(const CrossEntropyForward&);
  int64_t (*backward)(const CrossEntropyBackward&);
};

}  // namespace pyattn
