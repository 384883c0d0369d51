// The raw-pointer contract of the attention kernels: no Python, no Torch.
//
// One problem is  out = dropout(softmax(scale * q k^T + bias, masked)) v  for every batch element and query head, as
// pyattn/reference.py defines it. All strides are in elements and may be anything, 0 included; broadcast dimensions of
// bias and mask have stride 0. Nothing here is checked: bindings.cpp has done that.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyattn {

constexpr int kMaxBatchRank = 5;

// A tensor [*batch, head, row, col]. `data` is nullptr where an optional tensor is absent.
struct Tensor {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t batch[kMaxBatchRank] = {};
  int64_t head = 0;
  int64_t row = 0;
  int64_t col = 0;
};

// What forward and backward share. B is the product of the batch dimensions; query head h reads key/value head
// h / (Hq / Hkv).
struct AttentionProblem {
  int batch_rank = 0;
  int64_t batch_shape[kMaxBatchRank] = {};
  int64_t B = 1, Hq = 0, Hkv = 0, L = 0, S = 0, D = 0, Dv = 0;

  double scale = 1;
  double dropout_p = 0;
  uint64_t seed = 0;  // of the Philox generator; used if dropout_p > 0
  // With causal, key j is visible to query i iff j <= i + diagonal or j < prefix.
  bool causal = false;
  int64_t diagonal = 0;
  int64_t prefix = 0;

  int threads = 1;

  Tensor q, k, v;
  Tensor bias;  // optional; q's dtype, or float32
  Tensor mask;  // optional; one byte per element, nonzero = attend (its dtype field is not used)
};

struct AttentionForward : AttentionProblem {
  Tensor out;
  Tensor lse;  // optional; natural log; float32 (float64 for float64 inputs); its col stride is not used
};

struct AttentionBackward : AttentionProblem {
  Tensor dout, dlse;  // dlse is optional
  Tensor out, lse;    // of the forward
  Tensor dq, dk, dv;
  Tensor dbias;  // optional; stride 0 where bias is broadcast, which is what tells the kernel where to sum
};

// The functions return when the work is done, throw nothing but std::bad_alloc, and give bitwise
// the same result for any number of threads.
struct AttentionKernels {
  void (*forward)(const AttentionForward&);
  void (*backward)(const AttentionBackward&);
};

}  // namespace pyattn
