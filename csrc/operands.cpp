#include "operands.h"

#include <cmath>

#include "tensor_view.h"

namespace pyattn {
namespace {

// Set once, at import.
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
PyObject* requires_grad_name = nullptr;  // interned
PyObject* is_neg_name = nullptr;

// ---- Plain tensors ----

enum Plain : long { kNotPlain = 0, kPlain = 1, kPlainWithGrad = 2, kPlainError = -1 };

// Whether the memory of `object` tells all there is, and if so, where it is: exactly a Tensor or Parameter, with memory
// of its own (not a level of torch.func or of batched gradients, meta, sparse, or zeros that take no memory), and not
// negated lazily (x.imag of a conjugate), which DLPack does not show.
Plain read_plain(PyObject* object, dlpack::DLTensor& tensor) {
  if (!is_exact_tensor(object)) return kNotPlain;
  PyObject* is_neg = PyObject_CallMethodNoArgs(object, is_neg_name);
  if (is_neg == nullptr) return kPlainError;
  Py_DECREF(is_neg);
  if (is_neg == Py_True) return kNotPlain;
  const dlpack::DLExchangeAPI* api = exchange_api(tensor_type);
  if (api == nullptr || api->dltensor_from_py_object_no_sync(object, &tensor) != 0) {
    PyErr_Clear();
    return kNotPlain;
  }
  bool empty = false;
  for (int i = 0; i < tensor.ndim; ++i) empty |= tensor.shape[i] == 0;
  if (tensor.data == nullptr && !empty) return kNotPlain;
  PyObject* requires_grad = PyObject_GetAttr(object, requires_grad_name);
  if (requires_grad == nullptr) return kPlainError;
  Py_DECREF(requires_grad);
  return requires_grad == Py_True ? kPlainWithGrad : kPlain;
}

PyObject* plain(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  Plain answer = kPlain;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) continue;
    dlpack::DLTensor tensor;
    const Plain one = read_plain(tensors[i], tensor);
    if (one == kPlainError) return nullptr;
    if (one == kNotPlain) return PyLong_FromLong(kNotPlain);
    if (one == kPlainWithGrad) answer = one;
  }
  return PyLong_FromLong(answer);
}

// ---- The operands of attention ----

// Whether `tensor` broadcasts from the right to [*batch, q_heads, q_len, kv_len].
bool broadcasts_to_scores(const dlpack::DLTensor& tensor, const dlpack::DLTensor& q, const dlpack::DLTensor& k) {
  if (tensor.ndim > q.ndim) return false;
  for (int i = 1; i <= tensor.ndim; ++i) {  // from the right
    const int64_t size = tensor.shape[tensor.ndim - i];
    if (size != 1 && size != (i == 1 ? k.shape[k.ndim - 2] : q.shape[q.ndim - i])) return false;
  }
  return true;
}

bool same_dtype(const dlpack::DLTensor& a, const dlpack::DLTensor& b) {
  return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits;
}

bool is_half(const dlpack::DLDataType& dtype) {
  return (dtype.code == dlpack::kDLFloat || dtype.code == dlpack::kDLBfloat) && dtype.bits == 16;
}

bool is_attention_dtype(const dlpack::DLDataType& dtype) {
  return is_half(dtype) || (dtype.code == dlpack::kDLFloat && (dtype.bits == 32 || dtype.bits == 64));
}

// What pyattn/_checks.py:check_attention demands, which writes the message if the answer is no.
bool tensors_fit(const dlpack::DLTensor& q, const dlpack::DLTensor& k, const dlpack::DLTensor& v,
                 const dlpack::DLTensor* bias, const dlpack::DLTensor* mask) {
  const int n = q.ndim;
  if (n < 3 || k.ndim != n || v.ndim != n || !is_attention_dtype(q.dtype)) return false;
  if (!same_dtype(q, k) || !same_dtype(q, v)) return false;
  for (int i = 0; i < n - 3; ++i) {
    if (k.shape[i] != q.shape[i] || v.shape[i] != q.shape[i]) return false;
  }
  const int64_t q_heads = q.shape[n - 3], kv_heads = k.shape[n - 3];
  if (v.shape[n - 3] != kv_heads || v.shape[n - 2] != k.shape[n - 2] || k.shape[n - 1] != q.shape[n - 1]) return false;
  if (kv_heads == 0 ? q_heads != 0 : q_heads % kv_heads != 0) return false;
  if (bias != nullptr) {
    const bool is_float32 = bias->dtype.code == dlpack::kDLFloat && bias->dtype.bits == 32;
    if (!same_dtype(*bias, q) && !(is_half(q.dtype) && is_float32)) return false;
    if (!broadcasts_to_scores(*bias, q, k)) return false;
  }
  return mask == nullptr || (mask->dtype.code == dlpack::kDLBool && broadcasts_to_scores(*mask, q, k));
}

// What _checks.py:check_scale, check_dropout_p and check_supported demand. A scale that only float64 scores have room
// for is left to them.
bool numbers_fit(PyObject* config) {
  const auto number = [&](Number i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(config, i)); };
  const double scale = number(kScale), softcap = number(kSoftcap), dropout_p = number(kDropoutP);
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  PyObject* right = PyTuple_GET_ITEM(config, kRight);
  const bool causal_or_none = right == Py_None || (PyLong_CheckExact(right) && PyObject_Not(right));
  return std::fabs(scale) <= 0x1p127 && softcap == 0 && dropout_p >= 0 && dropout_p <= 1 &&
         PyTuple_GET_ITEM(config, kLeft) == Py_None && causal_or_none;
}

PyObject* attention_ready(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(arguments[0]) || PyTuple_GET_SIZE(arguments[0]) != kOperandCount ||
      !PyTuple_Check(arguments[1]) || PyTuple_GET_SIZE(arguments[1]) != kNumberCount) {
    PyErr_SetString(PyExc_TypeError, "expected the tuples Operands and AttentionConfig");
    return nullptr;
  }
  PyObject *operands = arguments[0], *config = arguments[1];
  if (!numbers_fit(config)) return PyLong_FromLong(kNotPlain);
  Plain answer = kPlain;
  dlpack::DLTensor tensors[kOperandCount];
  const dlpack::DLTensor* present[kOperandCount] = {};
  for (int i = 0; i < kOperandCount; ++i) {
    PyObject* operand = PyTuple_GET_ITEM(operands, i);
    if (operand == Py_None && i > kV) continue;
    if (i == kSinks || i > kMask) return PyLong_FromLong(kNotPlain);
    const Plain one = read_plain(operand, tensors[i]);
    if (one == kPlainError) return nullptr;
    const dlpack::DLDevice &device = tensors[i].device, &of_q = tensors[kQ].device;
    if (one == kNotPlain || device.device_type != of_q.device_type || device.device_id != of_q.device_id) {
      return PyLong_FromLong(kNotPlain);
    }
    if (one == kPlainWithGrad) answer = one;
    present[i] = &tensors[i];
  }
  const bool fit = tensors_fit(tensors[kQ], tensors[kK], tensors[kV], present[kBias], present[kMask]);
  return PyLong_FromLong(fit ? answer : kNotPlain);
}

// ---- The operands of the embedding bag ----

bool is_int(const dlpack::DLTensor& tensor) {
  return tensor.dtype.code == dlpack::kDLInt && (tensor.dtype.bits == 64 || tensor.dtype.bits == 32);
}

bool same_shape(const dlpack::DLTensor& a, const dlpack::DLTensor& b) {
  bool same = a.ndim == b.ndim;
  for (int i = 0; same && i < a.ndim; ++i) same = a.shape[i] == b.shape[i];
  return same;
}

// What pyattn/_checks.py:check_embedding_bag demands of the tensors, which writes the message if the answer is no.
bool bags_fit(const dlpack::DLTensor* const* tensors, bool last_offset) {
  const dlpack::DLTensor &weight = *tensors[kTable], &input = *tensors[kIds];
  const dlpack::DLTensor *offsets = tensors[kOffsets], *w = tensors[kTokenWeights], *mask = tensors[kTokenMask];
  const dlpack::DLTensor* lengths = tensors[kBagLengths];
  if (weight.ndim != 2 || !is_attention_dtype(weight.dtype) || weight.shape[0] > INT32_MAX || !is_int(input)) {
    return false;
  }
  if (input.ndim != (offsets == nullptr ? 2 : 1) || input.shape[0] > INT32_MAX) return false;
  if (offsets == nullptr ? last_offset : !is_int(*offsets) || offsets->ndim != 1 || offsets->shape[0] < last_offset) {
    return false;
  }
  if (w != nullptr && !(same_dtype(*w, weight) && same_shape(*w, input))) return false;
  if (mask != nullptr && !(mask->dtype.code == dlpack::kDLBool && same_shape(*mask, input))) return false;
  return lengths == nullptr ||
         (offsets == nullptr && is_int(*lengths) && lengths->ndim == 1 && lengths->shape[0] == input.shape[0]);
}

// The same of the scalars. (`mode` is one of the three, but for the maximum not everything is defined.)
bool bag_scalars_fit(PyObject* config, int64_t rows, bool weighted) {
  const auto scalar = [&](BagScalar i) { return PyTuple_GET_ITEM(config, i); };
  const bool is_max = PyUnicode_Check(scalar(kMode)) && PyUnicode_CompareWithASCIIString(scalar(kMode), "max") == 0;
  if (is_max && (weighted || scalar(kScaleByFrequency) == Py_True)) return false;
  const double dropout_p = PyFloat_AsDouble(scalar(kBagDropoutP));
  const int64_t padding_idx = scalar(kPaddingIdx) == Py_None ? -1 : PyLong_AsLongLong(scalar(kPaddingIdx));
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  if (scalar(kPaddingIdx) != Py_None && (padding_idx < 0 || padding_idx >= rows)) return false;
  return dropout_p >= 0 && dropout_p <= 1;
}

PyObject* embedding_bag_ready(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyTuple_Check(arguments[0]) || PyTuple_GET_SIZE(arguments[0]) != kBagOperandCount ||
      !PyTuple_Check(arguments[1]) || PyTuple_GET_SIZE(arguments[1]) != kBagScalarCount) {
    PyErr_SetString(PyExc_TypeError, "expected the tuples EmbeddingBagOperands and EmbeddingBagConfig");
    return nullptr;
  }
  PyObject *operands = arguments[0], *config = arguments[1];
  Plain answer = kPlain;
  dlpack::DLTensor tensors[kBagOperandCount];
  const dlpack::DLTensor* present[kBagOperandCount] = {};
  for (int i = 0; i < kBagSeed; ++i) {
    PyObject* operand = PyTuple_GET_ITEM(operands, i);
    if (operand == Py_None && i > kIds) continue;
    const Plain one = read_plain(operand, tensors[i]);
    if (one == kPlainError) return nullptr;
    const dlpack::DLDevice &device = tensors[i].device, &of_table = tensors[kTable].device;
    if (one == kNotPlain || device.device_type != of_table.device_type || device.device_id != of_table.device_id) {
      return PyLong_FromLong(kNotPlain);
    }
    if (one == kPlainWithGrad) answer = one;
    present[i] = &tensors[i];
  }
  const bool fit = bags_fit(present, PyTuple_GET_ITEM(config, kIncludeLastOffset) == Py_True) &&
                   bag_scalars_fit(config, tensors[kTable].shape[0], present[kTokenWeights] != nullptr);
  return PyLong_FromLong(fit ? answer : kNotPlain);
}

// ---- Allocation ----

void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

// Through DLPack's allocator, 1.1 us; torch.empty(q.shape[:-1], dtype=...) takes 4, most of it to parse its arguments.
PyObject* allocate(const dlpack::DLExchangeAPI* api, dlpack::DLTensor& like) {
  like.strides = nullptr;
  dlpack::DLManagedTensorVersioned* tensor = nullptr;
  void* object = nullptr;
  if (api->managed_tensor_allocator(&like, &tensor, nullptr, set_error) != 0) return nullptr;
  if (api->managed_tensor_to_py_object_no_sync(tensor, &object) != 0) {
    tensor->deleter(tensor);
    return nullptr;
  }
  return static_cast<PyObject*>(object);
}

const dlpack::DLExchangeAPI* read_prototype(PyObject* object, dlpack::DLTensor& tensor) {
  const dlpack::DLExchangeAPI* api = exchange_api(Py_TYPE(object));
  if (api == nullptr) {
    PyErr_Format(PyExc_TypeError, "expected a torch.Tensor, got %s", Py_TYPE(object)->tp_name);
    return nullptr;
  }
  return api->dltensor_from_py_object_no_sync(object, &tensor) == 0 ? api : nullptr;
}

PyObject* empty_rows(PyObject*, PyObject* q) {
  dlpack::DLTensor like;
  const dlpack::DLExchangeAPI* api = read_prototype(q, like);
  if (api == nullptr) return nullptr;
  if (like.ndim == 0) return PyErr_Format(PyExc_ValueError, "q has no dimensions");
  like.ndim -= 1;
  like.dtype = {dlpack::kDLFloat, static_cast<uint8_t>(like.dtype.bits == 64 ? 64 : 32), 1};
  return allocate(api, like);
}

PyObject* empty_matrix(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) return PyErr_Format(PyExc_TypeError, "expected a tensor and two sizes");
  dlpack::DLTensor like;
  const dlpack::DLExchangeAPI* api = read_prototype(arguments[0], like);
  int64_t shape[2] = {PyLong_AsLongLong(arguments[1]), PyLong_AsLongLong(arguments[2])};
  if (api == nullptr || PyErr_Occurred()) return nullptr;
  like.ndim = 2;
  like.shape = shape;
  return allocate(api, like);
}

PyMethodDef methods[] = {
    {"plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(plain)), METH_FASTCALL,
     "plain(*tensors) -> int: 0 if the memory of one does not tell all there is to it (a subclass, a lazy negation), 2 "
     "if one requires grad, else 1."},
    {"attention_ready", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(attention_ready)), METH_FASTCALL,
     "attention_ready(operands, config) -> int: as plain(*operands), and 0 as well if _problem.check would raise."},
    {"embedding_bag_ready", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(embedding_bag_ready)),
     METH_FASTCALL,
     "embedding_bag_ready(operands, config) -> int: as plain(*operands), and 0 as well if _embedding_bag.check would "
     "raise."},
    {"empty_matrix", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(empty_matrix)), METH_FASTCALL,
     "empty_matrix(like, rows, columns) -> Tensor: uninitialised, of like's dtype."},
    {"empty_rows", empty_rows, METH_O, "empty_rows(q) -> Tensor: uninitialised, one element per query."},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject* import_type(const char* module_name, const char* name) {
  PyObject* module = PyImport_ImportModule(module_name);
  if (module == nullptr) return nullptr;
  PyObject* type = PyObject_GetAttrString(module, name);
  Py_DECREF(module);
  return reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace

bool is_exact_tensor(PyObject* object) { return Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type; }

bool add_operands(PyObject* module) {
  tensor_type = import_type("torch", "Tensor");
  if (tensor_type == nullptr) return false;
  parameter_type = import_type("torch.nn", "Parameter");
  if (parameter_type == nullptr) return false;
  requires_grad_name = PyUnicode_InternFromString("requires_grad");
  is_neg_name = PyUnicode_InternFromString("is_neg");
  return requires_grad_name != nullptr && is_neg_name != nullptr && PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace pyattn
