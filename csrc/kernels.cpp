// The kernels of all ops for one instruction set: compiled once per variant with that variant's flags (setup.py), into
// the namespace PYATTN_VARIANT.
//
// Everything is in an anonymous namespace and no standard template is used, so that no weak symbol compiled for one
// instruction set can replace another's at link time (tests/test_isa.py looks).
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <new>

#if defined(__x86_64__) || defined(__i386__)
// g++ 12 warns of the deliberately undefined operands inside its own AVX-512 intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "attention.h"
#include "cross_entropy.h"
#include "embedding_bag.h"
#include "huge_pages.h"
#include "kernel_table.h"
#include "linear_cross_entropy.h"
#include "lstm.h"

namespace pyattn {
namespace PYATTN_VARIANT {
namespace {

// Keys are packed, skipped, and summed over in units of this many: the grain at which masks pay. Every order of
// summation is counted in units from key 0, which is what makes results independent of threads and batch.
constexpr int kUnit = 64;

// Each uses the ones before it.
// clang-format off
#include "vec.h"
#include "philox.h"
#include "gemm_tile.h"
#include "pack-inl.h"
#include "scores-inl.h"
#include "attention_fwd-inl.h"
#include "attention_bwd-inl.h"
#include "cross_entropy-inl.h"
#include "embedding_bag-inl.h"
#include "linear_cross_entropy-inl.h"
#include "lstm-inl.h"
// clang-format on

void attention_forward(const AttentionForward& p) {
  if (p.q.dtype == Dtype::kFloat64) {
    attention_forward<double>(p);
  } else {
    attention_forward<float>(p);
  }
  trim_scratch();
}

void attention_backward(const AttentionBackward& p) {
  if (p.q.dtype == Dtype::kFloat64) {
    attention_backward<double>(p);
  } else {
    attention_backward<float>(p);
  }
  trim_scratch();
}

int64_t cross_entropy_forward(const CrossEntropyForward& p) {
  const int64_t bad_row = p.input.dtype == Dtype::kFloat64 ? CrossEntropyForwardRows<double>(p).run()
                                                           : CrossEntropyForwardRows<float>(p).run();
  trim_scratch();
  return bad_row;
}

int64_t cross_entropy_backward(const CrossEntropyBackward& p) {
  const int64_t bad_row = p.input.dtype == Dtype::kFloat64 ? CrossEntropyBackwardRows<double>(p).run()
                                                           : CrossEntropyBackwardRows<float>(p).run();
  trim_scratch();
  return bad_row;
}

int64_t embedding_bag_forward(const EmbeddingBagForward& p) {
  const int64_t bad_bag = p.weight.dtype == Dtype::kFloat64 ? bag_forward<double>(p) : bag_forward<float>(p);
  trim_scratch();
  return bad_bag;
}

int64_t embedding_bag_transpose(const EmbeddingBagProblem& p, EmbeddingBagTerms& terms) {
  return p.weight.dtype == Dtype::kFloat64 ? bag_transpose<double>(p, terms) : bag_transpose<float>(p, terms);
}

void embedding_bag_backward(const EmbeddingBagBackward& p) {
  if (p.weight.dtype == Dtype::kFloat64) {
    bag_backward<double>(p);
  } else {
    bag_backward<float>(p);
  }
  trim_scratch();
}

int64_t embedding_bag_weights_backward(const EmbeddingBagBackward& p) {
  const int64_t bad_bag =
      p.weight.dtype == Dtype::kFloat64 ? bag_weights_backward<double>(p) : bag_weights_backward<float>(p);
  trim_scratch();
  return bad_bag;
}

int64_t linear_cross_entropy_forward(const LinearCrossEntropyForward& p) {
  const int64_t bad_row =
      p.dtype == Dtype::kFloat64 ? linear_cross_entropy_forward<double>(p) : linear_cross_entropy_forward<float>(p);
  trim_scratch();
  return bad_row;
}

int64_t linear_cross_entropy_backward(const LinearCrossEntropyBackward& p) {
  const int64_t bad_row =
      p.dtype == Dtype::kFloat64 ? linear_cross_entropy_backward<double>(p) : linear_cross_entropy_backward<float>(p);
  trim_scratch();
  return bad_row;
}

int64_t lstm_forward(const LstmForward& p) {
  const int64_t bad_sample =
      p.input.dtype == Dtype::kFloat64 ? LstmForwardTiles<double>(p).run() : LstmForwardTiles<float>(p).run();
  trim_scratch();
  return bad_sample;
}

int64_t lstm_backward(const LstmBackward& p) {
  const int64_t bad_sample =
      p.input.dtype == Dtype::kFloat64 ? LstmBackwardTiles<double>(p).run() : LstmBackwardTiles<float>(p).run();
  trim_scratch();
  return bad_sample;
}

#define PYATTN_NAME(variant) PYATTN_STRING(variant)
#define PYATTN_STRING(text) #text

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {
    PYATTN_NAME(PYATTN_VARIANT),
    {attention_forward, attention_backward},
    {cross_entropy_forward, cross_entropy_backward},
    {embedding_bag_forward, embedding_bag_transpose, embedding_bag_backward, embedding_bag_weights_backward},
    {linear_cross_entropy_forward, linear_cross_entropy_backward},
    {lstm_forward, lstm_backward}};

}  // namespace PYATTN_VARIANT
}  // namespace pyattn
