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

inline int64_t row_offset(const CrossEntropyProblem& p, const RowTensor& tensor, int64_t row) {
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

  RowTile(const CrossEntropyProblem& p, const RowTensor& tensor, int64_t first, int64_t end)
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

// What a chunk of rows contributes.
struct ChunkSums {
  double loss, weight;
  int64_t bad_row;  // -1: none
};

template <class T>
struct CrossEntropy {
  const CrossEntropyProblem& p;
  const int64_t ld, chunk_rows, chunks;
  const double on, off;  // what a class gets of a target of 1, and what it gets besides
  T* weight = nullptr;
  ChunkSums* sums = nullptr;
  char* workers = nullptr;
  int64_t worker_bytes = 0;

  CrossEntropy(const CrossEntropyProblem& problem, bool tiled)
      : p(problem),
        ld(leading_dimension<T>(p.C)),
        chunk_rows((larger(kChunkElements / larger<int64_t>(p.C, 1), kRowTile) + kRowTile - 1) / kRowTile * kRowTile),
        chunks((p.rows + chunk_rows - 1) / chunk_rows),
        on(1 - p.label_smoothing),
        off(p.label_smoothing / static_cast<double>(larger<int64_t>(p.C, 1))) {
    Carver one{nullptr};
    TileBuffers<T>(one, ld);
    worker_bytes = tiled ? one.bytes : 0;
    Carver counting{nullptr};
    carve(counting);
    Carver carver{reserve_scratch(counting.bytes)};
    carve(carver);
    copy_weight();
  }

  void carve(Carver& carver) {
    if (p.weight != nullptr) weight = carver.take<T>(p.C + kWidth<T>);
    sums = carver.take<ChunkSums>(chunks);
    workers = carver.take<char>(p.threads * worker_bytes);
  }

  void copy_weight() {
    if (p.weight == nullptr) return;
    const RowTensor whole{const_cast<void*>(p.weight), p.input.dtype, {}, p.weight_stride};
    with_rows(whole, [&](const auto* data) {
      for (int64_t c = 0; c < p.C; c += kWidth<T>) {
        store(weight + c, load_some<T>(data + c * p.weight_stride, p.weight_stride, lanes_left<T>(p.C, c)));
      }
    });
    for (int64_t c = p.C; c < p.C + kWidth<T>; ++c) weight[c] = 0;
  }

  template <class F>
  static auto with_rows(const RowTensor& tensor, const F& f) {
    return with_storage<T>(tensor.dtype, static_cast<char*>(tensor.data), f);
  }

  bool tiled() const { return worker_bytes > 0; }
  bool by_probabilities() const { return p.probabilities.data != nullptr; }
  bool spread() const { return by_probabilities() || p.label_smoothing != 0; }

  T weight_of(int64_t c) const { return weight == nullptr ? T(1) : weight[c]; }

  int64_t index(int64_t row) const {
    const int64_t offset = row_offset(p, p.indices, row);
    return p.byte_indices ? static_cast<const uint8_t*>(p.indices.data)[offset]
                          : static_cast<const int64_t*>(p.indices.data)[offset];
  }

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

  // f(row, x, t) for the rows of a chunk, as pointers to C contiguous logits and probabilities (if there are). Where
  // classes are not neighbours these are copies, and `after(first, end, x)` is told of each tile that is done.
  template <class F, class G>
  void for_rows(int worker, int64_t first, int64_t end, const F& f, const G& after) const {
    with_rows(p.input, [&](const auto* data) {
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

  template <class Q>
  Shares<T, Q> shares(const Q* t) const {
    return {t, weight, static_cast<T>(on), static_cast<T>(off)};
  }
};

template <class T>
struct CrossEntropyForwardRows : CrossEntropy<T> {
  const CrossEntropyForward& p;

  explicit CrossEntropyForwardRows(const CrossEntropyForward& problem)
      : CrossEntropy<T>(problem, strided_classes(problem.input) || strided_classes(problem.probabilities)),
        p(problem) {}

  void store_loss(int64_t offset, double loss) const {
    this->with_rows(p.loss, [&](auto* data) { store_some<T>(data + offset, 1, 1, broadcast(static_cast<T>(loss))); });
  }

  // s log(l) + t, in double, since a row is long and this its end.
  template <class S, class Q>
  double loss(int64_t row, const S* x, const Q* probabilities) const {
    LossRow<T> r = {0, 1, 0, 0};
    double s = 0, t = 0;
    if (this->by_probabilities()) {
      r = loss_row<true>(x, p.C, this->shares(probabilities));
      s = r.s, t = r.t;
    } else if (const int64_t y = this->index(row); y != p.ignore_index) {
      // Shares that are all alike are left out of the sums: 1 per class adds up without rounding.
      const Shares<T, Q> ones = {nullptr, this->weight, 0, 1};
      r = this->spread() ? loss_row<true>(x, p.C, ones) : loss_row<false>(x, p.C, ones);
      const double q = this->on * static_cast<double>(this->weight_of(y));
      s = q, t = q * static_cast<double>(r.m - load_some<T>(x + y, 1, 1)[0]);
      if (this->spread()) s += this->off * r.s, t += this->off * r.t;
    }
    if (p.m != nullptr) {
      static_cast<T*>(p.m)[row] = r.m;
      static_cast<T*>(p.l)[row] = r.l;
    }
    return s * log(static_cast<double>(r.l)) + t;
  }

  int64_t run() const {
    const ChunkSums targets = this->look_at_targets();
    if (targets.bad_row >= 0) return targets.bad_row;
    this->for_chunks([&](int worker, int64_t first, int64_t end, ChunkSums& chunk) {
      const auto one = [&](int64_t row, const auto* x, const auto* t) {
        const double row_loss = loss(row, x, t);
        chunk.loss += row_loss;
        if (p.reduction == Reduction::kNone) store_loss(row_offset(p, p.loss, row), row_loss);
      };
      this->for_rows(worker, first, end, one, [](int64_t, int64_t, const T*) {});
    });
    const double sum = this->total().loss;
    if (p.reduction == Reduction::kMean) store_loss(0, sum / targets.weight);
    if (p.reduction == Reduction::kSum) store_loss(0, sum);
    return -1;
  }
};

template <class T>
struct CrossEntropyBackwardRows : CrossEntropy<T> {
  const CrossEntropyBackward& p;
  const bool past_caches;
  T weights = 0;  // their sum

  explicit CrossEntropyBackwardRows(const CrossEntropyBackward& problem)
      : CrossEntropy<T>(problem, strided_classes(problem.input) || strided_classes(problem.probabilities) ||
                                     strided_classes(problem.dinput)),
        p(problem),
        past_caches(!this->tiled() && p.rows * p.C * static_cast<int64_t>(sizeof(T)) > kStreamBytes) {
    for (int64_t c = 0; c < p.C; ++c) weights += this->weight_of(c);
  }

  // The gradient of a row's loss.
  T dloss(int64_t row, double total_weight) const {
    const T g = this->with_rows(p.dloss, [&](const auto* data) {
      return static_cast<T>(load_some<T>(data + row_offset(p, p.dloss, row), 1, 1)[0]);
    });
    return p.reduction == Reduction::kMean ? static_cast<T>(g / total_weight) : g;
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

  template <class S, class Q>
  void gradient(int64_t row, const S* x, const Q* t, S* to, double total_weight) const {
    const Shares<T, Q> shares = this->shares(t);
    const T m = static_cast<const T*>(p.m)[row], l = static_cast<const T*>(p.l)[row], g = dloss(row, total_weight);
    if (this->by_probabilities()) {
      return gradient_row<true>(x, p.C, m, g * sum(shares) / l, g, shares, to, past_caches);
    }
    const int64_t y = this->index(row);
    if (y == p.ignore_index) {
      for (int64_t c = 0; c < p.C; c += kWidth<T>) store_some<T>(to + c, 1, lanes_left<T>(p.C, c), Vec<T>{});
      return;
    }
    const T on = static_cast<T>(this->on), off = static_cast<T>(this->off), w = this->weight_of(y);
    const T a = g * (on * w + off * weights) / l;
    const Vec<T> x_y = load_some<T>(x + y, 1, 1);  // read before `to`, which may be x, is written
    if (this->spread()) {
      gradient_row<true>(x, p.C, m, a, g, shares, to, past_caches);
    } else {
      gradient_row<false>(x, p.C, m, a, g, shares, to, past_caches);
    }
    store_some<T>(to + y, 1, 1, exp(x_y - broadcast(m)) * a - broadcast(g * (on + off) * w));
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
