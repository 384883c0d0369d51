// The LSTM's tensors as pointers, sizes and strides.

// The op's tensors in the order of its schema: the tuple LstmOperands of pyattn/_lstm.py.
struct LstmViews {
  TensorView input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, lengths;
};

// A tensor of the input's dtype and of the shape `shape`.
void set_step_tensor(const TensorView& view, const char* name, Dtype dtype, std::initializer_list<int64_t> shape,
                     StepTensor& to) {
  to.dtype = floating_dtype(view, name);
  if (to.dtype != dtype) throw py::type_error(std::string(name) + " does not have the dtype of input");
  const int rank = static_cast<int>(shape.size());
  bool fits = view.ndim == rank;
  for (int d = 0; fits && d < rank; ++d) fits = view.shape[d] == shape.begin()[d];
  if (!fits) {
    throw py::value_error(std::string(name) + " has shape " + to_string(view.shape, view.ndim) + ", expected " +
                          to_string(shape.begin(), rank));
  }
  to.row = view.strides[0];
  if (rank == 3) to.step = view.strides[1];
  // One unit, or none, may have any stride.
  if (rank > 1) to.unit = view.shape[rank - 1] <= 1 ? 1 : view.strides[rank - 1];
  // As for attention: a missing pointer is a missing tensor.
  static char empty;
  to.data = view.data == nullptr ? &empty : view.data;
}

// The same of an object; None leaves `to` absent.
void bind_step_tensor(py::handle object, const char* name, Dtype dtype, std::initializer_list<int64_t> shape,
                      TensorView& view, StepTensor& to) {
  if (object.is_none()) return;
  read(object, name, view);
  set_step_tensor(view, name, dtype, shape, to);
}

void bind_lstm_problem(const py::tuple& operands, bool reverse, int threads, LstmViews& views, LstmProblem& p) {
  read(item(operands, 0), "input", views.input);
  read(item(operands, 4), "weight_hh", views.weight_hh);
  if (views.input.ndim != 3) throw py::value_error("input is not [batch, seq, features]");
  if (views.weight_hh.ndim != 2) throw py::value_error("weight_hh is not [4 * hidden, hidden]");
  p.batch = views.input.shape[0];
  p.seq = views.input.shape[1];
  p.features = views.input.shape[2];
  p.hidden = views.weight_hh.shape[1];
  p.reverse = reverse;
  p.threads = threads > 1 ? threads : 1;

  const Dtype dtype = floating_dtype(views.input, "input");
  const int64_t gates = 4 * p.hidden;
  set_step_tensor(views.input, "input", dtype, {p.batch, p.seq, p.features}, p.input);
  set_step_tensor(views.weight_hh, "weight_hh", dtype, {gates, p.hidden}, p.weight_hh);
  bind_step_tensor(item(operands, 1), "h0", dtype, {p.batch, p.hidden}, views.h0, p.h0);
  bind_step_tensor(item(operands, 2), "c0", dtype, {p.batch, p.hidden}, views.c0, p.c0);
  bind_step_tensor(item(operands, 3), "weight_ih", dtype, {gates, p.features}, views.weight_ih, p.weight_ih);
  bind_step_tensor(item(operands, 5), "bias_ih", dtype, {gates}, views.bias_ih, p.bias_ih);
  bind_step_tensor(item(operands, 6), "bias_hh", dtype, {gates}, views.bias_hh, p.bias_hh);
  if (p.weight_ih.data == nullptr) throw py::type_error("weight_ih is missing");
  if (const py::handle lengths = item(operands, 7); !lengths.is_none()) {
    read(lengths, "lengths", views.lengths);
    if (!views.lengths.has_dtype(dlpack::kDLInt, 64)) throw py::type_error("lengths must be int64");
    if (views.lengths.ndim != 1 || views.lengths.shape[0] != p.batch) throw py::value_error("lengths is not [batch]");
    p.lengths = views.lengths.data_as<const int64_t>();
    p.lengths_stride = views.lengths.strides[0];
  }
}

// The memory of `saved`, which has room for every step of every sample.
void* bind_saved(py::handle object, const LstmProblem& p, TensorView& view) {
  read(object, "saved", view);
  const Dtype dtype = floating_dtype(view, "saved");
  const int64_t units = (p.hidden + kSavedUnits - 1) / kSavedUnits * kSavedUnits;
  if (dtype != accumulation_dtype(p.input.dtype) || view.ndim != 2 || view.shape[0] != p.batch * p.seq ||
      view.shape[1] != 5 * units || (view.numel() > 0 && !is_dense(view))) {
    throw py::value_error("saved is not a dense tensor [batch * seq, 5 * whole units]");
  }
  return view.data;
}

int64_t lstm_forward(const py::tuple& operands, bool reverse, py::handle output, py::handle h_n, py::handle c_n,
                     py::handle saved, int threads) {
  LstmForward p;
  LstmViews views;
  TensorView output_view, h_n_view, c_n_view, saved_view;
  bind_lstm_problem(operands, reverse, threads, views, p);
  bind_step_tensor(output, "output", p.input.dtype, {p.batch, p.seq, p.hidden}, output_view, p.output);
  bind_step_tensor(h_n, "h_n", p.input.dtype, {p.batch, p.hidden}, h_n_view, p.h_n);
  bind_step_tensor(c_n, "c_n", p.input.dtype, {p.batch, p.hidden}, c_n_view, p.c_n);
  if (p.output.data == nullptr || p.h_n.data == nullptr || p.c_n.data == nullptr) {
    throw py::type_error("output, h_n and c_n must be tensors");
  }
  if (!saved.is_none()) {
    p.saved = bind_saved(saved, p, saved_view);
    expect_first_write(saved_view);
  }
  const LstmKernels& lstm = kernels().lstm;
  const py::gil_scoped_release release;
  return lstm.forward(p);
}

int64_t lstm_backward(py::handle doutput, py::handle dh_n, py::handle dc_n, py::handle saved, const py::tuple& operands,
                      bool reverse, const py::tuple& gradients, int threads) {
  LstmBackward p;
  LstmViews views;
  TensorView doutput_view, dh_n_view, dc_n_view, saved_view, gradient_views[6];
  bind_lstm_problem(operands, reverse, threads, views, p);
  const Dtype dtype = p.input.dtype;
  const int64_t gates = 4 * p.hidden;
  bind_step_tensor(doutput, "doutput", dtype, {p.batch, p.seq, p.hidden}, doutput_view, p.doutput);
  bind_step_tensor(dh_n, "dh_n", dtype, {p.batch, p.hidden}, dh_n_view, p.dh_n);
  bind_step_tensor(dc_n, "dc_n", dtype, {p.batch, p.hidden}, dc_n_view, p.dc_n);
  p.saved = bind_saved(saved, p, saved_view);
  bind_step_tensor(item(gradients, 0), "dinput", dtype, {p.batch, p.seq, p.features}, gradient_views[0], p.dinput);
  bind_step_tensor(item(gradients, 1), "dh0", dtype, {p.batch, p.hidden}, gradient_views[1], p.dh0);
  bind_step_tensor(item(gradients, 2), "dc0", dtype, {p.batch, p.hidden}, gradient_views[2], p.dc0);
  bind_step_tensor(item(gradients, 3), "dweight_ih", dtype, {gates, p.features}, gradient_views[3], p.dweight_ih);
  bind_step_tensor(item(gradients, 4), "dweight_hh", dtype, {gates, p.hidden}, gradient_views[4], p.dweight_hh);
  bind_step_tensor(item(gradients, 5), "dbias", dtype, {gates}, gradient_views[5], p.dbias);
  if (p.dinput.data == nullptr || p.dweight_ih.data == nullptr || p.dweight_hh.data == nullptr) {
    throw py::type_error("dinput, dweight_ih and dweight_hh must be tensors");
  }
  expect_first_write(gradient_views[0]);
  const LstmKernels& lstm = kernels().lstm;
  const py::gil_scoped_release release;
  return lstm.backward(p);
}
