// Checks the arguments of a call against the compiled type annotations of a function. Needs CPython alone.
#pragma once

#include <Python.h>

namespace pyattn {

// Adds `compile_signature`, `plain` and `attention_operands` to `module`; false with a Python error set if that fails.
//
//   compile_signature(parameters) -> accepts, with accepts(*arguments) -> bool
//     One argument per parameter, in their order. True only if each surely fits its parameter's annotation; False means
//     "not sure", and the caller asks the full type checker. The form of `parameters` is stated where it is made, in
//     pyattn/_types.py.
//   plain(*tensors) -> int
//     0 if the memory of an argument does not tell all there is to it (not exactly a torch.Tensor or
//     torch.nn.Parameter, lazily negated, without memory; None is skipped), else 2 if one of them requires a gradient,
//     else 1.
//   attention_operands(q, k, v, bias, mask) -> int
//     As plain, and 0 as well if their dtypes, devices or shapes do not fit each other.
bool add_signature(PyObject* module);

}  // namespace pyattn
