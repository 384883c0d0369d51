// Linear layer and cross-entropy in one: the logits are made, used and forgotten in chunks of rows.
//
//   for each chunk of rows that count:
//     for each block of classes:  logits = x W^T + bias, and the online softmax of the block
//     per row:                    m, l and the loss, of all blocks
//     for each block of classes:  g = the logits' gradient;  dx += g W,  dw += g^T x,  dbias += sums of g
//
// Rows that are ignored are in no chunk. With gradients a chunk's logits are kept between the two loops; the backward,
// which has m and l from the forward, makes each block anew in the second loop and needs no first.
//
// Threads share blocks, of which everything but dx is made by one thread alone. dx is summed up by segments of blocks,
// which are then added in their order, so every sum has one order whatever the number of threads.

// Rows of a chunk, at most: a sum of dw is that long before it is added to the rest. A multiple of kMR; x, which all
// blocks read in slabs of kSlab features, and a block of the gradient then stay in an L2 cache of 512 KB.
constexpr int64_t kChunkRows = 42 * kMR;

// Classes of a block: whole units of packing, whole groups of kMR.
constexpr int64_t kBlockClasses = 6 * kUnit;

// Blocks in a segment.
constexpr int64_t kSegmentBlocks = 8;

// What a chunk's logits may take: beyond 130,000 classes they are fewer rows for it, and W is packed more often.
constexpr int64_t kLogitsBytes = int64_t{40} << 20;

// Products are made in slabs of this depth, of which a panel (16 KB with AVX2) stays in the L1 cache for all rows.
constexpr int64_t kSlab = 2 * kMaxDepth;

// A matrix that is read element by element, in groups of kMR rows.
template <class T>
struct LeftMatrix {
  const T* data;
  int64_t group, row, col;
};
template <class T>
PYATTN_INLINE LeftMatrix<T> row_major(const T* data, int64_t ld) {
  return {data, kMR * ld, ld, 1};
}

// c[rows][columns] = (accumulate ? c : 0) + a b, b in panels [panel][depth][kPanel]; columns is a multiple of the
// vector.
template <class T>
void multiply_packed(int64_t rows, const LeftMatrix<T>& a, const T* b, int64_t depth, int64_t columns, T* c,
                     int64_t ldc, bool accumulate) {
  // One pass even for a depth of 0, which makes zeros.
  for (int64_t slab = 0; slab == 0 || slab < depth; slab += kSlab) {
    const int64_t end = smaller(slab + kSlab, depth);
    for (int64_t n = 0; n < columns; n += kPanel<T>) {
      const int vectors = static_cast<int>(smaller<int64_t>((columns - n) / kWidth<T>, kNV));
      for (int64_t k = slab; k == slab || k < end; k += kMaxDepth) {
        const T* panel = b + n * depth + k * kPanel<T>;
        for (int64_t i = 0; i < rows; i += kMR) {
          const int count = static_cast<int>(smaller<int64_t>(rows - i, kMR));
          tile_of<T>(count, vectors)(a.data + i / kMR * a.group + k * a.col, a.row, a.col, panel, kPanel<T>,
                                     c + i * ldc + n, ldc, smaller(end - k, kMaxDepth), accumulate || k > 0);
        }
      }
    }
  }
}

// Rows in panels [panel][rows][kPanel], zeros from `columns` to the next whole vector.
template <class T>
void pack_panels(const Matrix& from, int64_t first, int64_t rows, int64_t columns, T* to) {
  with_storage<T>(from.dtype, from.data, [&](const auto* data) {
    for (int64_t i = 0; i < rows; ++i) {
      for_each_vector<T>(data + (first + i) * from.row, from.col, columns, [&](int64_t c, Vec<T> x) {
        store(to + (c / kPanel<T> * rows + i) * kPanel<T> + c % kPanel<T>, x);
      });
    }
  });
}

// The transpose of rows, ld apart, of a block of n columns as a left matrix: groups [group][rows][kMR]. What is copied
// beyond kMR is overwritten by what comes next; `to` has room for a vector more.
template <class T>
LeftMatrix<T> pack_left_transposed(const T* from, int64_t ld, int64_t rows, int64_t n, T* to) {
  T* next = to;
  for (int64_t c = 0; c < n; c += kMR) {
    for (int64_t i = 0; i < rows; ++i, next += kMR) {
      for (int k = 0; k < kMR; k += kWidth<T>) store(next + k, load(from + i * ld + c + k));
    }
  }
  return {to, rows * kMR, 1, kMR};
}

inline Matrix as_matrix(const RowTensor& tensor) {
  return {static_cast<char*>(tensor.data), tensor.row[0], tensor.cls, tensor.dtype};
}
template <class T>
PYATTN_INLINE Matrix as_matrix(T* data, int64_t ld) {
  return {reinterpret_cast<char*>(data), ld, 1, sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32};
}

template <class T>
constexpr int64_t kBlockStride = kBlockClasses + 64 / sizeof(T);  // as leading_dimension has it

// A thread's buffers.
template <class T>
struct BlockBuffers {
  T* packed;  // a block of W, in panels
  T* block;   // [kChunkRows][kBlockStride]: logits or their gradient
  T* left;    // the gradient's transpose
  T* dx;      // [kChunkRows][ld]: a segment's part

  BlockBuffers(Carver& carver, int64_t D, int64_t ld, bool gradients) {
    packed = carver.take<T>(kBlockClasses * (D + kPanel<T>));
    block = carver.take<T>(kChunkRows * kBlockStride<T>);
    left = carver.take<T>(gradients ? kChunkRows * kBlockClasses + kWidth<T> + kMR : 0);
    dx = carver.take<T>(gradients ? kChunkRows * ld : 0);
  }
};

template <class T>
struct LinearCrossEntropy : Targets<T> {
  const LinearCrossEntropyProblem& p;
  const int64_t blocks, ld;
  const bool gradients, keeps_logits;
  int64_t chunk_limit = kChunkRows;

  // The chunk.
  int64_t rows[kChunkRows];
  int64_t count = 0;
  bool first_chunk = true;
  T* x = nullptr;                           // [kChunkRows][ld]
  T* x_panels = nullptr;                    // the same in panels [panel][count][kPanel]
  T* x_y = nullptr;                         // the logit of each row's index
  LossRow<T>* pieces = nullptr;             // [blocks][kChunkRows]
  RowGradient<T>* row_gradients = nullptr;  // [kChunkRows]
  T* logits = nullptr;                      // [blocks][chunk_limit][kBlockStride], if kept
  T* dx = nullptr;                          // [kChunkRows][ld]

  T* bias = nullptr;   // [C], in the compute type
  T* dbias = nullptr;  // likewise
  T* dw = nullptr;     // [C][ldw]: the output itself, if it can be added to
  int64_t ldw = 0;
  char* workers = nullptr;
  int64_t worker_bytes = 0;

  LinearCrossEntropy(const LinearCrossEntropyProblem& problem, bool keep)
      : Targets<T>(problem),
        p(problem),
        blocks((p.C + kBlockClasses - 1) / kBlockClasses),
        ld(leading_dimension<T>(p.D)),
        gradients(p.dx.data != nullptr || p.dw.data != nullptr || p.dbias != nullptr),
        keeps_logits(keep && gradients) {
    // Whether or not they are kept, since the order of the sums hangs on it.
    const int64_t row_bytes = larger<int64_t>(blocks, 1) * kBlockStride<T> * static_cast<int64_t>(sizeof(T));
    chunk_limit = clamp(kLogitsBytes / row_bytes / kMR * kMR, int64_t{kMR}, kChunkRows);
    Carver one{nullptr};
    BlockBuffers<T>(one, p.D, ld, gradients);
    worker_bytes = one.bytes;
    Carver counting{nullptr};
    carve(counting);
    Carver carver{reserve_scratch(counting.bytes)};
    carve(carver);
    this->copy_weight();
    if (p.bias != nullptr) {
      pack_rows<T>({static_cast<char*>(const_cast<void*>(p.bias)), 0, p.bias_stride, p.dtype}, 0, 1, p.C, bias, 0);
    }
  }

  bool adds_to_output() const {
    return (sizeof(T) == 8 || p.dtype == Dtype::kFloat32) && p.dw.cls == 1 && p.D % kWidth<T> == 0;
  }

  void carve(Carver& carver) {
    Targets<T>::carve(carver);
    x = carver.take<T>(kChunkRows * ld);
    x_y = carver.take<T>(kChunkRows);
    pieces = carver.take<LossRow<T>>(blocks * kChunkRows);
    row_gradients = carver.take<RowGradient<T>>(kChunkRows);
    if (keeps_logits) logits = carver.take<T>(blocks * chunk_limit * kBlockStride<T>);
    if (p.dx.data != nullptr) dx = carver.take<T>(kChunkRows * ld);
    if (p.bias != nullptr) bias = carver.take<T>(padded<T>(p.C));
    if (p.dbias != nullptr) dbias = carver.take<T>(padded<T>(p.C));
    if (p.dw.data != nullptr) {
      x_panels = carver.take<T>(kChunkRows * (p.D + kPanel<T>));
      ldw = adds_to_output() ? p.dw.row[0] : padded<T>(p.D);
      dw = adds_to_output() ? static_cast<T*>(p.dw.data) : carver.take<T>(p.C * ldw);
    }
    workers = carver.take<char>(p.threads * worker_bytes);
  }

  BlockBuffers<T> buffers(int worker) const {
    Carver carver{workers + worker * worker_bytes};
    return BlockBuffers<T>(carver, p.D, ld, gradients);
  }

  int64_t classes(int64_t block) const { return smaller(kBlockClasses, p.C - block * kBlockClasses); }

  // Calls body() for each chunk, its rows loaded; the others are zeros in dx.
  template <class F>
  void for_row_chunks(const F& body) {
    for (int64_t row = 0; row < p.rows;) {
      for (count = 0; row < p.rows && count < chunk_limit; ++row) {
        if (this->counts(row)) {
          rows[count++] = row;
        } else if (p.dx.data != nullptr) {
          clear_row(as_matrix(p.dx), row, p.D);
        }
      }
      if (count == 0) break;
      for (int64_t i = 0; i < count; ++i) pack_rows(as_matrix(p.x), rows[i], 1, p.D, x + i * ld, ld);
      if (x_panels != nullptr) pack_panels(as_matrix(x, ld), 0, count, p.D, x_panels);
      body();
      first_chunk = false;
    }
  }

  static void clear_row(const Matrix& to, int64_t i, int64_t columns) {
    with_storage<T>(to.dtype, to.data, [&](auto* data) {
      for (int64_t c = 0; c < columns; c += kWidth<T>) {
        store_some<T>(data + i * to.row + c * to.col, to.col, lanes_left<T>(columns, c), Vec<T>{});
      }
    });
  }

  // to[count][kBlockStride] = x W^T + bias for a block of classes.
  void make_logits(int64_t block, T* packed, T* to) const {
    const int64_t c0 = block * kBlockClasses, n = classes(block);
    for (int64_t c = 0; c < n; c += kUnit) {
      pack_transposed<T>(as_matrix(p.w), c0 + c, smaller<int64_t>(kUnit, n - c), p.D, T(1), packed + c * p.D);
    }
    multiply_packed<T>(count, row_major(x, ld), packed, p.D, padded<T>(n), to, kBlockStride<T>, false);
    if (bias == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      T* row = to + i * kBlockStride<T>;
      for (int64_t c = 0; c < n; c += kWidth<T>) store(row + c, load(row + c) + load(bias + c0 + c));
    }
  }

  // The first loop.
  void look_at_logits() const {
    parallel_for(p.threads, blocks, [&](int worker, int64_t block) {
      const BlockBuffers<T> own = buffers(worker);
      T* to = keeps_logits ? kept(block) : own.block;
      make_logits(block, own.packed, to);
      const int64_t c0 = block * kBlockClasses, n = classes(block);
      for (int64_t i = 0; i < count; ++i) {
        const T* row = to + i * kBlockStride<T>;
        const int64_t y = this->index(rows[i]) - c0;
        if (y >= 0 && y < n) x_y[i] = row[y];
        pieces[block * kChunkRows + i] = this->loss_piece(row, no_probabilities, c0, n);
      }
    });
  }

  T* kept(int64_t block) const { return logits + block * chunk_limit * kBlockStride<T>; }
  static constexpr const T* no_probabilities = nullptr;

  // What all blocks say of row i of the chunk. A block of nothing but -inf has no maximum.
  LossRow<T> whole_row(int64_t i) const {
    LossRow<T> r = {-T(INFINITY), 0, 0, 0};
    for (int64_t b = 0; b < blocks; ++b) {
      const LossRow<T>& piece = pieces[b * kChunkRows + i];
      if (piece.l != 0 && !(piece.m <= r.m)) r.m = piece.m;
    }
    if (r.m == -T(INFINITY)) r.m = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const LossRow<T>& piece = pieces[b * kChunkRows + i];
      if (piece.l != 0) r.l += piece.l * exp(broadcast(piece.m - r.m))[0];
      r.s += piece.s;
      r.t += piece.t + piece.s * (r.m - piece.m);
    }
    return r;
  }

  // The second loop; row_gradients are set.
  void add_gradients() const {
    const int64_t segments = (blocks + kSegmentBlocks - 1) / kSegmentBlocks;
    parallel_for_ordered(
        p.threads, segments,
        [&](int worker, int64_t segment) {
          const BlockBuffers<T> own = buffers(worker);
          const int64_t first = segment * kSegmentBlocks, end = smaller(first + kSegmentBlocks, blocks);
          for (int64_t block = first; block < end; ++block) add_block(block, own, block > first);
        },
        [&](int worker, int64_t segment) {
          if (dx == nullptr) return;
          const T* part = buffers(worker).dx;
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t d = i * ld; d < i * ld + padded<T>(p.D); d += kWidth<T>) {
              store(dx + d, segment == 0 ? load(part + d) : load(dx + d) + load(part + d));
            }
          }
        });
    if (dx == nullptr) return;
    for (int64_t i = 0; i < count; ++i) store_row(as_matrix(p.dx), rows[i], p.D, dx + i * ld, T(1));
  }

  // dw and dbias of a block, and its part of dx, which is set or added to.
  void add_block(int64_t block, const BlockBuffers<T>& own, bool accumulate) const {
    const int64_t c0 = block * kBlockClasses, n = classes(block);
    T* g = own.block;
    if (!keeps_logits) make_logits(block, own.packed, g);
    const T* from = keeps_logits ? kept(block) : g;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = i * kBlockStride<T>;
      this->gradient_piece(row_gradients[i], from + row, no_probabilities, c0, n, g + row, false);
    }
    if (dbias != nullptr) add_column_sums(g, n, dbias + c0);
    if (dx != nullptr) {
      pack_panels<T>(as_matrix(p.w), c0, n, p.D, own.packed);
      multiply_packed<T>(count, row_major(g, kBlockStride<T>), own.packed, n, padded<T>(p.D), own.dx, ld, accumulate);
    }
    if (dw != nullptr) {
      const LeftMatrix<T> left = pack_left_transposed(g, kBlockStride<T>, count, n, own.left);
      multiply_packed<T>(n, left, x_panels, count, padded<T>(p.D), dw + c0 * ldw, ldw, !first_chunk);
    }
  }

  void add_column_sums(const T* g, int64_t n, T* to) const {
    for (int64_t c = 0; c < n; c += kWidth<T>) {
      Vec<T> sum = {};
      for (int64_t i = 0; i < count; ++i) sum += load(g + i * kBlockStride<T> + c);
      store(to + c, first_chunk ? sum : load(to + c) + sum);
    }
  }

  // After the last chunk.
  void store_parameter_gradients() const {
    const Matrix weight = as_matrix(p.dw), bias = {static_cast<char*>(p.dbias), 0, 1, p.dtype};
    const bool none = first_chunk;
    if (dw != nullptr && (none || !adds_to_output())) {
      parallel_for(p.threads, blocks, [&](int, int64_t block) {
        for (int64_t c = block * kBlockClasses; c < block * kBlockClasses + classes(block); ++c) {
          none ? clear_row(weight, c, p.D) : store_row(weight, c, p.D, dw + c * ldw, T(1));
        }
      });
    }
    if (dbias != nullptr) none ? clear_row(bias, 0, p.C) : store_row(bias, 0, p.C, dbias, T(1));
  }
};

template <class T>
int64_t linear_cross_entropy_forward(const LinearCrossEntropyForward& p) {
  LinearCrossEntropy<T> op(p, true);
  const ChunkSums targets = op.look_at_targets();
  if (targets.bad_row >= 0) return targets.bad_row;
  const T g = p.reduction == Reduction::kMean ? static_cast<T>(1 / targets.weight) : T(1);
  T *m = static_cast<T*>(p.m), *l = static_cast<T*>(p.l);
  for (int64_t row = 0; row < p.rows; ++row) {
    if (op.counts(row)) continue;
    if (p.reduction == Reduction::kNone) op.store_loss(p.loss, row_offset(p, p.loss, row), 0);
    if (m != nullptr) m[row] = 0, l[row] = 1;
  }
  double sum = 0;
  op.for_row_chunks([&] {
    op.look_at_logits();
    for (int64_t i = 0; i < op.count; ++i) {
      const int64_t row = op.rows[i];
      const LossRow<T> r = op.whole_row(i);
      const double loss = op.loss(row, r, op.x_y[i]);
      sum += loss;
      if (p.reduction == Reduction::kNone) op.store_loss(p.loss, row_offset(p, p.loss, row), loss);
      if (m != nullptr) m[row] = r.m, l[row] = r.l;
      if (op.gradients) op.row_gradients[i] = op.row_gradient(row, op.no_probabilities, r.m, r.l, g);
    }
    if (op.gradients) op.add_gradients();
  });
  op.store_reduced(p.loss, sum, targets.weight);
  op.store_parameter_gradients();
  return -1;
}

template <class T>
int64_t linear_cross_entropy_backward(const LinearCrossEntropyBackward& p) {
  LinearCrossEntropy<T> op(p, false);
  const ChunkSums targets = op.look_at_targets();
  if (targets.bad_row >= 0) return targets.bad_row;
  const T *m = static_cast<const T*>(p.m), *l = static_cast<const T*>(p.l);
  op.for_row_chunks([&] {
    for (int64_t i = 0; i < op.count; ++i) {
      const int64_t row = op.rows[i];
      const T g = op.row_dloss(p.dloss, row, targets.weight);
      op.row_gradients[i] = op.row_gradient(row, op.no_probabilities, m[row], l[row], g);
    }
    op.add_gradients();
  });
  op.store_parameter_gradients();
  return -1;
}
