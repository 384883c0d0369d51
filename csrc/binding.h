// What the bindings of all ops share: reading tensors. Part of bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "dtype.h"
#include "huge_pages.h"
#include "operands.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace pyattn {
namespace {

std::string to_string(const int64_t* size, int rank) {
  std::string text = "[";
  for (int d = 0; d < rank; ++d) text += (d == 0 ? "" : ", ") + std::to_string(size[d]);
  return text + "]";
}

void read(py::handle object, const char* name, TensorView& view) {
  if (!is_tensor_like(object.ptr())) {
    throw py::type_error(std::string(name) + " must be a tensor, not " + Py_TYPE(object.ptr())->tp_name);
  }
  if (!view.load(object.ptr())) throw py::error_already_set();
  if (!view.on_cpu()) throw py::value_error(std::string(name) + " is not on the CPU");
}

Dtype floating_dtype(const TensorView& view, const char* name) {
  if (view.has_dtype(dlpack::kDLFloat, 32)) return Dtype::kFloat32;
  if (view.has_dtype(dlpack::kDLBfloat, 16)) return Dtype::kBFloat16;
  if (view.has_dtype(dlpack::kDLFloat, 16)) return Dtype::kFloat16;
  if (view.has_dtype(dlpack::kDLFloat, 64)) return Dtype::kFloat64;
  throw py::type_error(std::string(name) + " must be float32, float64, bfloat16 or float16");
}

Dtype accumulation_dtype(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

// IndexError if there is none; the tuple keeps it.
py::handle item(const py::tuple& tuple, int i) { return tuple[i].ptr(); }

// Whether the elements fill their memory, in the order of the axes.
bool is_dense(const TensorView& view) {
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] != 1 && view.strides[d] != stride) return false;
    stride *= view.shape[d];
  }
  return true;
}

// From this size on glibc's malloc often gives memory fresh from the system, page by page, with a fault and a clearing
// for each. Attention over (256, 12, 64, 64), forward and backward: 440 ms, with huge pages 260; the 62 MB of a
// cross-entropy's gradient: 50 ms, seven times what computing them takes, and 12; the 5 MB of an embedding's: 3.5 ms
// and 0.7 (Zen 3, a virtual machine).
constexpr int64_t kFreshBytes = int64_t{4} << 20;

// To be called for an output before it is written.
void expect_first_write(const TensorView& view) {
  int64_t span = 1;
  for (int d = 0; d < view.ndim; ++d) span += (view.shape[d] - 1) * view.strides[d];
  const int64_t bytes = view.numel() * view.dtype.bits / 8;
  if (span == view.numel() && bytes >= kFreshBytes) prefer_huge_pages(view.data, bytes);
}

}  // namespace
}  // namespace pyattn
