// Cross-entropy's tensors as pointers, sizes and strides.

static_assert(kMaxRowRank == TensorView::kMaxDims - 1, "every tensor that can be viewed can be an input");

// The op's arguments in the order of its schema: the tuples CrossEntropyOperands and CrossEntropyConfig of
// pyattn/_cross_entropy.py.
struct CrossEntropyViews {
  TensorView input, target, weight;
};

// A tensor of the input's shape; `rows_only`: of that shape without the class axis.
void set_rows(const TensorView& view, const char* name, const CrossEntropyTargets& p, bool rows_only, RowTensor& to) {
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

void bind_rows(py::handle object, const char* name, const CrossEntropyTargets& p, bool rows_only, TensorView& view,
               RowTensor& to) {
  read(object, name, view);
  to.dtype = floating_dtype(view, name);
  if (to.dtype != p.dtype) throw py::type_error(std::string(name) + " does not have the dtype of input");
  set_rows(view, name, p, rows_only, to);
}

// What is asked of the logits: rows, classes and dtype are set.
void bind_targets(py::handle target, py::handle weight, const py::tuple& config, int threads, CrossEntropyViews& views,
                  CrossEntropyTargets& p) {
  read(target, "target", views.target);
  p.byte_indices = views.target.has_dtype(dlpack::kDLUInt, 8);
  if (p.byte_indices || views.target.has_dtype(dlpack::kDLInt, 64)) {
    set_rows(views.target, "target", p, true, p.indices);
  } else {
    if (floating_dtype(views.target, "target") != p.dtype) {
      throw py::type_error("target does not have the dtype of input");
    }
    p.probabilities.dtype = p.dtype;
    set_rows(views.target, "target", p, false, p.probabilities);
  }
  if (!weight.is_none()) {
    read(weight, "weight", views.weight);
    if (floating_dtype(views.weight, "weight") != p.dtype) {
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

void bind_problem(const py::tuple& operands, const py::tuple& config, int threads, CrossEntropyViews& views,
                  CrossEntropyProblem& p) {
  read(item(operands, 0), "input", views.input);
  if (views.input.ndim == 0) throw py::value_error("input has no class axis");
  p.dtype = p.input.dtype = floating_dtype(views.input, "input");
  p.row_rank = views.input.ndim - 1;
  const int class_axis = p.row_rank == 0 ? 0 : 1;
  p.C = views.input.shape[class_axis];
  for (int d = 0, r = 0; d < views.input.ndim; ++d) {
    if (d != class_axis) p.rows *= p.row_shape[r++] = views.input.shape[d];
  }
  set_rows(views.input, "input", p, false, p.input);
  bind_targets(item(operands, 1), item(operands, 2), config, threads, views, p);
}

// The loss, or its gradient: a row's each, or one for all.
void bind_loss(py::handle object, const char* name, const CrossEntropyTargets& p, TensorView& view, RowTensor& to) {
  if (p.reduction == Reduction::kNone) return bind_rows(object, name, p, true, view, to);
  read(object, name, view);
  to.dtype = floating_dtype(view, name);
  if (to.dtype != p.dtype || view.ndim != 0) throw py::value_error(std::string(name) + " is not a scalar");
  to.data = view.data;
}

// m or l: a dense row's each, in the compute type.
void* bind_state(py::handle object, const char* name, const CrossEntropyTargets& p, TensorView& view) {
  read(object, name, view);
  bool fits = view.ndim == p.row_rank && floating_dtype(view, name) == accumulation_dtype(p.dtype);
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
