// The tensors of linear layer and cross-entropy in one as pointers, sizes and strides.

// The op's arguments in the order of its schema: the tuples LinearCrossEntropyOperands and CrossEntropyConfig of
// pyattn/_linear_cross_entropy.py and _cross_entropy.py; and the gradients of its floating operands but `weight`.
struct LinearCrossEntropyViews : CrossEntropyViews {
  TensorView linear_weight, linear_bias, dinput, dlinear_weight, dlinear_bias;
};

// [rows, features] or [classes, features], or, for the rows of a single sample, [features].
void bind_features(py::handle object, const char* name, int64_t rows, const LinearCrossEntropyProblem& p,
                   TensorView& view, RowTensor& to) {
  read(object, name, view);
  to.dtype = floating_dtype(view, name);
  if (to.dtype != p.dtype) throw py::type_error(std::string(name) + " does not have the dtype of input");
  const int last = view.ndim - 1;
  if (last < 0 || last > 1 || view.shape[last] != p.D || (last == 1 ? view.shape[0] : 1) != rows) {
    throw py::value_error(std::string(name) + " has shape " + to_string(view.shape, view.ndim));
  }
  to.row[0] = last == 1 ? view.strides[0] : 0;
  to.cls = p.D <= 1 ? 1 : view.strides[last];
  static char empty;  // as for attention: a missing pointer is a missing tensor
  to.data = view.data == nullptr ? &empty : view.data;
}

void* bind_classes(py::handle object, const char* name, const LinearCrossEntropyProblem& p, TensorView& view) {
  read(object, name, view);
  if (floating_dtype(view, name) != p.dtype) {
    throw py::type_error(std::string(name) + " does not have the dtype of input");
  }
  if (view.ndim != 1 || view.shape[0] != p.C) throw py::value_error(std::string(name) + " is not [classes]");
  static char empty;
  return view.data == nullptr ? &empty : view.data;
}

void bind_linear_problem(const py::tuple& operands, const py::tuple& config, const py::tuple& gradients, int threads,
                         LinearCrossEntropyViews& views, LinearCrossEntropyProblem& p) {
  read(item(operands, 0), "input", views.input);
  read(item(operands, 1), "linear_weight", views.linear_weight);
  if (views.input.ndim < 1 || views.input.ndim > 2) throw py::value_error("input is not [rows, features]");
  if (views.linear_weight.ndim != 2) throw py::value_error("linear_weight is not [classes, features]");
  p.dtype = floating_dtype(views.input, "input");
  p.row_rank = views.input.ndim - 1;
  if (p.row_rank == 1) p.rows = p.row_shape[0] = views.input.shape[0];
  p.D = views.input.shape[p.row_rank];
  p.C = views.linear_weight.shape[0];
  bind_features(item(operands, 0), "input", p.rows, p, views.input, p.x);
  bind_features(item(operands, 1), "linear_weight", p.C, p, views.linear_weight, p.w);
  bind_targets(item(operands, 2), item(operands, 4), config, threads, views, p);
  if (p.probabilities.data != nullptr) throw py::type_error("target does not hold class indices");
  if (const py::handle bias = item(operands, 3); !bias.is_none()) {
    p.bias = bind_classes(bias, "linear_bias", p, views.linear_bias);
    p.bias_stride = views.linear_bias.strides[0];
  }

  if (const py::handle dinput = item(gradients, 0); !dinput.is_none()) {
    bind_features(dinput, "dinput", p.rows, p, views.dinput, p.dx);
  }
  if (const py::handle dweight = item(gradients, 1); !dweight.is_none()) {
    bind_features(dweight, "dlinear_weight", p.C, p, views.dlinear_weight, p.dw);
    expect_first_write(views.dlinear_weight);
  }
  if (const py::handle dbias = item(gradients, 2); !dbias.is_none()) {
    p.dbias = bind_classes(dbias, "dlinear_bias", p, views.dlinear_bias);
    if (views.dlinear_bias.numel() > 0 && !is_dense(views.dlinear_bias)) {
      throw py::value_error("dlinear_bias is not dense");
    }
  }
}

int64_t linear_cross_entropy_forward(const py::tuple& operands, const py::tuple& config, py::handle loss, py::handle m,
                                     py::handle l, const py::tuple& gradients, int threads) {
  LinearCrossEntropyForward p;
  LinearCrossEntropyViews views;
  TensorView loss_view, m_view, l_view;
  bind_linear_problem(operands, config, gradients, threads, views, p);
  bind_loss(loss, "loss", p, loss_view, p.loss);
  if (!m.is_none()) {
    p.m = bind_state(m, "m", p, m_view);
    p.l = bind_state(l, "l", p, l_view);
  }
  const LinearCrossEntropyKernels& linear_cross_entropy = kernels().linear_cross_entropy;
  const py::gil_scoped_release release;
  return linear_cross_entropy.forward(p);
}

int64_t linear_cross_entropy_backward(py::handle dloss, py::handle m, py::handle l, const py::tuple& operands,
                                      const py::tuple& config, const py::tuple& gradients, int threads) {
  LinearCrossEntropyBackward p;
  LinearCrossEntropyViews views;
  TensorView dloss_view, m_view, l_view;
  bind_linear_problem(operands, config, gradients, threads, views, p);
  bind_loss(dloss, "dloss", p, dloss_view, p.dloss);
  p.m = bind_state(m, "m", p, m_view);
  p.l = bind_state(l, "l", p, l_view);
  const LinearCrossEntropyKernels& linear_cross_entropy = kernels().linear_cross_entropy;
  const py::gil_scoped_release release;
  return linear_cross_entropy.backward(p);
}
