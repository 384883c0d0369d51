// What the eager front needs before a kernel runs: whether these are ordinary tensors that fit each other, and memory
// for the results. Through DLPack's table both take a fraction of what torch's Python functions take. Needs CPython
// alone.
#pragma once

#include <Python.h>

namespace pyattn {

// Positions in Operands and AttentionConfig, the tuples of pyattn/_problem.py.
enum Operand { kQ, kK, kV, kBias, kSinks, kMask, kLengths, kStarts, kQSegments, kKvSegments, kSeed, kOperandCount };
enum Number { kScale, kSoftcap, kDropoutP, kAlign, kLeft, kRight, kPrefix, kNumberCount };

// The same in EmbeddingBagOperands and EmbeddingBagConfig of pyattn/_embedding_bag.py.
enum BagOperand { kTable, kIds, kOffsets, kTokenWeights, kTokenMask, kBagLengths, kBagSeed, kBagOperandCount };
enum BagScalar { kMode, kPaddingIdx, kIncludeLastOffset, kScaleByFrequency, kBagDropoutP, kBagScalarCount };

// Whether `object` is exactly a torch.Tensor or torch.nn.Parameter: a subclass may redefine everything.
bool is_exact_tensor(PyObject* object);

// Adds to `module`; false with a Python error set if that fails:
//
//   plain(*tensors) -> int
//     0 if the memory of an argument does not tell all there is to it (not exactly a torch.Tensor or
//     torch.nn.Parameter, lazily negated, without memory; None is skipped), else 2 if one of them requires a gradient,
//     else 1.
//   attention_ready(operands, config) -> int
//     As plain(*operands), and 0 as well unless the operands fit each other, the numbers are in range, and nothing is
//     asked for that the kernels do not compute. The arguments are the two tuples of pyattn/_problem.py.
//   embedding_bag_ready(operands, config) -> int
//     The same for the two tuples of pyattn/_embedding_bag.py; ids, offsets and lengths are not looked at.
//   empty_matrix(like, rows, columns) -> Tensor
//     Uninitialised, of like's dtype.
//   empty_rows(q) -> Tensor
//     Uninitialised, q's shape without its last dimension, float32 (float64 for float64): where lse goes. As DLPack
//     tensors neither this nor a matrix can be resized.
bool add_operands(PyObject* module);

}  // namespace pyattn
