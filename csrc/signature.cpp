// The unifier behind pyattn._types.typed.
//
// An annotation such as Float[Tensor, "*batch q_heads q_len head_dim"] says which dtypes are accepted and names the
// axes; across the arguments of a call, equal names must have equal sizes. jaxtyping decides that in about 30 us; here
// it is compiled once, at decoration, and costs about 50 ns per tensor for any shape. (Remembering signatures that
// passed before would miss at every step of a decoding loop, where kv_len grows.)
//
// The semantics are jaxtyping's and beartype's, argument by argument in the order of the parameters. Whatever is not
// certain is answered with "no", and costs only the detour through them.
#include "signature.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "operands.h"
#include "tensor_view.h"

namespace pyattn {
namespace {

// Bounds of the tables that a call keeps on the stack; a signature beyond them is refused at decoration.
constexpr int kMaxNames = 32;
constexpr int kMaxRuns = 4;
constexpr int kMaxRunDims = 8;

// ---- What annotations are compiled to ----

struct Axis {
  enum Kind : int { kAny = 0, kFixed = 1, kNamed = 2, kAnyRun = 3, kNamedRun = 4 };
  int kind;
  int broadcastable;  // jaxtyping's #: size 1 fits as well
  long long value;    // kFixed: the size; kNamed, kNamedRun: the number of the name
};

struct TensorPattern {
  std::vector<int> dtypes;  // DLPack code << 8 | bits
  std::vector<Axis> axes;
  int run = -1;  // position of the one axis that stands for any number of axes, or -1
};

// All pointers to Python objects are borrowed from Signature::source.
struct Parameter {
  std::vector<PyTypeObject*> classes;   // accepted: instances of these,
  std::vector<PyObject*> literals;      // these values,
  std::vector<TensorPattern> patterns;  // tensors that fit one of these
};

struct Signature {
  PyObject* source = nullptr;
  std::vector<Parameter> parameters;
  ~Signature() { Py_XDECREF(source); }
};

// ---- Matching one tensor ----

// What a named run of axes ("*batch") was bound to.
struct Run {
  int ndim = -1;  // -1: not yet bound
  int broadcastable;
  int64_t sizes[kMaxRunDims];
};

struct Bindings {
  int64_t sizes[kMaxNames];  // -1: not yet bound
  Run runs[kMaxRuns];
  Bindings() { std::fill_n(sizes, kMaxNames, -1); }
};

bool fits_dtype(const TensorPattern& pattern, const dlpack::DLDataType& dtype) {
  const int wanted = dtype.code << 8 | dtype.bits;
  return std::find(pattern.dtypes.begin(), pattern.dtypes.end(), wanted) != pattern.dtypes.end();
}

bool fit_axes(const Axis* axes, int count, const int64_t* sizes, Bindings& bindings) {
  for (int i = 0; i < count; ++i) {
    const Axis& axis = axes[i];
    if (axis.kind == Axis::kAny || (axis.broadcastable && sizes[i] == 1)) continue;
    if (axis.kind == Axis::kNamed) {
      int64_t& bound = bindings.sizes[axis.value];
      if (bound == -1) bound = sizes[i];
      if (bound != sizes[i]) return false;
    } else if (axis.value != sizes[i]) {
      return false;
    }
  }
  return true;
}

// The shape that `a` and `b` broadcast to; ndim -1 if they do not.
Run broadcast(const Run& a, const Run& b) {
  Run out;
  const int ndim = std::max(a.ndim, b.ndim);
  for (int i = 1; i <= ndim; ++i) {  // counted from the right
    const int64_t size_a = i <= a.ndim ? a.sizes[a.ndim - i] : 1;
    const int64_t size_b = i <= b.ndim ? b.sizes[b.ndim - i] : 1;
    if (size_a != size_b && size_a != 1 && size_b != 1) return out;
    out.sizes[ndim - i] = size_a == 1 ? size_b : size_a;
  }
  out.ndim = ndim;
  return out;
}

bool same_shape(const Run& a, const Run& b) {
  return a.ndim == b.ndim && std::equal(a.sizes, a.sizes + std::max(a.ndim, 0), b.sizes);
}

// jaxtyping's rule: a broadcastable run may broadcast to what comes later, a plain one is final.
bool fit_run(const Run& run, Run& bound) {
  if (bound.ndim == -1) {
    bound = run;
    return true;
  }
  if (!run.broadcastable && !bound.broadcastable) return same_shape(run, bound);
  Run joint = broadcast(run, bound);
  joint.broadcastable = run.broadcastable;
  if (!bound.broadcastable) return same_shape(joint, bound);
  if (joint.ndim == -1 || (!run.broadcastable && !same_shape(joint, run))) return false;
  bound = joint;
  return true;
}

bool fits_shape(const TensorPattern& pattern, const dlpack::DLTensor& tensor, Bindings& bindings) {
  const int count = static_cast<int>(pattern.axes.size());
  if (pattern.run < 0) return tensor.ndim == count && fit_axes(pattern.axes.data(), count, tensor.shape, bindings);
  const int before = pattern.run, after = count - 1 - before, run_ndim = tensor.ndim - before - after;
  if (run_ndim < 0 || run_ndim > kMaxRunDims) return false;
  const Axis* axes = pattern.axes.data();
  const int64_t* sizes = tensor.shape;
  if (!fit_axes(axes, before, sizes, bindings)) return false;
  if (!fit_axes(axes + before + 1, after, sizes + before + run_ndim, bindings)) return false;
  const Axis& axis = axes[before];
  if (axis.kind == Axis::kAnyRun) return true;
  Run run;
  run.ndim = run_ndim;
  run.broadcastable = axis.broadcastable;
  std::copy_n(sizes + before, run_ndim, run.sizes);
  return fit_run(run, bindings.runs[axis.value]);
}

bool fits_tensor(const Parameter& parameter, PyObject* object, Bindings& bindings) {
  const dlpack::DLExchangeAPI* api = exchange_api(Py_TYPE(object));
  dlpack::DLTensor tensor;
  if (api == nullptr || api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();  // a meta or sparse tensor, or a level of torch.func: jaxtyping asks the tensor for its shape
    return false;
  }
  // If more than one pattern has the dtype, which of them binds its names depends on the type checker's order.
  const TensorPattern* chosen = nullptr;
  for (const TensorPattern& pattern : parameter.patterns) {
    if (!fits_dtype(pattern, tensor.dtype)) continue;
    if (chosen != nullptr) return false;
    chosen = &pattern;
  }
  return chosen != nullptr && fits_shape(*chosen, tensor, bindings);
}

// ---- Checking a call ----

// isinstance(object, type), without running Python code: a metaclass (ABCMeta) may define it otherwise for subclasses.
bool is_instance(PyObject* object, PyTypeObject* type) {
  return Py_TYPE(object) == type || (Py_TYPE(type) == &PyType_Type && PyType_IsSubtype(Py_TYPE(object), type));
}

bool is_literal(PyObject* object, PyObject* literal) {
  return object == literal ||
         (Py_TYPE(object) == Py_TYPE(literal) && PyObject_RichCompareBool(object, literal, Py_EQ) == 1);
}

bool fits(const Parameter& parameter, PyObject* object, Bindings& bindings) {
  if (!parameter.patterns.empty() && is_exact_tensor(object)) return fits_tensor(parameter, object, bindings);
  for (PyTypeObject* type : parameter.classes) {
    if (is_instance(object, type)) return true;
  }
  for (PyObject* literal : parameter.literals) {
    if (is_literal(object, literal)) return true;
  }
  return false;
}

constexpr const char* kCapsuleName = "pyattn.signature";

PyObject* accepts(PyObject* capsule, PyObject* const* arguments, Py_ssize_t count) {
  const auto& signature = *static_cast<Signature*>(PyCapsule_GetPointer(capsule, kCapsuleName));
  if (count != static_cast<Py_ssize_t>(signature.parameters.size())) {
    PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", signature.parameters.size(), count);
    return nullptr;
  }
  Bindings bindings;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!fits(signature.parameters[i], arguments[i], bindings)) Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

PyMethodDef accepts_method = {"accepts", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(accepts)),
                              METH_FASTCALL,
                              "accepts(*arguments) -> bool: whether the call surely fits the annotations."};

// ---- Compiling: nested tuples to the structs above. Functions are false, with a Python error set, if they fail. ----

template <class T, class Read>
bool read_each(PyObject* tuple, std::vector<T>& out, Read read) {
  out.resize(PyTuple_GET_SIZE(tuple));
  for (size_t i = 0; i < out.size(); ++i) {
    if (!read(PyTuple_GET_ITEM(tuple, i), out[i])) return false;
  }
  return true;
}

bool require(bool condition, const char* message) {
  if (!condition) PyErr_SetString(PyExc_ValueError, message);
  return condition;
}

bool read_class(PyObject* source, PyTypeObject*& type) {
  type = reinterpret_cast<PyTypeObject*>(source);
  return require(PyType_Check(source), "expected a class");
}

bool read_literal(PyObject* source, PyObject*& literal) {
  literal = source;
  return true;
}

bool read_dtype(PyObject* source, int& dtype) {
  int code, bits;
  if (!PyArg_ParseTuple(source, "ii", &code, &bits)) return false;
  dtype = code << 8 | bits;
  return true;
}

bool read_axis(PyObject* source, Axis& axis) {
  if (!PyArg_ParseTuple(source, "ipL", &axis.kind, &axis.broadcastable, &axis.value)) return false;
  if (axis.kind == Axis::kNamed) return require(axis.value < kMaxNames, "more than 32 names of axes in one signature");
  if (axis.kind == Axis::kNamedRun) return require(axis.value < kMaxRuns, "more than 4 names *name in one signature");
  return true;
}

bool read_pattern(PyObject* source, TensorPattern& pattern) {
  PyObject *dtypes, *axes;
  if (!PyArg_ParseTuple(source, "O!O!", &PyTuple_Type, &dtypes, &PyTuple_Type, &axes)) return false;
  if (!read_each(dtypes, pattern.dtypes, read_dtype) || !read_each(axes, pattern.axes, read_axis)) return false;
  const auto is_run = [](const Axis& axis) { return axis.kind == Axis::kAnyRun || axis.kind == Axis::kNamedRun; };
  const auto run = std::find_if(pattern.axes.begin(), pattern.axes.end(), is_run);
  if (run != pattern.axes.end()) pattern.run = static_cast<int>(run - pattern.axes.begin());
  return true;
}

bool read_parameter(PyObject* source, Parameter& parameter) {
  PyObject *classes, *literals, *patterns;
  return PyArg_ParseTuple(source, "O!O!O!", &PyTuple_Type, &classes, &PyTuple_Type, &literals, &PyTuple_Type,
                          &patterns) &&
         read_each(classes, parameter.classes, read_class) && read_each(literals, parameter.literals, read_literal) &&
         read_each(patterns, parameter.patterns, read_pattern);
}

void delete_signature(PyObject* capsule) {
  delete static_cast<Signature*>(PyCapsule_GetPointer(capsule, kCapsuleName));
}

// A builtin function whose `self` is the capsule that owns the Signature: no type object of our own is needed.
PyObject* compile_signature(PyObject*, PyObject* source) {
  if (!PyTuple_Check(source)) return PyErr_Format(PyExc_TypeError, "expected a tuple of parameters");
  try {
    auto signature = std::make_unique<Signature>();
    if (!read_each(source, signature->parameters, read_parameter)) return nullptr;
    signature->source = source;
    Py_INCREF(source);
    PyObject* capsule = PyCapsule_New(signature.get(), kCapsuleName, delete_signature);
    if (capsule == nullptr) return nullptr;
    signature.release();  // the capsule owns it from here on
    PyObject* function = PyCFunction_New(&accepts_method, capsule);
    Py_DECREF(capsule);  // the function, if there is one, holds it
    return function;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

PyMethodDef methods[] = {
    {"compile_signature", compile_signature, METH_O,
     "compile_signature(parameters: tuple) -> accepts(*arguments) -> bool. See pyattn/_types.py."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

bool add_signature(PyObject* module) { return PyModule_AddFunctions(module, methods) == 0; }

}  // namespace pyattn
