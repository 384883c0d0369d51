// Attention's tensors as pointers, sizes and strides.

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
