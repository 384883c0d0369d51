// The embedding bag's tensors as pointers, sizes and strides.

struct EmbeddingBagViews {
  TensorView weight, input, offsets, w, mask, lengths, seed;
};

void bind_bag_matrix(py::handle object, const char* name, int64_t rows, const EmbeddingBagProblem& p, TensorView& view,
                     BagMatrix& to) {
  read(object, name, view);
  to.dtype = floating_dtype(view, name);
  if (to.dtype != p.weight.dtype) throw py::type_error(std::string(name) + " does not have the dtype of weight");
  if (view.ndim != 2 || view.shape[0] != rows || view.shape[1] != p.E) {
    throw py::value_error(std::string(name) + " has shape " + to_string(view.shape, view.ndim));
  }
  to.data = view.data;
  to.row = view.strides[0];
  to.col = p.E <= 1 ? 1 : view.strides[1];
}

// Something of the shape of the ids.
void bind_tokens(const TensorView& view, const char* name, const EmbeddingBagViews& views, BagTokens& to) {
  bool fits = view.ndim == views.input.ndim;
  for (int d = 0; fits && d < view.ndim; ++d) fits = view.shape[d] == views.input.shape[d];
  if (!fits) throw py::value_error(std::string(name) + " has shape " + to_string(view.shape, view.ndim));
  static char empty;  // as for attention: a missing pointer is a missing tensor
  to.data = view.data == nullptr ? &empty : view.data;
  to.bag = view.ndim == 2 ? view.strides[0] : 0;
  to.token = view.strides[view.ndim - 1];
}

bool is_wide(const TensorView& view, const char* name) {
  if (view.has_dtype(dlpack::kDLInt, 64)) return true;
  if (view.has_dtype(dlpack::kDLInt, 32)) return false;
  throw py::type_error(std::string(name) + " must be int64 or int32");
}

void bind_integers(py::handle object, const char* name, TensorView& view, BagIntegers& to) {
  read(object, name, view);
  if (view.ndim != 1) throw py::value_error(std::string(name) + " is not one-dimensional");
  static char empty;
  to = {view.data == nullptr ? &empty : view.data, is_wide(view, name), view.strides[0]};
}

void bind_bags(const py::tuple& operands, const py::tuple& config, EmbeddingBagViews& views, EmbeddingBagProblem& p) {
  read(item(operands, kTable), "weight", views.weight);
  if (views.weight.ndim != 2) throw py::value_error("weight is not two-dimensional");
  p.V = views.weight.shape[0], p.E = views.weight.shape[1];
  p.weight = {views.weight.data, floating_dtype(views.weight, "weight"), views.weight.strides[0],
              p.E <= 1 ? 1 : views.weight.strides[1]};
  read(item(operands, kIds), "input", views.input);
  const py::handle offsets = item(operands, kOffsets), w = item(operands, kTokenWeights),
                   mask = item(operands, kTokenMask);
  const py::handle lengths = item(operands, kBagLengths), seed = item(operands, kBagSeed);
  const std::string mode = config[kMode].cast<std::string>();
  p.mode = mode == "sum" ? BagMode::kSum : mode == "max" ? BagMode::kMax : BagMode::kMean;
  p.has_padding = !config[kPaddingIdx].is_none();
  p.padding_idx = p.has_padding ? config[kPaddingIdx].cast<int64_t>() : 0;
  p.last_offset = config[kIncludeLastOffset].cast<bool>();
  p.scale_by_frequency = config[kScaleByFrequency].cast<bool>();
  p.dropout_p = config[kBagDropoutP].cast<double>();

  const int rank = offsets.is_none() ? 2 : 1;
  if (views.input.ndim != rank) throw py::value_error("input does not have the dimensions that offsets ask for");
  p.wide_ids = is_wide(views.input, "input");
  bind_tokens(views.input, "input", views, p.ids);
  p.tokens = views.input.shape[rank - 1];
  if (rank == 1) {
    bind_integers(offsets, "offsets", views.offsets, p.offsets);
    p.bags = views.offsets.shape[0] - (p.last_offset ? 1 : 0);
    if (p.bags < 0) throw py::value_error("offsets is empty");
  } else {
    p.bags = views.input.shape[0];
  }
  if (!w.is_none()) {
    read(w, "per_sample_weights", views.w);
    if (floating_dtype(views.w, "per_sample_weights") != p.weight.dtype) {
      throw py::type_error("per_sample_weights does not have the dtype of weight");
    }
    bind_tokens(views.w, "per_sample_weights", views, p.w);
  }
  if (!mask.is_none()) {
    read(mask, "mask", views.mask);
    if (!views.mask.has_dtype(dlpack::kDLBool, 8)) throw py::type_error("mask must be bool");
    bind_tokens(views.mask, "mask", views, p.mask);
  }
  if (!lengths.is_none()) {
    bind_integers(lengths, "lengths", views.lengths, p.lengths);
    if (rank != 2 || views.lengths.shape[0] != p.bags) throw py::value_error("lengths is not [bags]");
  }
  if (p.dropout_p > 0) {
    read(seed, "seed", views.seed);
    if (!views.seed.has_dtype(dlpack::kDLInt, 64) || views.seed.ndim != 0) {
      throw py::type_error("seed must be a 0-d int64 tensor");
    }
    p.seed = *views.seed.data_as<uint64_t>();
  }
  // A term keeps both in 32 bits, and the ids of maxima are int32.
  if (p.V > INT32_MAX || p.bags > INT32_MAX) throw py::value_error("more than 2^31 - 1 rows or bags");
}

void bind_threads(int threads, EmbeddingBagProblem& p) { p.threads = threads > 1 ? threads : 1; }

// The ids of the maxima: dense, [bags, E].
int32_t* bind_largest(py::handle object, const EmbeddingBagProblem& p, TensorView& view) {
  if (object.is_none() || p.mode != BagMode::kMax) return nullptr;
  read(object, "largest", view);
  const bool fits = view.ndim == 2 && view.shape[0] == p.bags && view.shape[1] == p.E;
  if (!fits || !view.has_dtype(dlpack::kDLInt, 32) || (view.numel() > 0 && !is_dense(view))) {
    throw py::value_error("largest is not a dense int32 [bags, E]");
  }
  static int32_t empty;
  if (view.numel() == 0) return &empty;
  return view.data_as<int32_t>();
}

int64_t embedding_bag_forward(const py::tuple& operands, const py::tuple& config, py::handle out, py::handle largest,
                              int threads) {
  EmbeddingBagForward p;
  EmbeddingBagViews views;
  TensorView out_view, largest_view;
  bind_bags(operands, config, views, p);
  bind_threads(threads, p);
  bind_bag_matrix(out, "out", p.bags, p, out_view, p.out);
  p.largest = bind_largest(largest, p, largest_view);
  const EmbeddingBagKernels& embedding_bag = kernels().embedding_bag;
  const py::gil_scoped_release release;
  return embedding_bag.forward(p);
}

// The terms of a problem, transposed, in memory of their own.
struct BagTerms {
  EmbeddingBagTerms terms;
  int64_t bad_bag = -1;
  int64_t V, bags;
  Dtype dtype;
  std::unique_ptr<char[]> memory;

  BagTerms(const py::tuple& operands, const py::tuple& config) {
    EmbeddingBagProblem p;
    EmbeddingBagViews views;
    bind_bags(operands, config, views, p);
    V = p.V, bags = p.bags, dtype = p.weight.dtype;
    terms.capacity = p.offsets.data != nullptr ? p.tokens : p.bags * p.tokens;
    memory.reset(new char[static_cast<size_t>(2 * terms.capacity * kBagTermBytes)]);
    terms.memory = memory.get();
    const EmbeddingBagKernels& embedding_bag = kernels().embedding_bag;
    const py::gil_scoped_release release;
    bad_bag = embedding_bag.transpose(p, terms);
  }
};

void embedding_bag_backward(const BagTerms& terms, py::handle dout, py::handle largest, const py::tuple& operands,
                            const py::tuple& config, py::handle dweight, py::handle row_ids, int threads) {
  EmbeddingBagBackward p;
  EmbeddingBagViews views;
  TensorView dout_view, largest_view, dweight_view, row_ids_view;
  bind_bags(operands, config, views, p);
  bind_threads(threads, p);
  if (terms.bad_bag >= 0 || terms.V != p.V || terms.bags != p.bags || terms.dtype != p.weight.dtype) {
    throw py::value_error("terms are of another problem");
  }
  p.terms = terms.terms;
  bind_bag_matrix(dout, "dout", p.bags, p, dout_view, p.dout);
  p.largest = bind_largest(largest, p, largest_view);
  if (p.mode == BagMode::kMax && p.largest == nullptr) throw py::value_error("largest is missing");
  p.sparse = !row_ids.is_none();
  bind_bag_matrix(dweight, "dweight", p.sparse ? p.terms.rows : p.V, p, dweight_view, p.dweight);
  expect_first_write(dweight_view);
  if (p.sparse) {
    BagIntegers ids;
    bind_integers(row_ids, "row_ids", row_ids_view, ids);
    if (!ids.wide || row_ids_view.shape[0] != p.terms.rows || !is_dense(row_ids_view)) {
      throw py::value_error("row_ids is not a dense int64 [rows]");
    }
    p.row_ids = row_ids_view.data_as<int64_t>();
  }
  const EmbeddingBagKernels& embedding_bag = kernels().embedding_bag;
  const py::gil_scoped_release release;
  embedding_bag.backward(p);
}

int64_t embedding_bag_weights_backward(py::handle dout, const py::tuple& operands, const py::tuple& config,
                                       py::handle dw, int threads) {
  EmbeddingBagBackward p;
  EmbeddingBagViews views;
  TensorView dout_view, dw_view;
  bind_bags(operands, config, views, p);
  bind_threads(threads, p);
  bind_bag_matrix(dout, "dout", p.bags, p, dout_view, p.dout);
  read(dw, "dw", dw_view);
  if (floating_dtype(dw_view, "dw") != p.weight.dtype) throw py::type_error("dw does not have the dtype of weight");
  bind_tokens(dw_view, "dw", views, p.dw);
  const EmbeddingBagKernels& embedding_bag = kernels().embedding_bag;
  const py::gil_scoped_release release;
  return embedding_bag.weights_backward(p);
}
