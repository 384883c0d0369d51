// The raw-pointer contract of the LSTM kernels: one layer in one direction; no Python, no Torch.
//
// pyattn/reference.py defines what is computed. Gates are in torch's order: input, forget, cell, output. All strides
// are in elements and may be anything, 0 included. Nothing but the lengths is checked here: bindings.cpp has done the
// rest.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyattn {

// A tensor [batch, seq, width]; or [batch, width], or a weight [gates, width], without use for `step`; or a bias
// [gates], without use for `unit` either.
struct StepTensor {
  void* data = nullptr;  // nullptr: the tensor is absent
  Dtype dtype = Dtype::kFloat32;
  int64_t row = 0, step = 0, unit = 0;
};

// A row of `saved` has room for five numbers per unit, in the compute type: float, or double for double. The units are
// rounded up to this many, the widest vector's, so that its shape is the same on every instruction set.
constexpr int64_t kSavedUnits = 16;

struct LstmProblem {
  int64_t batch = 0, seq = 0, features = 0, hidden = 0;
  bool reverse = false;
  int threads = 1;

  StepTensor input;                  // [batch, seq, features]
  StepTensor h0, c0;                 // [batch, hidden]; optional, zeros
  StepTensor weight_ih, weight_hh;   // [4 hidden, features], [4 hidden, hidden]
  StepTensor bias_ih, bias_hh;       // [4 hidden]; optional
  const int64_t* lengths = nullptr;  // [batch]; optional, all seq
  int64_t lengths_stride = 0;
};

struct LstmForward : LstmProblem {
  StepTensor output;      // [batch, seq, hidden]
  StepTensor h_n, c_n;    // [batch, hidden]
  void* saved = nullptr;  // optional: what the backward needs of each valid step, [batch * seq][saved units * 5]
};

struct LstmBackward : LstmProblem {
  StepTensor doutput, dh_n, dc_n;  // each optional, zeros
  const void* saved = nullptr;
  StepTensor dinput;
  StepTensor dh0, dc0;  // optional
  StepTensor dweight_ih, dweight_hh;
  StepTensor dbias;  // [4 hidden], of either bias; optional
};

// The functions return -1, or the first sample whose length is not in [0, seq]; then nothing was written. Bitwise the
// same for any number of threads; a sample's results are the same whatever else is in the batch, and however it is
// padded. They throw nothing but std::bad_alloc.
struct LstmKernels {
  int64_t (*forward)(const LstmForward&);
  int64_t (*backward)(const LstmBackward&);
};

}  // namespace pyattn
