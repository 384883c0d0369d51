// Checks the arguments of a call against the compiled type annotations of a function. Needs CPython alone.
#pragma once

#include <Python.h>

namespace pyattn {

// Adds `compile_signature` to `module`; false with a Python error set if that fails.
//
//   compile_signature(parameters) -> accepts, with accepts(*arguments) -> bool
//     One argument per parameter, in their order. True only if each surely fits its parameter's annotation; False means
//     "not sure", and the caller asks the full type checker. The form of `parameters` is stated where it is made, in
//     pyattn/_types.py.
bool add_signature(PyObject* module);

}  // namespace pyattn
