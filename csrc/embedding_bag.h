// The raw-pointer contract of the embedding-bag kernels: no Python, no Torch.
//
// A bag is a list of tokens, whose ids name rows of a table [V, E]; pyattn/reference.py defines what is computed. All
// strides are in elements and may be anything, 0 included. Ids, offsets and lengths are data, and looked at here.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyattn {

enum class BagMode : uint8_t { kSum, kMean, kMax };

// A [rows, E] matrix.
struct BagMatrix {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t row = 0, col = 0;  // strides
};

// Something per token: element (bag, token) is at bag * .bag + token * .token. With offsets, tokens are counted
// through all bags and .bag is 0.
struct BagTokens {
  void* data = nullptr;  // nullptr: absent
  int64_t bag = 0, token = 0;
};

// int32 or int64, [n].
struct BagIntegers {
  const void* data = nullptr;  // nullptr: absent
  bool wide = true;
  int64_t stride = 0;
};

struct EmbeddingBagProblem {
  int64_t V = 0, E = 0, bags = 0;
  int64_t tokens = 0;  // in a row of ids, or in all
  BagMatrix weight;
  BagTokens ids;
  bool wide_ids = true;  // int64, else int32
  BagTokens w;           // per-sample weights, in weight's dtype; optional
  BagTokens mask;        // bytes; optional
  BagIntegers offsets;   // [bags], or [bags + 1] with the last bag's end
  bool last_offset = false;
  BagIntegers lengths;  // [bags]; optional

  BagMode mode = BagMode::kMean;
  bool has_padding = false;
  int64_t padding_idx = 0;
  bool scale_by_frequency = false;
  double dropout_p = 0;
  uint64_t seed = 0;
  int threads = 1;
};

struct EmbeddingBagForward : EmbeddingBagProblem {
  BagMatrix out;               // [bags, E], in weight's dtype
  int32_t* largest = nullptr;  // [bags, E], for the maximum: whose it is, -1 in empty bags; optional
};

// The tokens that count, transposed: in the order of the rows that they name. Memory of the caller's, for two lists of
// `capacity` terms.
struct EmbeddingBagTerms {
  void* memory = nullptr;
  int64_t capacity = 0;
  void* sorted = nullptr;  // which of the two lists
  int64_t count = 0, rows = 0;
};
constexpr int64_t kBagTermBytes = 16;

struct EmbeddingBagBackward : EmbeddingBagProblem {
  BagMatrix dout;                    // [bags, E], in weight's dtype
  const int32_t* largest = nullptr;  // the forward's
  EmbeddingBagTerms terms;
  bool sparse = false;         // dweight has only the rows that a token names, and row_ids says which
  BagMatrix dweight;           // in weight's dtype
  int64_t* row_ids = nullptr;  // [terms.rows], ascending
  BagTokens dw;                // in weight's dtype, for weights_backward, which sets it for the tokens that count
};

// The functions that return a number return -1, or a bag that has an id which is no row, a length that is none, or
// offsets that are none; then the outputs hold nothing of use. Bitwise the same for any number of threads; they throw
// nothing but std::bad_alloc.
struct EmbeddingBagKernels {
  int64_t (*forward)(const EmbeddingBagForward&);
  int64_t (*transpose)(const EmbeddingBagProblem&, EmbeddingBagTerms&);
  void (*backward)(const EmbeddingBagBackward&);  // dweight, from what `transpose` made
  int64_t (*weights_backward)(const EmbeddingBagBackward&);
};

}  // namespace pyattn
