// The Python module pyattn._C: turns tensors into pointers, sizes and strides, and calls the kernels without the GIL.
//
// pyattn's Python layers have checked every call with messages meant for users; the checks here only make sure that no
// argument, from wherever, lets a kernel touch memory that is not its own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "attention.h"
#include "cross_entropy.h"
#include "dispatch.h"
#include "huge_pages.h"
#include "operands.h"
#include "signature.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace pyattn {
namespace {

static_assert(kMaxBatchRank == TensorView::kMaxDims - 3, "every tensor that can be viewed can be attended");

// [*batch, heads, rows, columns]
struct Shape {
  int rank = 0;
  int64_t size[TensorView::kMaxDims];

  Shape() = default;
  Shape(const AttentionProblem& p, int64_t heads, int64_t rows, int64_t columns) : rank(p.batch_rank + 3) {
    for (int d = 0; d < p.batch_rank; ++d) size[d] = p.batch_shape[d];
    size[rank - 3] = heads;
    size[rank - 2] = rows;
    size[rank - 1] = columns;
  }
};

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

// Sets `to`, checking the shape; `broadcast` allows missing leading dimensions and sizes of 1, which get stride 0.
void set_tensor(const TensorView& view, const char* name, const Shape& shape, bool broadcast, Tensor& to) {
  const int missing = shape.rank - view.ndim;
  bool fits = broadcast ? missing >= 0 : missing == 0;
  for (int d = 0; fits && d < view.ndim; ++d) {
    fits = view.shape[d] == shape.size[missing + d] || (broadcast && view.shape[d] == 1);
  }
  if (!fits) {
    throw py::value_error(std::string(name) + " has shape " + to_string(view.shape, view.ndim) +
                          (broadcast ? ", which does not broadcast to " : ", expected ") +
                          to_string(shape.size, shape.rank));
  }
  const auto stride = [&](int d) {
    return d < missing || (broadcast && view.shape[d - missing] == 1) ? 0 : view.strides[d - missing];
  };
  to.data = view.data;
  for (int d = 0; d < shape.rank - 3; ++d) to.batch[d] = stride(d);
  to.head = stride(shape.rank - 3);
  to.row = stride(shape.rank - 2);
  to.col = stride(shape.rank - 1);
}

// A tensor of one of two dtypes.
void bind_float(py::handle object, const char* name, Dtype dtype, Dtype or_dtype, const Shape& shape, bool broadcast,
                TensorView& view, Tensor& to) {
  read(object, name, view);
  to.dtype = floating_dtype(view, name);
  if (to.dtype != dtype && to.dtype != or_dtype)
    throw py::type_error(std::string(name) + " does not have the dtype that goes with q's");
  set_tensor(view, name, shape, broadcast, to);
  // The kernels take a missing pointer for a missing tensor; one of size 0 may have none and is never read.
  static char empty;
  if (to.data == nullptr) to.data = &empty;
}

void bind_float(py::handle object, const char* name, Dtype dtype, const Shape& shape, TensorView& view, Tensor& to) {
  bind_float(object, name, dtype, dtype, shape, false, view, to);
}

// lse and its gradient: [*batch, heads, rows]
void bind_rows(py::handle object, const char* name, const AttentionProblem& p, TensorView& view, Tensor& to) {
  read(object, name, view);
  if (view.ndim < TensorView::kMaxDims) {  // a last dimension of size 1 makes it a matrix like the others
    view.shape[view.ndim] = 1;
    view.strides[view.ndim] = 1;
    ++view.ndim;
  }
  to.dtype = floating_dtype(view, name);
  if (to.dtype != accumulation_dtype(p.q.dtype)) {
    throw py::type_error(std::string(name) + " must be float32, or float64 for float64 inputs");
  }
  set_tensor(view, name, Shape(p, p.Hq, p.L, 1), false, to);
}

// IndexError if there is none; the tuple keeps it.
py::handle item(const py::tuple& tuple, int i) { return tuple[i].ptr(); }

// The op's arguments in the order of its schema: the tuples Operands and AttentionConfig of pyattn/_problem.py. The
// kernels compute what is named here; the others (sinks, windows, lengths, segments, softcap) have been refused.
struct Operands {
  py::handle q, k, v, bias, mask, seed;

  explicit Operands(const py::tuple& t)
      : q(item(t, kQ)),
        k(item(t, kK)),
        v(item(t, kV)),
        bias(item(t, kBias)),
        mask(item(t, kMask)),
        seed(item(t, kSeed)) {}
};
struct Config {
  double scale, dropout_p;
  bool lower_right, causal;
  int64_t prefix;

  explicit Config(const py::tuple& t)
      : scale(t[kScale].cast<double>()),
        dropout_p(t[kDropoutP].cast<double>()),
        lower_right(t[kAlign].cast<int>() == 2),  // LOWER_RIGHT of pyattn/masks.py
        causal(!t[kRight].is_none()),
        prefix(t[kPrefix].cast<int64_t>()) {}
};

// Whether the elements fill their memory, in the order of the axes.
bool is_dense(const TensorView& view) {
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    if (view.shape[d] != 1 && view.strides[d] != stride) return false;
    stride *= view.shape[d];
  }
  return true;
}

// From this size on glibc's malloc may give memory fresh from the system at every call, whatever was freed before. It
// comes page by page, with a fault and a clearing for each. Attention over (256, 12, 64, 64), forward and backward:
// 440 ms, with huge pages 260; the 62 MB of a cross-entropy's gradient: 50 ms, seven times what computing them takes,
// and 12 (Zen 3, a virtual machine).
constexpr int64_t kFreshBytes = int64_t{32} << 20;

// To be called for an output before it is written.
void expect_first_write(const TensorView& view) {
  int64_t span = 1;
  for (int d = 0; d < view.ndim; ++d) span += (view.shape[d] - 1) * view.strides[d];
  const int64_t bytes = view.numel() * view.dtype.bits / 8;
  if (span == view.numel() && bytes >= kFreshBytes) prefer_huge_pages(view.data, bytes);
}

// Keeps what was read until the kernel has returned.
struct ProblemViews {
  TensorView q, k, v, bias, mask, seed;
};

// Fills all of the problem that forward and backward share.
void bind_problem(const Operands& operands, const Config& config, int threads, ProblemViews& views,
                  AttentionProblem& p) {
  read(operands.q, "q", views.q);
  if (views.q.ndim < 3) {
    throw py::value_error("q has shape " + to_string(views.q.shape, views.q.ndim) +
                          ", expected [*batch, q_heads, q_len, head_dim]");
  }
  p.q.dtype = floating_dtype(views.q, "q");
  p.batch_rank = views.q.ndim - 3;
  for (int d = 0; d < p.batch_rank; ++d) p.B *= p.batch_shape[d] = views.q.shape[d];
  p.Hq = views.q.shape[p.batch_rank];
  p.L = views.q.shape[p.batch_rank + 1];
  p.D = views.q.shape[p.batch_rank + 2];
  set_tensor(views.q, "q", Shape(p, p.Hq, p.L, p.D), false, p.q);

  read(operands.v, "v", views.v);
  if (views.v.ndim != views.q.ndim) throw py::value_error("v must have as many dimensions as q");
  p.Hkv = views.v.shape[p.batch_rank];
  p.S = views.v.shape[p.batch_rank + 1];
  p.Dv = views.v.shape[p.batch_rank + 2];
  p.v.dtype = floating_dtype(views.v, "v");
  if (p.v.dtype != p.q.dtype) throw py::type_error("v does not have the dtype of q");
  set_tensor(views.v, "v", Shape(p, p.Hkv, p.S, p.Dv), false, p.v);
  if (p.Hkv == 0 ? p.Hq != 0 : p.Hq % p.Hkv != 0) {
    throw py::value_error("q has " + std::to_string(p.Hq) + " heads, not a multiple of the " + std::to_string(p.Hkv) +
                          " of k and v");
  }
  bind_float(operands.k, "k", p.q.dtype, Shape(p, p.Hkv, p.S, p.D), views.k, p.k);
  if (!operands.bias.is_none()) {
    bind_float(operands.bias, "bias", p.q.dtype, accumulation_dtype(p.q.dtype), Shape(p, p.Hq, p.L, p.S), true,
               views.bias, p.bias);
  }
  if (!operands.mask.is_none()) {
    read(operands.mask, "mask", views.mask);
    if (!views.mask.has_dtype(dlpack::kDLBool, 8)) throw py::type_error("mask must be a bool tensor");
    set_tensor(views.mask, "mask", Shape(p, p.Hq, p.L, p.S), true, p.mask);
  }
  if (!(config.dropout_p >= 0 && config.dropout_p <= 1)) throw py::value_error("dropout_p must be between 0 and 1");
  if (config.dropout_p > 0) {
    if (operands.seed.is_none()) throw py::value_error("dropout needs a seed");
    read(operands.seed, "seed", views.seed);
    if (views.seed.ndim != 0 || !views.seed.has_dtype(dlpack::kDLInt, 64)) {
      throw py::type_error("seed must be an int64 tensor without dimensions");
    }
    p.seed = static_cast<uint64_t>(*views.seed.data_as<int64_t>());
  }
  p.scale = config.scale;
  p.dropout_p = config.dropout_p;
  p.causal = config.causal;
  p.diagonal = config.lower_right ? p.S - p.L : 0;
  p.prefix = config.prefix;
  p.threads = threads > 1 ? threads : 1;
}

void attention_forward(const py::tuple& operands, const py::tuple& config, py::handle out, py::handle lse,
                       int threads) {
  AttentionForward p;
  ProblemViews views;
  TensorView out_view, lse_view;
  bind_problem(Operands(operands), Config(config), threads, views, p);
  bind_float(out, "out", p.q.dtype, Shape(p, p.Hq, p.L, p.Dv), out_view, p.out);
  if (!lse.is_none()) bind_rows(lse, "lse", p, lse_view, p.lse);
  expect_first_write(out_view);
  const AttentionKernels& attention = kernels().attention;
  const py::gil_scoped_release release;
  attention.forward(p);
}

void attention_backward(py::handle dout, py::handle dlse, py::handle out, py::handle lse, const py::tuple& operands,
                        const py::tuple& config, const py::tuple& gradients, int threads) {
  AttentionBackward p;
  ProblemViews views;
  TensorView dout_view, dlse_view, out_view, lse_view, dq_view, dk_view, dv_view, dbias_view;
  bind_problem(Operands(operands), Config(config), threads, views, p);
  const Dtype dtype = p.q.dtype;
  bind_float(dout, "do", dtype, Shape(p, p.Hq, p.L, p.Dv), dout_view, p.dout);
  if (!dlse.is_none()) bind_rows(dlse, "dlse", p, dlse_view, p.dlse);
  bind_float(out, "out", dtype, Shape(p, p.Hq, p.L, p.Dv), out_view, p.out);
  bind_rows(lse, "lse", p, lse_view, p.lse);
  const py::handle dq = item(gradients, 0), dk = item(gradients, 1), dv = item(gradients, 2),
                   dbias = item(gradients, 3);
  bind_float(dq, "dq", dtype, Shape(p, p.Hq, p.L, p.D), dq_view, p.dq);
  bind_float(dk, "dk", dtype, Shape(p, p.Hkv, p.S, p.D), dk_view, p.dk);
  bind_float(dv, "dv", dtype, Shape(p, p.Hkv, p.S, p.Dv), dv_view, p.dv);
  if (!dbias.is_none()) {
    if (p.bias.data == nullptr) throw py::value_error("dbias is given without bias");
    bind_float(dbias, "dbias", p.bias.dtype, p.bias.dtype, Shape(p, p.Hq, p.L, p.S), true, dbias_view, p.dbias);
    bool same = dbias_view.ndim == views.bias.ndim;
    for (int d = 0; same && d < views.bias.ndim; ++d) same = dbias_view.shape[d] == views.bias.shape[d];
    if (!same) throw py::value_error("dbias does not have the shape of bias");
    if (dbias_view.numel() == 0) p.dbias.data = nullptr;
  }
  for (const TensorView* gradient : {&dq_view, &dk_view, &dv_view}) expect_first_write(*gradient);
  const AttentionKernels& attention = kernels().attention;
  const py::gil_scoped_release release;
  attention.backward(p);
}

// ---- Cross-entropy

static_assert(kMaxRowRank == TensorView::kMaxDims - 1, "every tensor that can be viewed can be an input");

// The op's arguments in the order of its schema: the tuples CrossEntropyOperands and CrossEntropyConfig of
// pyattn/_cross_entropy.py.
struct CrossEntropyViews {
  TensorView input, target, weight;
};

// A tensor of the input's shape; `rows_only`: of that shape without the class axis.
void set_rows(const TensorView& view, const char* name, const CrossEntropyProblem& p, bool rows_only, RowTensor& to) {
  const int class_axis = p.row_rank == 0 ? 0 : 1;
  bool fits = view.ndim == p.row_rank + (rows_only ? 0 : 1);
  for (int d = 0, r = 0; fits && d < view.ndim; ++d) {
    if (!rows_only && d == class_axis) {
      fits = view.shape[d] == p.C;
      to.cls = view.strides[d];
    } else {
      fits = view.shape[d] == p.row_shape[r];
      to.row[r++] = view.strides[d];
    }
  }
  if (!fits) throw py::value_error(std::string(name) + " has shape " + to_string(view.shape, view.ndim));
  // One class, or none, may have any stride.
  if (p.C <= 1) to.cls = 1;
  // As for attention: a missing pointer is a missing tensor.
  static char empty;
  to.data = view.data == nullptr ? &empty : view.data;
}

void bind_rows(py::handle object, const char* name, const CrossEntropyProblem& p, bool rows_only, TensorView& view,
               RowTensor& to) {
  read(object, name, view);
  to.dtype = floating_dtype(view, name);
  if (to.dtype != p.input.dtype) throw py::type_error(std::string(name) + " does not have the dtype of input");
  set_rows(view, name, p, rows_only, to);
}

void bind_problem(const py::tuple& operands, const py::tuple& config, int threads, CrossEntropyViews& views,
                  CrossEntropyProblem& p) {
  const py::handle weight = item(operands, 2);
  read(item(operands, 0), "input", views.input);
  if (views.input.ndim == 0) throw py::value_error("input has no class axis");
  p.input.dtype = floating_dtype(views.input, "input");
  p.row_rank = views.input.ndim - 1;
  const int class_axis = p.row_rank == 0 ? 0 : 1;
  p.C = views.input.shape[class_axis];
  for (int d = 0, r = 0; d < views.input.ndim; ++d) {
    if (d != class_axis) p.rows *= p.row_shape[r++] = views.input.shape[d];
  }
  set_rows(views.input, "input", p, false, p.input);

  read(item(operands, 1), "target", views.target);
  p.byte_indices = views.target.has_dtype(dlpack::kDLUInt, 8);
  if (p.byte_indices || views.target.has_dtype(dlpack::kDLInt, 64)) {
    set_rows(views.target, "target", p, true, p.indices);
  } else {
    if (floating_dtype(views.target, "target") != p.input.dtype) {
      throw py::type_error("target does not have the dtype of input");
    }
    p.probabilities.dtype = p.input.dtype;
    set_rows(views.target, "target", p, false, p.probabilities);
  }
  if (!weight.is_none()) {
    read(weight, "weight", views.weight);
    if (floating_dtype(views.weight, "weight") != p.input.dtype) {
      throw py::type_error("weight does not have the dtype of input");
    }
    if (views.weight.ndim != 1 || views.weight.shape[0] != p.C) throw py::value_error("weight is not [classes]");
    p.weight = views.weight.data;
    p.weight_stride = views.weight.strides[0];
  }
  const std::string reduction = config[0].cast<std::string>();
  p.reduction = reduction == "none" ? Reduction::kNone : reduction == "sum" ? Reduction::kSum : Reduction::kMean;
  p.ignore_index = config[1].cast<int64_t>();
  p.label_smoothing = config[2].cast<double>();
  p.threads = threads > 1 ? threads : 1;
}

// The loss, or its gradient: a row's each, or one for all.
void bind_loss(py::handle object, const char* name, const CrossEntropyProblem& p, TensorView& view, RowTensor& to) {
  if (p.reduction == Reduction::kNone) return bind_rows(object, name, p, true, view, to);
  read(object, name, view);
  to.dtype = floating_dtype(view, name);
  if (to.dtype != p.input.dtype || view.ndim != 0) throw py::value_error(std::string(name) + " is not a scalar");
  to.data = view.data;
}

// m or l: a dense row's each, in the compute type.
void* bind_state(py::handle object, const char* name, const CrossEntropyProblem& p, TensorView& view) {
  read(object, name, view);
  bool fits = view.ndim == p.row_rank && floating_dtype(view, name) == accumulation_dtype(p.input.dtype);
  for (int d = 0; fits && d < view.ndim; ++d) fits = view.shape[d] == p.row_shape[d];
  if (!fits || (view.numel() > 0 && !is_dense(view))) {
    throw py::value_error(std::string(name) + " is not a dense tensor of a number per row");
  }
  return view.data;
}

int64_t cross_entropy_forward(const py::tuple& operands, const py::tuple& config, py::handle loss, py::handle m,
                              py::handle l, int threads) {
  CrossEntropyForward p;
  CrossEntropyViews views;
  TensorView loss_view, m_view, l_view;
  bind_problem(operands, config, threads, views, p);
  bind_loss(loss, "loss", p, loss_view, p.loss);
  if (!m.is_none()) {
    p.m = bind_state(m, "m", p, m_view);
    p.l = bind_state(l, "l", p, l_view);
  }
  const CrossEntropyKernels& cross_entropy = kernels().cross_entropy;
  const py::gil_scoped_release release;
  return cross_entropy.forward(p);
}

int64_t cross_entropy_backward(py::handle dloss, py::handle m, py::handle l, const py::tuple& operands,
                               const py::tuple& config, py::handle dinput, int threads) {
  CrossEntropyBackward p;
  CrossEntropyViews views;
  TensorView dloss_view, m_view, l_view, dinput_view;
  bind_problem(operands, config, threads, views, p);
  bind_loss(dloss, "dloss", p, dloss_view, p.dloss);
  p.m = bind_state(m, "m", p, m_view);
  p.l = bind_state(l, "l", p, l_view);
  bind_rows(dinput, "dinput", p, false, dinput_view, p.dinput);
  expect_first_write(dinput_view);
  const CrossEntropyKernels& cross_entropy = kernels().cross_entropy;
  const py::gil_scoped_release release;
  return cross_entropy.backward(p);
}

}  // namespace
}  // namespace pyattn

PYBIND11_MODULE(_C, m) {
  m.doc() = "pyattn's C++ core";
  if (!pyattn::add_signature(m.ptr()) || !pyattn::add_operands(m.ptr())) throw py::error_already_set();

  m.def("attention_forward", &pyattn::attention_forward, py::arg("operands"), py::arg("config"), py::arg("out"),
        py::arg("lse"), py::arg("threads"),
        "Fills out and, unless it is None, lse; see pyattn.reference.attention_forward for what they are.");
  m.def("attention_backward", &pyattn::attention_backward, py::arg("do"), py::arg("dlse"), py::arg("out"),
        py::arg("lse"), py::arg("operands"), py::arg("config"), py::arg("gradients"), py::arg("threads"),
        "Fills gradients, which are (dq, dk, dv, dbias or None); see pyattn.reference.attention_backward.");
  m.def("cross_entropy_forward", &pyattn::cross_entropy_forward, py::arg("operands"), py::arg("config"),
        py::arg("loss"), py::arg("m"), py::arg("l"), py::arg("threads"),
        "Fills loss and, unless they are None, m and l; see pyattn.reference.cross_entropy_forward for what they are. "
        "Returns -1, or the first row whose target is no class, and then has filled nothing.");
  m.def("cross_entropy_backward", &pyattn::cross_entropy_backward, py::arg("dloss"), py::arg("m"), py::arg("l"),
        py::arg("operands"), py::arg("config"), py::arg("dinput"), py::arg("threads"),
        "Fills dinput; see pyattn.reference.cross_entropy_backward. Returns what cross_entropy_forward does.");
  m.def(
      "isa", [] { return std::string(pyattn::kernels().isa); },
      "The kernel variant in use: the best available, or the one that PYATTN_ISA names.");
  m.def("compiled_isas", &pyattn::compiled_isas, "The variants of this build, best first.");
  m.def("available_isas", &pyattn::available_isas, "Those of them that this machine can run, best first.");
}
