// Tensors as the kernels' callers see them: pointer, shape, strides, dtype, device, read from any Python object that
// speaks DLPack.
//
// torch.Tensor publishes a table of C functions in the type attribute __dlpack_c_exchange_api__ (torch >= 2.10);
// reading a tensor through it takes about 40 ns and needs no Torch header, so one binary serves every torch. Objects
// without the table (NumPy arrays) are read through the capsule of their __dlpack__ method, in about 2 us. Needs the
// GIL and the CPython API, nothing else.
#pragma once

#include <Python.h>

#include <cstdint>

namespace pyattn {

// The part of the DLPack 1.x ABI that is used here, under its published names
// (https://dmlc.github.io/dlpack/latest/c_api.html).
namespace dlpack {

enum DLDeviceType : int32_t { kDLCPU = 1 };
enum DLDataTypeCode : uint8_t { kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLComplex = 5, kDLBool = 6 };

struct DLVersion {
  uint32_t major, minor;
};
struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; NULL means contiguous (before DLPack 1.2)
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};
struct DLManagedTensorVersioned {
  DLVersion version;
  void* manager_ctx;
  void (*deleter)(DLManagedTensorVersioned*);
  uint64_t flags;
  DLTensor dl_tensor;
};
struct DLExchangeAPIHeader {
  DLVersion version;
  DLExchangeAPIHeader* prev_api;  // the table of an older major version, or NULL
};
struct DLExchangeAPI {
  DLExchangeAPIHeader header;
  // Makes an uninitialised tensor like `prototype`; 0, or -1 after a call of set_error.
  int (*managed_tensor_allocator)(DLTensor* prototype, DLManagedTensorVersioned** out, void* error_context,
                                  void (*set_error)(void* error_context, const char* kind, const char* message));
  void* managed_tensor_from_py_object_no_sync;
  // Hands a tensor over to a new Python object; 0, or -1 with a Python error set.
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** out_py_object);
  // Fills a DLTensor that borrows from the object; 0, or -1 with a Python error set. The entry may be NULL.
  int (*dltensor_from_py_object_no_sync)(void* py_object, DLTensor* out);
  void* current_work_stream;
};

}  // namespace dlpack

// The exchange table that `type` publishes for DLPack's major version 1, or nullptr (no Python error is left set).
inline const dlpack::DLExchangeAPI* find_exchange_api(PyTypeObject* type) {
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (capsule == nullptr) {
    PyErr_Clear();
    return nullptr;
  }
  constexpr const char* kName = "dlpack_exchange_api";
  dlpack::DLExchangeAPIHeader* header = nullptr;
  if (PyCapsule_IsValid(capsule, kName)) {
    header = static_cast<dlpack::DLExchangeAPIHeader*>(PyCapsule_GetPointer(capsule, kName));
  }
  Py_DECREF(capsule);  // the table itself is static in the library that publishes it
  while (header != nullptr && header->version.major != 1) header = header->prev_api;
  auto* api = reinterpret_cast<const dlpack::DLExchangeAPI*>(header);
  return api != nullptr && api->dltensor_from_py_object_no_sync != nullptr ? api : nullptr;
}

// find_exchange_api, remembered for the few types that occur in practice (Tensor, Parameter); the attribute takes 100
// ns to read.
inline const dlpack::DLExchangeAPI* exchange_api(PyTypeObject* type) {
  struct Slot {
    PyTypeObject* type;
    const dlpack::DLExchangeAPI* api;
  };
  static Slot slots[4];  // guarded by the GIL
  for (Slot& slot : slots) {
    if (slot.type == type) return slot.api;
    if (slot.type != nullptr) continue;
    const dlpack::DLExchangeAPI* api = find_exchange_api(type);
    if (api == nullptr) return nullptr;
    Py_INCREF(type);  // a remembered type must not die: its address could be given to another
    slot = {type, api};
    return api;
  }
  return find_exchange_api(type);
}

// Whether `object` can be read as a tensor at all.
inline bool is_tensor_like(PyObject* object) {
  return exchange_api(Py_TYPE(object)) != nullptr || PyObject_HasAttrString(object, "__dlpack__");
}

// One tensor argument. Shape and strides are copied, because the originals live in the Python object and may change
// once the GIL is released; the data is borrowed, and the caller's reference to the object keeps it alive.
//
// Everything that is no part of DLPack (requires_grad, forward-AD tangents, lazy negation, functorch levels) is
// invisible here and the caller's business.
class TensorView {
 public:
  static constexpr int kMaxDims = 8;

  void* data = nullptr;
  int64_t shape[kMaxDims];
  int64_t strides[kMaxDims];  // in elements
  int ndim = 0;
  dlpack::DLDataType dtype{};
  dlpack::DLDevice device{};

  TensorView() = default;
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;
  ~TensorView() { Py_XDECREF(capsule_); }

  // Reads `object`; false with a Python error set if it cannot be read. To be called once.
  bool load(PyObject* object) {
    dlpack::DLTensor tensor;
    if (const dlpack::DLExchangeAPI* api = exchange_api(Py_TYPE(object))) {
      return api->dltensor_from_py_object_no_sync(object, &tensor) == 0 && copy(tensor);
    }
    return load_capsule(object, tensor) && copy(tensor);
  }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool on_cpu() const { return device.device_type == dlpack::kDLCPU; }
  bool has_dtype(dlpack::DLDataTypeCode code, int bits) const { return dtype.code == code && dtype.bits == bits; }
  template <class T>
  T* data_as() const {
    return static_cast<T*>(data);
  }

 private:
  // The capsule is never marked as consumed, so that its own destructor releases the array with it.
  bool load_capsule(PyObject* object, dlpack::DLTensor& tensor) {
    capsule_ = PyObject_CallMethod(object, "__dlpack__", nullptr);
    if (capsule_ == nullptr) return false;
    if (PyCapsule_IsValid(capsule_, "dltensor")) {
      tensor = static_cast<dlpack::DLManagedTensor*>(PyCapsule_GetPointer(capsule_, "dltensor"))->dl_tensor;
      return true;
    }
    constexpr const char* kVersioned = "dltensor_versioned";
    if (PyCapsule_IsValid(capsule_, kVersioned)) {
      auto* managed = static_cast<dlpack::DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule_, kVersioned));
      if (managed->version.major == 1) {
        tensor = managed->dl_tensor;
        return true;
      }
    }
    PyErr_Format(PyExc_TypeError, "%s.__dlpack__() returned no DLPack 1.x tensor", Py_TYPE(object)->tp_name);
    return false;
  }

  bool copy(const dlpack::DLTensor& tensor) {
    if (tensor.ndim > kMaxDims) {
      PyErr_Format(PyExc_ValueError, "a tensor of %d dimensions: at most %d are supported", tensor.ndim, kMaxDims);
      return false;
    }
    ndim = tensor.ndim;
    dtype = tensor.dtype;
    device = tensor.device;
    int64_t contiguous_stride = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      shape[i] = tensor.shape[i];
      strides[i] = tensor.strides != nullptr ? tensor.strides[i] : contiguous_stride;
      contiguous_stride *= shape[i];
    }
    // Only an empty tensor may have no memory; anything else without it is a tensor in name only (FakeTensor).
    if (tensor.data == nullptr) {
      if (numel() == 0) return true;
      PyErr_SetString(PyExc_RuntimeError, "the tensor has no memory (a FakeTensor or meta tensor?)");
      return false;
    }
    data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    return true;
  }

  PyObject* capsule_ = nullptr;  // owned; only for objects read through __dlpack__
};

}  // namespace pyattn
