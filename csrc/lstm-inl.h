// One layer of an LSTM in one direction, forward and backward.
//
// Samples are sorted by length and worked on in tiles, each through its whole sequence: the weights are then read from
// the caches once per step for all rows of a tile, and the rows still active at a step are always the first ones. A
// step is one product of [x, h] with both weights side by side; the register tile holds the four gates of a vector of
// units, so that bias, activations and cell update need no memory in between. Nothing is computed for padding.
//
// A sample's sums depend on nothing but the sample: its bits are the same in any batch, however padded. Sums over
// samples, the weights' gradients, are taken within a tile and then over tiles, in their order.

// Rows of the register tile, by four vectors: 3 * 4 + 3 + 1 = 16 of 16 registers, 6 * 4 + 4 + 1 = 29 of 32. It serves
// every product but those that sum over samples: on a single row, four vectors are four chains of additions, which
// is what keeps up with reading the weights from the L2 cache.
constexpr int kQuadRows = kVectorRegisters == 32 ? 6 : 3;

// Elements of a row of packed weights: the four gates of a vector of units, or four neighbouring vectors of columns.
template <class T>
constexpr int kQuad = 4 * kWidth<T>;

// Samples of a tile, of which the largest batches have their last one less full.
constexpr int64_t kTileSamples = 36;

// Steps of samples whose gate gradients are collected before they are multiplied into the weights' gradients, in two
// running sums: as one, they were up to 1.3 times as far from float64 as torch's in a batch of 8.
constexpr int64_t kBlockRows = 128;
constexpr int64_t kStepDepth = kBlockRows / 2;
static_assert(kTileSamples <= kBlockRows, "a step of a tile fits into a block");

// Columns of a block that are multiplied at a time: 48 KB, which stay in the L2 cache for all of [x, h].
constexpr int64_t kBlockGates = 16 * kMR;

// The longest running sum before a gate's activation: every step's error is carried to all the later ones. With
// kMaxDepth the output was 1.4 times as far from float64 as torch's at 64 features and 128 units.
constexpr int64_t kGateDepth = 32;

// total[i] += a_i b for MR rows of a, with b packed [depth][kQuad], in sums of kLongest terms.
template <class T, int MR, int64_t kLongest>
PYATTN_INLINE void add_product(const T* a, int64_t lda, const T* b, int64_t depth, Vec<T> (&total)[MR][4]) {
  constexpr int W = kWidth<T>;
  for (int64_t first = 0; first < depth; first += kLongest) {
    const int64_t end = depth - first < kLongest ? depth : first + kLongest;
    Vec<T> sum[MR][4] = {};
    for (int64_t k = first; k < end; ++k) {
      Vec<T> x[MR];
#pragma GCC unroll 6
      for (int i = 0; i < MR; ++i) x[i] = broadcast(a[i * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const Vec<T> column = load(b + k * kQuad<T> + j * W);
#pragma GCC unroll 6
        for (int i = 0; i < MR; ++i) sum[i][j] += x[i] * column;
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) total[i][j] += sum[i][j];
    }
  }
}

// c[MR][kQuad] = a b
template <class T, int MR>
__attribute__((noinline)) void product_tile(const T* a, int64_t lda, const T* b, int64_t depth, T* c,
                                            int64_t ldc) noexcept {
  Vec<T> sum[MR][4] = {};
  add_product<T, MR, kMaxDepth>(a, lda, b, depth, sum);
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(c + i * ldc + j * kWidth<T>, sum[i][j]);
  }
}

// Where a step of some rows and a vector of units lies.
template <class T>
struct Cells {
  const T* xh;  // [rows][ld]
  int64_t ld;
  const T* weights;  // [depth][kQuad]
  const T* bias;     // [kQuad]
  int64_t depth, units;
  T* c;      // [rows][units]: read and replaced
  T* h;      // [rows][ld]
  T* saved;  // [rows][saved_ld]: five times `units` apart; nullptr: not wanted
  int64_t saved_ld;
};

// One step of MR rows in one vector of units.
template <class T, int MR>
__attribute__((noinline)) void cell_tile(const Cells<T>& cells, int64_t row) noexcept {
  Vec<T> sum[MR][4];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = load(cells.bias + j * kWidth<T>);
  }
  add_product<T, MR, kGateDepth>(cells.xh + row * cells.ld, cells.ld, cells.weights, cells.depth, sum);
  for (int i = 0; i < MR; ++i) {
    T* cell = cells.c + (row + i) * cells.units;
    const Vec<T> in = sigmoid<T>(sum[i][0]), forget = sigmoid<T>(sum[i][1]);
    const Vec<T> candidate = tanh<T>(sum[i][2]), out = sigmoid<T>(sum[i][3]);
    const Vec<T> c = forget * load(cell) + in * candidate;
    store(cell, c);
    store(cells.h + (row + i) * cells.ld, out * tanh<T>(c));
    if (cells.saved == nullptr) continue;
    T* saved = cells.saved + (row + i) * cells.saved_ld;
    const Vec<T> values[] = {in, forget, candidate, out, c};
    for (int j = 0; j < 5; ++j) store(saved + j * cells.units, values[j]);
  }
}

// Calls f(Rows<MR>, row) for groups of MR <= kQuadRows rows, as even as can be: 2 + 2 and not 3 + 1.
template <int MR>
struct Rows {
  static constexpr int kCount = MR;
};
template <class F>
PYATTN_INLINE void for_row_groups(int64_t rows, const F& f) {
  for (int64_t row = 0, groups = (rows + kQuadRows - 1) / kQuadRows; groups > 0; --groups) {
    const int64_t count = (rows - row + groups - 1) / groups;
    if (count == 1) f(Rows<1>(), row);
    if (count == 2) f(Rows<2>(), row);
    if (count == 3) f(Rows<3>(), row);
    if constexpr (kQuadRows > 3) {
      if (count == 4) f(Rows<4>(), row);
      if (count == 5) f(Rows<5>(), row);
      if (count == 6) f(Rows<6>(), row);
    }
    row += count;
  }
}

// c[rows][columns] = a b, with b packed [columns / kQuad][depth][kQuad]; columns is a multiple of kQuad.
template <class T>
void multiply_quads(int64_t rows, const T* a, int64_t lda, const T* b, int64_t depth, T* c, int64_t ldc,
                    int64_t columns) {
  for (int64_t n = 0; n < columns; n += kQuad<T>) {
    for_row_groups(rows, [&](auto count, int64_t row) {
      product_tile<T, decltype(count)::kCount>(a + row * lda, lda, b + n * depth, depth, c + row * ldc + n, ldc);
    });
  }
}

template <class T>
PYATTN_INLINE int64_t whole_quads(int64_t n) {
  return (n + kQuad<T> - 1) / kQuad<T> * kQuad<T>;
}

// The row of a tensor at a step; without a step, of one that has none.
PYATTN_INLINE Matrix row_at(const StepTensor& tensor, int64_t row, int64_t step = 0) {
  char* data = static_cast<char*>(tensor.data) + (row * tensor.row + step * tensor.step) * element_size(tensor.dtype);
  return {data, tensor.row, tensor.unit, tensor.dtype};
}

// The same rows from a column on.
PYATTN_INLINE Matrix columns_from(Matrix m, int64_t column) {
  m.data += column * m.col * element_size(m.dtype);
  return m;
}

// What a run of samples, in the order of falling length, is processed as: rows of a tile.
struct SampleTile {
  int64_t first, count;
  int64_t steps;      // of the first sample, the longest
  int64_t saved_row;  // where its first step is
};

template <class T>
struct LstmTiles {
  const LstmProblem& p;
  const int64_t x_width, units, depth;  // of x and of h in whole vectors, and their sum
  const int64_t ld;                     // of rows [x, h]
  const int64_t saved_ld;
  int64_t tile_count = 0;

  int64_t *sample = nullptr, *length = nullptr;  // [batch], by falling length
  int64_t *lengths = nullptr, *starts = nullptr;
  SampleTile* tiles = nullptr;

  explicit LstmTiles(const LstmProblem& problem)
      : p(problem),
        x_width(padded<T>(p.features)),
        units(padded<T>(p.hidden)),
        depth(x_width + units),
        ld(leading_dimension<T>(depth)),
        saved_ld(5 * ((p.hidden + kSavedUnits - 1) / kSavedUnits * kSavedUnits)) {}

  static int64_t most_tiles(const LstmProblem& p) { return (p.batch + kTileSamples - 1) / kTileSamples; }

  void carve(Carver& carver) {
    sample = carver.take<int64_t>(p.batch);
    length = carver.take<int64_t>(p.batch);
    lengths = carver.take<int64_t>(p.batch);
    starts = carver.take<int64_t>(p.seq + 2);
    tiles = carver.take<SampleTile>(most_tiles(p));
  }

  int64_t worker_count() const { return smaller<int64_t>(p.threads, larger<int64_t>(most_tiles(p), 1)); }

  // Sorts the samples, equal lengths in their order, and cuts them into tiles as equal as can be. Returns -1, or the
  // first sample whose length is out of range.
  int64_t arrange() {
    for (int64_t i = 0; i < p.batch; ++i) {
      lengths[i] = p.lengths == nullptr ? p.seq : p.lengths[i * p.lengths_stride];
      if (lengths[i] < 0 || lengths[i] > p.seq) return i;
    }
    memset(starts, 0, (p.seq + 2) * sizeof(int64_t));
    for (int64_t i = 0; i < p.batch; ++i) ++starts[p.seq - lengths[i] + 1];
    for (int64_t l = 0; l < p.seq; ++l) starts[l + 1] += starts[l];
    int64_t not_empty = p.seq == 0 ? 0 : starts[p.seq];
    for (int64_t i = 0; i < p.batch; ++i) {
      const int64_t at = starts[p.seq - lengths[i]]++;
      sample[at] = i;
      length[at] = lengths[i];
    }
    const int64_t count = (not_empty + kTileSamples - 1) / kTileSamples;
    int64_t first = 0, saved_row = 0;
    for (; tile_count < count; ++tile_count) {
      const int64_t samples = (not_empty - first + count - tile_count - 1) / (count - tile_count);
      tiles[tile_count] = {first, samples, length[first], saved_row};
      for (int64_t r = 0; r < samples; ++r) saved_row += length[first + r];
      first += samples;
    }
    return -1;
  }

  int64_t position(int64_t row, int64_t step) const { return p.reverse ? length[row] - 1 - step : step; }

  // to[units] = row i of a state [batch, hidden], or zeros.
  void load_state(const StepTensor& state, int64_t i, T* to) const {
    if (state.data == nullptr) {
      memset(to, 0, units * sizeof(T));
    } else {
      pack_rows<T>(row_at(state, i), 0, 1, p.hidden, to, units);
    }
  }
  void store_state(const StepTensor& state, int64_t i, const T* from) const {
    if (state.data != nullptr) store_row<T>(row_at(state, i), 0, p.hidden, from, T(1));
  }
  // x of a row at a step, with zeros to the next whole vector.
  void load_input(int64_t row, int64_t step, T* to) const {
    pack_rows<T>(row_at(p.input, sample[row], position(row, step)), 0, 1, p.features, to, ld);
  }

  // Zeroes all steps of a row from its length on.
  void clear_padding(const StepTensor& tensor, int64_t width, int64_t row) const {
    const T zeros[kWidth<T>] = {};
    for (int64_t t = length[row]; t < p.seq; ++t) {
      for (int64_t c = 0; c < width; c += kWidth<T>) {
        const Matrix to = columns_from(row_at(tensor, sample[row], t), c);
        store_row<T>(to, 0, lanes_left<T>(width, c), zeros, T(1));
      }
    }
  }

  // Moves a state of sample i: a sample without steps ends in the state it starts in.
  void copy_state(const StepTensor& from, const StepTensor& to, int64_t i) const {
    if (to.data == nullptr) return;
    for (int64_t u = 0; u < p.hidden; u += kWidth<T>) {
      const int64_t count = lanes_left<T>(p.hidden, u);
      T lanes[kWidth<T>] = {};
      if (from.data != nullptr) pack_rows<T>(columns_from(row_at(from, i), u), 0, 1, count, lanes, kWidth<T>);
      store_row<T>(columns_from(row_at(to, i), u), 0, count, lanes, T(1));
    }
  }

  // body(row) for each sample, whatever its length.
  template <class F>
  void for_samples(const F& body) const {
    parallel_for(p.threads, p.batch, [&](int, int64_t row) { body(row); });
  }
};

template <class T>
struct LstmForwardTiles : LstmTiles<T> {
  using Base = LstmTiles<T>;
  using Base::depth;
  using Base::ld;
  using Base::length;
  using Base::sample;
  using Base::units;
  using Base::x_width;
  const LstmForward& p;

  T *weights = nullptr, *bias = nullptr;  // [vectors of units][depth][kQuad], [vectors of units][kQuad]
  // One worker's: x and h of a step, h of the next, and c.
  struct Worker {
    T *xh[2], *c;
  };
  Worker* workers = nullptr;

  explicit LstmForwardTiles(const LstmForward& problem) : Base(problem), p(problem) {
    Carver counting{nullptr};
    carve(counting);
    Carver carver{reserve_scratch(counting.bytes)};
    carve(carver);
  }

  void carve(Carver& carver) {
    Base::carve(carver);
    weights = carver.take<T>(units / kWidth<T> * depth * kQuad<T>);
    bias = carver.take<T>(units / kWidth<T> * kQuad<T>);
    workers = carver.take<Worker>(this->worker_count());
    for (int64_t i = 0; i < this->worker_count(); ++i) {
      Worker worker;
      worker.xh[0] = carver.take<T>(kTileSamples * ld);
      worker.xh[1] = carver.take<T>(kTileSamples * ld);
      worker.c = carver.take<T>(kTileSamples * units);
      if (workers != nullptr) workers[i] = worker;
    }
  }

  int64_t run() {
    if (const int64_t bad_sample = this->arrange(); bad_sample >= 0) return bad_sample;
    parallel_for(p.threads, units / kWidth<T>, [&](int, int64_t u) { pack(u); });
    parallel_for(static_cast<int>(this->worker_count()), this->tile_count,
                 [&](int worker, int64_t i) { run_tile(workers[worker], this->tiles[i]); });
    this->for_samples([&](int64_t row) {
      this->clear_padding(p.output, p.hidden, row);
      if (length[row] > 0) return;
      this->copy_state(p.h0, p.h_n, sample[row]);
      this->copy_state(p.c0, p.c_n, sample[row]);
    });
    return -1;
  }

 private:
  // The weights and the bias of a vector of units.
  void pack(int64_t u) const {
    constexpr int W = kWidth<T>;
    T* panel = weights + u * depth * kQuad<T>;
    const int64_t count = lanes_left<T>(p.hidden, u * W);
    const auto pack_weight = [&](const StepTensor& weight, int64_t columns, T* to) {
      for (int64_t gate = 0; gate < 4; ++gate) {
        const Matrix rows = row_at(weight, gate * p.hidden + u * W);
        with_storage<T>(rows.dtype, rows.data, [&](const auto* data) {
          FiniteCheck<T> unused;
          pack_columns<T>(data, rows.row, rows.col, count, columns, T(1), to + gate * W, kQuad<T>, unused);
        });
      }
      memset(to + columns * kQuad<T>, 0, (padded<T>(columns) - columns) * kQuad<T> * sizeof(T));
    };
    pack_weight(p.weight_ih, p.features, panel);
    pack_weight(p.weight_hh, p.hidden, panel + x_width * kQuad<T>);
    const StepTensor* both[] = {&p.bias_ih, &p.bias_hh};
    for (int64_t gate = 0; gate < 4; ++gate) {
      Vec<T> sum = {};
      for (const StepTensor* b : both) {
        if (b->data == nullptr) continue;
        const Matrix from = row_at(*b, gate * p.hidden + u * W);
        sum +=
            with_storage<T>(from.dtype, from.data, [&](const auto* data) { return load_some<T>(data, b->row, count); });
      }
      store(bias + u * kQuad<T> + gate * W, sum);
    }
  }

  void run_tile(const Worker& worker, const SampleTile& tile) const {
    for (int64_t r = 0; r < tile.count; ++r) {
      this->load_state(p.h0, sample[tile.first + r], worker.xh[0] + r * ld + x_width);
      this->load_state(p.c0, sample[tile.first + r], worker.c + r * units);
    }
    int64_t active = tile.count, saved_row = tile.saved_row;
    for (int64_t step = 0; step < tile.steps; ++step) {
      while (length[tile.first + active - 1] <= step) --active;
      T *xh = worker.xh[step % 2], *next = worker.xh[(step + 1) % 2] + x_width;
      for (int64_t r = 0; r < active; ++r) this->load_input(tile.first + r, step, xh + r * ld);
      run_step(active, xh, worker.c, next, saved_row);
      for (int64_t r = 0; r < active; ++r) {
        const int64_t row = tile.first + r, i = sample[row];
        store_row<T>(row_at(p.output, i, this->position(row, step)), 0, p.hidden, next + r * ld, T(1));
        if (length[row] > step + 1) continue;
        this->store_state(p.h_n, i, next + r * ld);
        this->store_state(p.c_n, i, worker.c + r * units);
      }
      saved_row += active;
    }
  }

  void run_step(int64_t rows, const T* xh, T* c, T* h, int64_t saved_row) const {
    constexpr int W = kWidth<T>;
    for (int64_t u = 0; u < units; u += W) {
      T* saved = p.saved == nullptr ? nullptr : static_cast<T*>(p.saved) + saved_row * this->saved_ld + u;
      const Cells<T> cells = {xh,
                              ld,
                              weights + u / W * depth * kQuad<T>,
                              bias + u / W * kQuad<T>,
                              depth,
                              units,
                              c + u,
                              h + u,
                              saved,
                              this->saved_ld};
      for_row_groups(rows, [&](auto count, int64_t row) { cell_tile<T, decltype(count)::kCount>(cells, row); });
    }
  }
};

template <class T>
struct LstmBackwardTiles : LstmTiles<T> {
  using Base = LstmTiles<T>;
  using Base::depth;
  using Base::ld;
  using Base::length;
  using Base::sample;
  using Base::units;
  using Base::x_width;
  const LstmBackward& p;
  const int64_t gates, ld_gates, ld_dx, ld_dh;

  // The weights as they multiply gate gradients: [quads of columns][gates][kQuad].
  T *weight_ih = nullptr, *weight_hh = nullptr;

  // Gradients of both weights, [gates][depth], and of the bias, [gates].
  struct Sums {
    T *weights, *bias;

    Sums() = default;
    Sums(Carver& carver, int64_t gates, int64_t depth)
        : weights(carver.take<T>(gates * depth)), bias(carver.take<T>(gates)) {}
  };
  Sums total = {}, *parts = nullptr;  // a part for each tile that is in work

  // One thread's: a block of steps that wait for their products, with where they are; and the state of a tile's rows.
  struct Worker {
    T *dgates, *xh, *dx;
    int64_t *row, *step;
    T *dh, *dc, *tanh_c;
    T *doutput, *c0;  // of one row

    Worker() = default;
    Worker(Carver& carver, const LstmBackwardTiles& k)
        : dgates(carver.take<T>(kBlockRows * k.ld_gates)),
          xh(carver.take<T>(kBlockRows * k.ld)),
          dx(carver.take<T>(kBlockRows * k.ld_dx)),
          row(carver.take<int64_t>(kBlockRows)),
          step(carver.take<int64_t>(kBlockRows)),
          dh(carver.take<T>(kTileSamples * k.ld_dh)),
          dc(carver.take<T>(kTileSamples * k.units)),
          tanh_c(carver.take<T>(kTileSamples * k.units)),
          doutput(carver.take<T>(k.units)),
          c0(carver.take<T>(k.units)) {}
  };
  Worker* workers = nullptr;

  explicit LstmBackwardTiles(const LstmBackward& problem)
      : Base(problem),
        p(problem),
        gates(4 * units),
        ld_gates(leading_dimension<T>(gates)),
        ld_dx(whole_quads<T>(p.features)),
        ld_dh(whole_quads<T>(p.hidden)) {
    Carver counting{nullptr};
    carve(counting);
    Carver carver{reserve_scratch(counting.bytes)};
    carve(carver);
  }

  void carve(Carver& carver) {
    Base::carve(carver);
    weight_ih = carver.take<T>(ld_dx * gates);
    weight_hh = carver.take<T>(ld_dh * gates);
    total = Sums(carver, gates, depth);
    const int64_t count = this->worker_count();
    parts = carver.take<Sums>(count);
    workers = carver.take<Worker>(count);
    for (int64_t i = 0; i < count; ++i) {
      const Sums part(carver, gates, depth);
      const Worker worker(carver, *this);
      if (workers == nullptr) continue;
      parts[i] = part;
      workers[i] = worker;
    }
  }

  int64_t run() {
    if (const int64_t bad_sample = this->arrange(); bad_sample >= 0) return bad_sample;
    pack(p.weight_ih, p.features, weight_ih);
    pack(p.weight_hh, p.hidden, weight_hh);
    if (this->tile_count == 0) clear(total);
    const int64_t count = this->worker_count();
    for (int64_t first = 0; first < this->tile_count; first += count) {
      const int64_t now = smaller(count, this->tile_count - first);
      parallel_for(static_cast<int>(count), now,
                   [&](int worker, int64_t i) { run_tile(workers[worker], this->tiles[first + i], parts[i]); });
      for (int64_t i = 0; i < now; ++i) {
        if (first + i == 0) {
          const Sums empty = total;  // the first part is the total so far, and its memory is free for the next
          total = parts[0];
          parts[0] = empty;
        } else {
          add(total, parts[i]);
        }
      }
    }
    store_sums();
    this->for_samples([&](int64_t row) {
      this->clear_padding(p.dinput, p.features, row);
      if (length[row] > 0) return;
      this->copy_state(p.dh_n, p.dh0, sample[row]);
      this->copy_state(p.dc_n, p.dc0, sample[row]);
    });
    return -1;
  }

 private:
  void pack(const StepTensor& weight, int64_t columns, T* to) const {
    parallel_for(p.threads, (columns + kQuad<T> - 1) / kQuad<T>, [&](int, int64_t q) {
      T* panel = to + q * kQuad<T> * gates;
      const int64_t width = smaller<int64_t>(kQuad<T>, columns - q * kQuad<T>);
      if (width < kQuad<T> || p.hidden < units) memset(panel, 0, gates * kQuad<T> * sizeof(T));
      for (int64_t gate = 0; gate < 4; ++gate) {
        pack_rows<T>(columns_from(row_at(weight, gate * p.hidden), q * kQuad<T>), 0, p.hidden, width,
                     panel + gate * units * kQuad<T>, kQuad<T>);
      }
    });
  }

  void clear(const Sums& sums) const {
    memset(sums.weights, 0, gates * depth * sizeof(T));
    memset(sums.bias, 0, gates * sizeof(T));
  }
  void add(const Sums& to, const Sums& part) const {
    for (int64_t i = 0; i < gates * depth; i += kWidth<T>) {
      store(to.weights + i, load(to.weights + i) + load(part.weights + i));
    }
    for (int64_t i = 0; i < gates; i += kWidth<T>) store(to.bias + i, load(to.bias + i) + load(part.bias + i));
  }
  void store_sums() const {
    for (int64_t gate = 0; gate < 4; ++gate) {
      for (int64_t u = 0; u < p.hidden; ++u) {
        const int64_t to = gate * p.hidden + u;
        const T* from = total.weights + (gate * units + u) * depth;
        store_row<T>(row_at(p.dweight_ih, to), 0, p.features, from, T(1));
        store_row<T>(row_at(p.dweight_hh, to), 0, p.hidden, from + x_width, T(1));
      }
      if (p.dbias.data == nullptr) continue;
      Matrix bias = row_at(p.dbias, gate * p.hidden);
      bias.col = p.dbias.row;
      store_row<T>(bias, 0, p.hidden, total.bias + gate * units, T(1));
    }
  }

  // All steps of a tile, the last first; sets the tile's part of the sums.
  void run_tile(const Worker& w, const SampleTile& tile, const Sums& sums) const {
    bool started = false;
    int64_t active = 0, waiting = 0, saved_row = tile.saved_row;
    for (int64_t r = 0; r < tile.count; ++r) saved_row += length[tile.first + r];
    for (int64_t step = tile.steps - 1; step >= 0; --step) {
      const int64_t were_active = active;
      active = active_rows(tile, step);
      saved_row -= active;
      for (int64_t r = were_active; r < active; ++r) start_row(w, tile.first + r, r, saved_row + r);
      if (waiting + active > kBlockRows) {
        multiply_block(w, waiting, sums, started);
        started = true;
        waiting = 0;
      }
      const int64_t before = saved_row - (step > 0 ? active_rows(tile, step - 1) : 0);
      for (int64_t r = 0; r < active; ++r) {
        w.row[waiting + r] = tile.first + r;
        w.step[waiting + r] = step;
        step_row(w, tile.first + r, r, step, saved_row + r, before + r, waiting + r);
      }
      multiply_quads<T>(active, w.dgates + waiting * ld_gates, ld_gates, weight_hh, gates, w.dh, ld_dh, ld_dh);
      waiting += active;
    }
    multiply_block(w, waiting, sums, started);
    for (int64_t r = 0; r < tile.count; ++r) {
      this->store_state(p.dh0, sample[tile.first + r], w.dh + r * ld_dh);
      this->store_state(p.dc0, sample[tile.first + r], w.dc + r * units);
    }
  }

  int64_t active_rows(const SampleTile& tile, int64_t step) const {
    int64_t rows = tile.count;
    while (length[tile.first + rows - 1] <= step) --rows;
    return rows;
  }

  const T* saved(int64_t row) const { return static_cast<const T*>(p.saved) + row * this->saved_ld; }

  // The state of row r of a tile at its last step.
  void start_row(const Worker& w, int64_t row, int64_t r, int64_t saved_row) const {
    this->load_state(p.dh_n, sample[row], w.dh + r * ld_dh);
    this->load_state(p.dc_n, sample[row], w.dc + r * units);
    const T* c = saved(saved_row) + 4 * units;
    for (int64_t u = 0; u < units; u += kWidth<T>) store(w.tanh_c + r * units + u, tanh<T>(load(c + u)));
  }

  // One step of a row: its gate gradients and [x, h before] to row `to` of the block, dc and tanh(c) of the step
  // before.
  void step_row(const Worker& w, int64_t row, int64_t r, int64_t step, int64_t saved_row, int64_t saved_before,
                int64_t to) const {
    T* h_before = w.xh + to * ld + x_width;
    this->load_input(row, step, w.xh + to * ld);
    if (p.doutput.data != nullptr) {
      const Matrix from = row_at(p.doutput, sample[row], this->position(row, step));
      pack_rows<T>(from, 0, 1, p.hidden, w.doutput, units);
    }
    const T *now = saved(saved_row), *before = saved(saved_before), *c_before = before + 4 * units;
    if (step == 0) {
      this->load_state(p.h0, sample[row], h_before);
      this->load_state(p.c0, sample[row], w.c0);
      c_before = w.c0;
    }
    T *dc = w.dc + r * units, *tanh_c = w.tanh_c + r * units, *dgates = w.dgates + to * ld_gates;
    for (int64_t u = 0; u < units; u += kWidth<T>) {
      const Vec<T> in = load(now + u), forget = load(now + units + u);
      const Vec<T> candidate = load(now + 2 * units + u), out = load(now + 3 * units + u);
      const Vec<T> t = load(tanh_c + u), c = load(c_before + u);
      Vec<T> dh = load(w.dh + r * ld_dh + u);
      if (p.doutput.data != nullptr) dh += load(w.doutput + u);
      const Vec<T> d = load(dc + u) + dh * out * (T(1) - t * t);
      store(dgates + u, d * candidate * in * (T(1) - in));
      store(dgates + units + u, d * c * forget * (T(1) - forget));
      store(dgates + 2 * units + u, d * in * (T(1) - candidate * candidate));
      store(dgates + 3 * units + u, dh * t * out * (T(1) - out));
      store(dc + u, d * forget);
      if (step == 0) continue;
      const Vec<T> t_before = tanh<T>(c);
      store(tanh_c + u, t_before);
      store(h_before + u, load(before + 3 * units + u) * t_before);
    }
  }

  // The products of a block's gate gradients: with x and h before, summed over its rows, set or, if `started`, added;
  // and dx.
  void multiply_block(const Worker& w, int64_t rows, const Sums& sums, bool started) const {
    for (int64_t first = 0; first < gates; first += kBlockGates) {
      const int64_t end = smaller(first + kBlockGates, gates);
      for (int64_t n = 0; n < depth; n += kPanel<T>) {
        const int vectors = static_cast<int>(smaller<int64_t>(kNV, (depth - n) / kWidth<T>));
        for (int64_t m = first; m < end; m += kMR) {
          const int count = static_cast<int>(smaller<int64_t>(kMR, end - m));
          for (int64_t i = 0; i < rows; i += kStepDepth) {
            tile_of<T>(count, vectors)(w.dgates + i * ld_gates + m, 1, ld_gates, w.xh + i * ld + n, ld,
                                       sums.weights + m * depth + n, depth, smaller(kStepDepth, rows - i),
                                       started || i > 0);
          }
        }
      }
    }
    for (int64_t g = 0; g < gates; g += kWidth<T>) {
      Vec<T> sum = {};
      for (int64_t i = 0; i < rows; ++i) sum += load(w.dgates + i * ld_gates + g);
      store(sums.bias + g, started ? load(sums.bias + g) + sum : sum);
    }
    multiply_quads<T>(rows, w.dgates, ld_gates, weight_ih, gates, w.dx, ld_dx, ld_dx);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = w.row[i];
      store_row<T>(row_at(p.dinput, sample[row], this->position(row, w.step[i])), 0, p.features, w.dx + i * ld_dx,
                   T(1));
    }
  }
};
