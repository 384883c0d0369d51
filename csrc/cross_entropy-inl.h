// Cross-entropy: one pass over the logits forward, one backward, for rows of any number of classes.
//
// A row's target is a vector q of shares: q_c = w_c ((1 - smoothing) t_c + smoothing / C), with t the class
// probabilities, or 1 at the class index. With s = sum of q, p the softmax and lse its log-sum-exp,
//     loss = sum over c of q_c (lse - x_c),      dx = dloss (s p - q).
// Without smoothing a class index has a single share, and q is never spelt out.
//
// The forward keeps m and l of the online softmax, and not lse = m + log(l): the backward then has p = e^(x - m) / l to
// the last digits, where e^(x - lse) would add the rounding of an lse that can be large.

// Classes whose maximum is taken before they are summed: 256 vectors (8 KB with AVX2) stay in the L1 cache for their
// second visit, and no lane's sum is longer than that. The order of summation, lanes then blocks, is counted from class
// 0 whatever the row is part of.
template <class T>
constexpr int64_t kClassBlock = 256 * kWidth<T>;

// Classes whose shares a lane adds up at once: of many that are alike, one long sum is off by a hundred eps.
template <class T>
constexpr int64_t kSumBlock = 32 * kWidth<T>;

// Rows are worked on, and their losses summed, in chunks of about this many elements and at least kRowTile rows.
constexpr int64_t kChunkElements = 32768;
constexpr int64_t kRowTile = kVectorBytes / 4;  // for rows whose classes are not neighbours, a square transposition

// Gradients beyond this many bytes are written past the caches, which they would not stay in: 1.2 times faster at 62 MB
// of float32, no difference at 31 MB (Zen 3, 32 MB of L3, one thread).
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// Calls f(c, count, x) with the vectors of n classes: whole ones, then the rest, filled up with zeros.
template <class T, class S, class F>
PYATTN_INLINE void for_classes(const S* row, int64_t first, int64_t end, const F& f) {
  int64_t c = first;
  for (; c + kWidth<T> <= end; c += kWidth<T>) f(c, kWidth<T>, load(row + c));
  if (c < end) f(c, static_cast<int>(end - c), load_some<T>(row + c, 1, end - c));
}

// `x` with `fill` in the lanes from `count` on.
template <class T>
PYATTN_INLINE Vec<T> fill_from(Vec<T> x, int count, T fill) {
  for (int i = count; i < kWidth<T>; ++i) x[i] = fill;
  return x;
}

template <class T>
PYATTN_INLINE void stream(T* p, Vec<T> x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
#else
  store(p, x);
#endif
}
// Other threads see what was streamed before.
PYATTN_INLINE void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// What the forward finds out about a row.
template <class T>
struct LossRow {
  T m, l;
  T s, t;  // sums of q and of q (m - x)
};

// A part of the target: the same share for every class, or shares in proportion to probabilities; times the weights.
template <class T, class Q>
struct Shares {
  const Q* probabilities;  // nullptr: all alike
  const T* weight;         // nullptr: all 1; [C] and zeros to the next whole vector
  T slope, constant;

  PYATTN_INLINE Vec<T> operator()(int64_t c, int count) const {
    Vec<T> q = broadcast(constant);
    if (probabilities != nullptr) {
      q += (count == kWidth<T> ? load(probabilities + c) : load_some<T>(probabilities + c, 1, count)) * slope;
    }
    if (weight != nullptr) q = q * load(weight + c);
    return count == kWidth<T> ? q : fill_from<T>(q, count, T(0));
  }
};

// The online softmax of n classes, and, if `spread`, the sums over all shares.
template <bool spread, class T, class S, class Q>
LossRow<T> loss_row(const S* x, int64_t n, const Shares<T, Q>& shares) {
  LossRow<T> row = {-T(INFINITY), 0, 0, 0};
  T pivot = 0;  // m, but finite: -inf - -inf would be NaN
  for (int64_t first = 0; first < n; first += kClassBlock<T>) {
    const int64_t end = smaller(first + kClassBlock<T>, n);
    Vec<T> max0 = broadcast(-T(INFINITY)), max1 = max0;
    int64_t c = first;
    for (; c + 2 * kWidth<T> <= end; c += 2 * kWidth<T>) {
      max0 = max<T>(max0, load(x + c));
      max1 = max<T>(max1, load(x + c + kWidth<T>));
    }
    for_classes<T>(x, c, end, [&](int64_t, int count, Vec<T> y) __attribute__((always_inline)) {
      max0 = max<T>(max0, fill_from<T>(y, count, -T(INFINITY)));
    });
    const T block_max = reduce_max<T>(max<T>(max0, max1));
    if (block_max > row.m) {
      if (row.l != 0) row.l *= exp(broadcast(pivot - block_max))[0];
      if (spread && row.s != 0) row.t += row.s * (block_max - pivot);
      row.m = pivot = block_max;
    }
    Vec<T> l = {}, s = {}, t = {};
    const Vec<T> pivots = broadcast(pivot);
    for_classes<T>(x, first, end, [&](int64_t i, int count, Vec<T> y) __attribute__((always_inline)) {
      l += fill_from<T>(exp(y - pivots), count, T(0));
      if constexpr (spread) {
        const Vec<T> q = shares(i, count);
        s += q;
        t += q * (pivots - y);
      }
    });
    row.l += reduce_add<T>(l);
    if constexpr (spread) {
      row.s += reduce_add<T>(s);
      row.t += reduce_add<T>(t);
    }
  }
  row.m = pivot;
  return row;
}

// to[c] = a e^(x[c] - m) - g q_c; to may be x.
template <bool spread, class T, class S, class D, class Q>
void gradient_row(const S* x, int64_t n, T m, T a, T g, const Shares<T, Q>& shares, D* to, bool past_caches) {
  const Vec<T> pivots = broadcast(m);
  const auto gradient = [&](int64_t c, int count, Vec<T> y) __attribute__((always_inline)) {
    Vec<T> d = exp(y - pivots) * a;
    if constexpr (spread) d -= shares(c, count) * g;
    return d;
  };
  int64_t first = 0;
  if constexpr (sizeof(D) == sizeof(T)) {
    if (past_caches) {
      const int64_t misaligned = reinterpret_cast<uintptr_t>(to) % kVectorBytes / sizeof(T);
      first = smaller<int64_t>(misaligned == 0 ? 0 : kWidth<T> - misaligned, n);
      if (first > 0) store_some<T>(to, 1, first, gradient(0, static_cast<int>(first), load_some<T>(x, 1, first)));
      for (; first + kWidth<T> <= n; first += kWidth<T>) {
        stream<T>(reinterpret_cast<T*>(to) + first, gradient(first, kWidth<T>, load(x + first)));
      }
    }
  }
  for_classes<T>(x, first, n, [&](int64_t c, int count, Vec<T> y) __attribute__((always_inline)) {
    store_some<T>(to + c, 1, count, gradient(c, count, y));
  });
}

// ---- Rows in memory

inline int64_t row_offset(const CrossEntropyTargets& p, const RowTensor& tensor, int64_t row) {
  int64_t offset = 0;
  for (int d = p.row_rank - 1; d > 0; --d) {
    offset += row % p.row_shape[d] * tensor.row[d];
    row /= p.row_shape[d];
  }
  return p.row_rank == 0 ? 0 : offset + row * tensor.row[0];
}

inline bool strided_classes(const RowTensor& tensor) { return tensor.data != nullptr && tensor.cls != 1; }

// The memory of a tensor that has the same storage type as another.
template <class S>
PYATTN_INLINE S* as_type_of(const S*, const void* data) {
  return static_cast<S*>(const_cast<void*>(data));
}

// Up to kRowTile rows of a tensor. `neighbours`: they lie side by side, so that a class of them is a vector.
struct RowTile {
  int64_t offset[kRowTile];
  int64_t count;
  bool neighbours = true;

  RowTile(const CrossEntropyTargets& p, const RowTensor& tensor, int64_t first, int64_t end)
      : count(smaller(kRowTile, end - first)) {
    for (int64_t i = 0; i < count; ++i) {
      offset[i] = row_offset(p, tensor, first + i);
      neighbours &= offset[i] == offset[0] + i;
    }
  }
};

// Copies a tile to contiguous rows of the compute type, `ld` apart, and back.
template <class T, class S>
void load_rows(const S* data, const RowTile& tile, int64_t cls, int64_t n, T* to, int64_t ld) {
  constexpr int W = kWidth<T>;
  for (int64_t first = 0; first < tile.count; first += W) {
    int64_t c = 0;
    if (tile.neighbours && first + W <= tile.count) {
      for (; c + W <= n; c += W) {
        Vec<T> block[W];
        for (int i = 0; i < W; ++i) block[i] = load(data + tile.offset[first] + (c + i) * cls);
        transpose<T>(block);
        for (int i = 0; i < W; ++i) store(to + (first + i) * ld + c, block[i]);
      }
    }
    for (int64_t i = first; i < smaller(first + W, tile.count); ++i) {
      const S* row = data + tile.offset[i];
      for (int64_t b = c; b < n; b += W) store(to + i * ld + b, load_some<T>(row + b * cls, cls, lanes_left<T>(n, b)));
    }
  }
}
template <class T, class S>
void store_rows(S* data, const RowTile& tile, int64_t cls, int64_t n, const T* from, int64_t ld) {
  constexpr int W = kWidth<T>;
  for (int64_t first = 0; first < tile.count; first += W) {
    int64_t c = 0;
    if (tile.neighbours && first + W <= tile.count) {
      for (; c + W <= n; c += W) {
        Vec<T> block[W];
        for (int i = 0; i < W; ++i) block[i] = load(from + (first + i) * ld + c);
        transpose<T>(block);
        for (int i = 0; i < W; ++i) store(data + tile.offset[first] + (c + i) * cls, block[i]);
      }
    }
    for (int64_t i = first; i < smaller(first + W, tile.count); ++i) {
      S* row = data + tile.offset[i];
      for (int64_t b = c; b < n; b += W) {
        store_some<T>(row + b * cls, cls, lanes_left<T>(n, b), load(from + i * ld + b));
      }
    }
  }
}

// ---- Targets

// What a chunk of rows contributes.
struct ChunkSums {
  double loss, weight;
  int64_t bad_row;  // -1: none
};

// How a row's gradient follows from its logits: dx_c = a e^(x_c - m) - g q_c.
template <class T>
struct RowGradient {
  T m, a, g;
  int64_t y;  // the class index; -1: there are probabilities
  T w;        // its weight
};

// The shares of the classes, and what becomes of a row's logits by them. Classes can come in pieces [c0, c0 + n), for
// which x and t are pointers to the logits and, if there are, the probabilities of the piece alone.
template <class T>
struct Targets {
  const CrossEntropyTargets& p;
  const int64_t chunk_rows, chunks;
  const double on, off;  // what a class gets of a target of 1, and what it gets besides
  T* weight = nullptr;
  T weights;  // their sum
  ChunkSums* sums = nullptr;

  explicit Targets(const CrossEntropyTargets& problem)
      : p(problem),
        chunk_rows((larger(kChunkElements / larger<int64_t>(p.C, 1), kRowTile) + kRowTile - 1) / kRowTile * kRowTile),
        chunks((p.rows + chunk_rows - 1) / chunk_rows),
        on(1 - p.label_smoothing),
        off(p.label_smoothing / static_cast<double>(larger<int64_t>(p.C, 1))),
        weights(p.weight == nullptr ? static_cast<T>(p.C) : T(0)) {}

  // To be called by whoever reserves the scratch, and then copy_weight.
  void carve(Carver& carver) {
    if (p.weight != nullptr) weight = carver.take<T>(p.C + kWidth<T>);
    sums = carver.take<ChunkSums>(chunks);
  }

  void copy_weight() {
    if (p.weight == nullptr) return;
    const RowTensor whole{const_cast<void*>(p.weight), p.dtype, {}, p.weight_stride};
    with_rows(whole, [&](const auto* data) {
      for (int64_t c = 0; c < p.C; c += kWidth<T>) {
        store(weight + c, load_some<T>(data + c * p.weight_stride, p.weight_stride, lanes_left<T>(p.C, c)));
      }
    });
    for (int64_t c = p.C; c < p.C + kWidth<T>; ++c) weight[c] = 0;
    for (int64_t c = 0; c < p.C; ++c) weights += weight[c];
  }

  template <class F>
  static auto with_rows(const RowTensor& tensor, const F& f) {
    return with_storage<T>(tensor.dtype, static_cast<char*>(tensor.data), f);
  }

  bool by_probabilities() const { return p.probabilities.data != nullptr; }
  bool spread() const { return by_probabilities() || p.label_smoothing != 0; }

  T weight_of(int64_t c) const { return weight == nullptr ? T(1) : weight[c]; }

  int64_t index(int64_t row) const {
    const int64_t offset = row_offset(p, p.indices, row);
    return p.byte_indices ? static_cast<const uint8_t*>(p.indices.data)[offset]
                          : static_cast<const int64_t*>(p.indices.data)[offset];
  }
  bool counts(int64_t row) const { return by_probabilities() || index(row) != p.ignore_index; }

  // body(worker, first row, end, sums) for each chunk.
  template <class F>
  void for_chunks(const F& body) const {
    parallel_for(p.threads, chunks, [&](int worker, int64_t i) {
      sums[i] = {0, 0, -1};
      body(worker, i * chunk_rows, smaller((i + 1) * chunk_rows, p.rows), sums[i]);
    });
  }

  // The sums of all chunks, in their order.
  ChunkSums total() const {
    ChunkSums all = {0, 0, -1};
    for (int64_t i = 0; i < chunks; ++i) {
      all.loss += sums[i].loss;
      all.weight += sums[i].weight;
      if (all.bad_row < 0) all.bad_row = sums[i].bad_row;
    }
    return all;
  }

  // Looks at every index, and sums what the mean divides by.
  ChunkSums look_at_targets() const {
    if (by_probabilities()) return {0, p.C == 0 ? 0.0 : static_cast<double>(p.rows), -1};
    for_chunks([&](int, int64_t first, int64_t end, ChunkSums& chunk) {
      for (int64_t row = first; row < end; ++row) {
        const int64_t y = index(row);
        if (y == p.ignore_index) continue;
        if (y < 0 || y >= p.C) {
          chunk.bad_row = row;
          return;
        }
        chunk.weight += static_cast<double>(weight_of(y));
      }
    });
    return total();
  }

  template <class Q>
  Shares<T, Q> shares(const Q* t, int64_t c0 = 0) const {
    return {t, weight == nullptr ? nullptr : weight + c0, static_cast<T>(on), static_cast<T>(off)};
  }

  // What a piece of a row adds to its loss.
  template <class S, class Q>
  LossRow<T> loss_piece(const S* x, const Q* t, int64_t c0, int64_t n) const {
    if (by_probabilities()) return loss_row<true>(x, n, shares(t, c0));
    // Shares that are all alike are left out of the sums: 1 per class adds up without rounding.
    const Shares<T, Q> ones = {nullptr, weight == nullptr ? nullptr : weight + c0, 0, 1};
    return spread() ? loss_row<true>(x, n, ones) : loss_row<false>(x, n, ones);
  }

  // A row's loss, s log(l) + t, in double, since a row is long and this its end. x_y is the index's logit.
  double loss(int64_t row, const LossRow<T>& r, T x_y) const {
    double s = r.s, t = r.t;
    if (!by_probabilities()) {
      s = on * static_cast<double>(weight_of(index(row)));
      t = s * static_cast<double>(r.m - x_y);
      if (spread()) s += off * r.s, t += off * r.t;
    }
    return s * log(static_cast<double>(r.l)) + t;
  }

  void store_loss(const RowTensor& loss, int64_t offset, double value) const {
    with_rows(loss, [&](auto* data) { store_some<T>(data + offset, 1, 1, broadcast(static_cast<T>(value))); });
  }
  // Of the sum over all rows.
  void store_reduced(const RowTensor& loss, double sum, double total_weight) const {
    if (p.reduction == Reduction::kMean) store_loss(loss, 0, sum / total_weight);
    if (p.reduction == Reduction::kSum) store_loss(loss, 0, sum);
  }

  // The gradient of a row's loss, from that of the result.
  T row_dloss(const RowTensor& dloss, int64_t row, double total_weight) const {
    const T g = with_rows(dloss, [&](const auto* data) {
      return static_cast<T>(load_some<T>(data + row_offset(p, dloss, row), 1, 1)[0]);
    });
    return p.reduction == Reduction::kMean ? static_cast<T>(g / total_weight) : g;
  }

  // Of a row that counts; t are the probabilities of all classes. (Not inlined, where the compiler may fuse other
  // multiplications with additions in each place: whoever makes a gradient, its bits are the same.)
  template <class Q>
  __attribute__((noinline)) RowGradient<T> row_gradient(int64_t row, const Q* t, T m, T l, T g) const {
    if (by_probabilities()) return {m, g * sum(shares(t)) / l, g, -1, 0};
    const int64_t y = index(row);
    const T w = weight_of(y);
    return {m, g * (static_cast<T>(on) * w + static_cast<T>(off) * weights) / l, g, y, w};
  }

  // The sum of a row's shares.
  template <class Q>
  T sum(const Shares<T, Q>& shares) const {
    T sum = 0;
    for (int64_t first = 0; first < p.C; first += kSumBlock<T>) {
      const int64_t end = smaller(first + kSumBlock<T>, p.C);
      Vec<T> s = {};
      for (int64_t c = first; c < end; c += kWidth<T>) s += shares(c, static_cast<int>(lanes_left<T>(p.C, c)));
      sum += reduce_add<T>(s);
    }
    return sum;
  }

  // The gradient of a piece of a row; `to` may be x.
  template <class S, class D, class Q>
  void gradient_piece(const RowGradient<T>& r, const S* x, const Q* t, int64_t c0, int64_t n, D* to,
                      bool past_caches) const {
    const bool has_y = r.y >= c0 && r.y < c0 + n;
    const Vec<T> x_y = has_y ? load_some<T>(x + r.y - c0, 1, 1) : Vec<T>{};  // read before `to` is written
    if (spread()) {
      gradient_row<true>(x, n, r.m, r.a, r.g, shares(t, c0), to, past_caches);
    } else {
      gradient_row<false>(x, n, r.m, r.a, r.g, shares(t, c0), to, past_caches);
    }
    if (!has_y) return;
    const Vec<T> q = broadcast(r.g * (static_cast<T>(on) + static_cast<T>(off)) * r.w);
    store_some<T>(to + r.y - c0, 1, 1, exp(x_y - broadcast(r.m)) * r.a - q);
  }
};

// ---- The op

// One thread's buffers for tiles whose classes are not neighbours in memory.
template <class T>
struct TileBuffers {
  T* x;  // [kRowTile][ld]
  T* t;  // likewise, of the probabilities

  TileBuffers() = default;
  TileBuffers(Carver& carver, int64_t ld) {
    x = carver.take<T>(kRowTile * ld);
    t = carver.take<T>(kRowTile * ld);
  }
};

template <class T>
struct CrossEntropy : Targets<T> {
  const CrossEntropyProblem& p;
  const int64_t ld;
  char* workers = nullptr;
  int64_t worker_bytes = 0;

  CrossEntropy(const CrossEntropyProblem& problem, bool tiled)
      : Targets<T>(problem), p(problem), ld(leading_dimension<T>(p.C)) {
    Carver one{nullptr};
    TileBuffers<T>(one, ld);
    worker_bytes = tiled ? one.bytes : 0;
    Carver counting{nullptr};
    carve(counting);
    Carver carver{reserve_scratch(counting.bytes)};
    carve(carver);
    this->copy_weight();
  }

  void carve(Carver& carver) {
    Targets<T>::carve(carver);
    workers = carver.take<char>(p.threads * worker_bytes);
  }

  bool tiled() const { return worker_bytes > 0; }

  // f(row, x, t) for the rows of a chunk, as pointers to C contiguous logits and probabilities (if there are). Where
  // classes are not neighbours these are copies, and `after(first, end, x)` is told of each tile that is done.
  template <class F, class G>
  void for_rows(int worker, int64_t first, int64_t end, const F& f, const G& after) const {
    this->with_rows(p.input, [&](const auto* data) {
      const auto* probabilities = as_type_of(data, p.probabilities.data);
      if (!tiled()) {
        for (int64_t row = first; row < end; ++row) {
          f(row, data + row_offset(p, p.input, row),
            probabilities == nullptr ? nullptr : probabilities + row_offset(p, p.probabilities, row));
        }
        return;
      }
      Carver carver{workers + worker * worker_bytes};
      const TileBuffers<T> buffers(carver, ld);
      for (int64_t row = first; row < end; row += kRowTile) {
        const RowTile tile(p, p.input, row, end);
        load_rows<T>(data, tile, p.input.cls, p.C, buffers.x, ld);
        if (probabilities != nullptr) {
          load_rows<T>(probabilities, RowTile(p, p.probabilities, row, end), p.probabilities.cls, p.C, buffers.t, ld);
        }
        for (int64_t i = 0; i < tile.count; ++i) {
          const T* x = buffers.x + i * ld;
          f(row + i, x, probabilities == nullptr ? nullptr : as_type_of(x, buffers.t + i * ld));
        }
        after(row, end, buffers.x);
      }
    });
  }
};

template <class T>
struct CrossEntropyForwardRows : CrossEntropy<T> {
  const CrossEntropyForward& p;

  explicit CrossEntropyForwardRows(const CrossEntropyForward& problem)
      : CrossEntropy<T>(problem, strided_classes(problem.input) || strided_classes(problem.probabilities)),
        p(problem) {}

  template <class S, class Q>
  double loss(int64_t row, const S* x, const Q* t) const {
    LossRow<T> r = {0, 1, 0, 0};
    double loss = 0;
    if (this->counts(row)) {
      r = this->loss_piece(x, t, 0, p.C);
      const T x_y = this->by_probabilities() ? T(0) : load_some<T>(x + this->index(row), 1, 1)[0];
      loss = Targets<T>::loss(row, r, x_y);
    }
    if (p.m != nullptr) {
      static_cast<T*>(p.m)[row] = r.m;
      static_cast<T*>(p.l)[row] = r.l;
    }
    return loss;
  }

  int64_t run() const {
    const ChunkSums targets = this->look_at_targets();
    if (targets.bad_row >= 0) return targets.bad_row;
    this->for_chunks([&](int worker, int64_t first, int64_t end, ChunkSums& chunk) {
      const auto one = [&](int64_t row, const auto* x, const auto* t) {
        const double row_loss = loss(row, x, t);
        chunk.loss += row_loss;
        if (p.reduction == Reduction::kNone) this->store_loss(p.loss, row_offset(p, p.loss, row), row_loss);
      };
      this->for_rows(worker, first, end, one, [](int64_t, int64_t, const T*) {});
    });
    this->store_reduced(p.loss, this->total().loss, targets.weight);
    return -1;
  }
};

template <class T>
struct CrossEntropyBackwardRows : CrossEntropy<T> {
  const CrossEntropyBackward& p;
  const bool past_caches;

  explicit CrossEntropyBackwardRows(const CrossEntropyBackward& problem)
      : CrossEntropy<T>(problem, strided_classes(problem.input) || strided_classes(problem.probabilities) ||
                                     strided_classes(problem.dinput)),
        p(problem),
        past_caches(!this->tiled() && p.rows * p.C * static_cast<int64_t>(sizeof(T)) > kStreamBytes) {}

  template <class S, class Q>
  void gradient(int64_t row, const S* x, const Q* t, S* to, double total_weight) const {
    if (!this->counts(row)) {
      for (int64_t c = 0; c < p.C; c += kWidth<T>) store_some<T>(to + c, 1, lanes_left<T>(p.C, c), Vec<T>{});
      return;
    }
    const T m = static_cast<const T*>(p.m)[row], l = static_cast<const T*>(p.l)[row];
    const RowGradient<T> r = this->row_gradient(row, t, m, l, this->row_dloss(p.dloss, row, total_weight));
    this->gradient_piece(r, x, t, 0, p.C, to, past_caches);
  }

  int64_t run() const {
    const ChunkSums targets = this->look_at_targets();
    if (targets.bad_row >= 0) return targets.bad_row;
    this->for_chunks([&](int worker, int64_t first, int64_t end, ChunkSums&) {
      const auto one = [&](int64_t row, const auto* x, const auto* t) {
        // In tiles the gradient takes the place of the logits.
        auto* to = this->tiled() ? as_type_of(x, x) : as_type_of(x, p.dinput.data) + row_offset(p, p.dinput, row);
        gradient(row, x, t, to, targets.weight);
      };
      this->for_rows(worker, first, end, one, [&](int64_t row, int64_t stop, const T* gradients) {
        this->with_rows(p.dinput, [&](auto* data) {
          store_rows<T>(data, RowTile(p, p.dinput, row, stop), p.dinput.cls, p.C, gradients, this->ld);
        });
      });
      stream_fence();
    });
    return -1;
  }
};
