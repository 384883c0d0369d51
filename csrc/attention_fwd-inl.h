// Forward: tiled online softmax (FlashAttention-2, arXiv 2307.08691, Algorithm 1).
//
// Per key/value head, K^T and V are packed once and shared by the group's query heads. Then, for kQueryBlock queries at
// a time and up to kKeyBlock units of keys: scores = q K^T into a buffer, one softmax step per row in place, and
// acc += P V unit by unit. Units that no query of the block sees are left out of the buffer, so that below the softmax
// nothing knows of skipping.
//
// Where one block is all that reads a head's keys, they are packed as it comes to them; and for very few queries they
// are read in place, on the assumption that all is finite. A result that is not tells that it was wrong, and is
// computed again from packed keys.

// Queries per block and units of keys per block: 24 x 512 scores are 48 KB, which with a unit of K^T or V stays within
// the L2 cache, while up to 512 keys need no rescaling at all. (48 or 96 queries, 2 or 4 units: within the noise or
// slower at seven shapes; Zen 3, AVX2, one thread.)
constexpr int kQueryBlock = 24;
constexpr int kKeyBlock = 8;
static_assert(kQueryBlock % kMR == 0);  // groups of a block are groups of the mask's summary
constexpr int kQueryGroups = (kQueryBlock + kMR - 1) / kMR;
// Scores of one row; the extra vector keeps rows of a group off each other's cache sets.
template <class T>
constexpr int kScoreStride = kKeyBlock * kUnit + 64 / sizeof(T);

// K and V of one key/value head as the kernel reads them. A key whose K or V row holds an infinity or NaN is packed as
// zeros and marked: the rows that attend it are made NaN one by one, and no matrix product meets a non-finite number
// that the mask hides (0 * NaN is NaN).
template <class T>
struct PackedKeys {
  T* k;              // [unit][panel][D][kPanel], times scale; by rows, [key][ldk], without
  T* v;              // [key][ldv]
  uint8_t* marked;   // [unit]: some key of the unit is marked
  uint8_t* bad_key;  // [key], valid in marked units

  PackedKeys() = default;
  PackedKeys(Carver& carver, int64_t units, int64_t ldk, int64_t ldv) {
    k = carver.take<T>(units * kUnit * ldk);
    v = carver.take<T>(units * kUnit * ldv);
    marked = carver.take<uint8_t>(units);
    bad_key = carver.take<uint8_t>(units * kUnit);
  }
};

// Buffers of one thread for one block of queries.
template <class T>
struct QueryBlock {
  T* q;       // [kQueryBlock][ldq]
  T* scores;  // [kQueryBlock][kScoreStride]
  T* acc;     // [kQueryBlock][ldv], the unnormalised output

  QueryBlock() = default;
  QueryBlock(Carver& carver, int64_t ldq, int64_t ldv) {
    q = carver.take<T>(kQueryBlock * ldq);
    scores = carver.take<T>(kQueryBlock * kScoreStride<T>);
    acc = carver.take<T>(kQueryBlock * ldv);
  }
};

// One unit of keys in the score buffer, and where its keys are.
template <class T>
struct Slot {
  int64_t first_key;
  const T *k, *v;
  int64_t ldk, ldv;
  const uint8_t* bad_key;  // nullptr: none is marked
  GroupView groups[kQueryGroups];
};

// The online softmax of a block's rows: m is the maximum of a row's scores so far, l the sum of e^(score - m). A step
// passes over the scores twice, for maxima and for exponentials. Each pass leaves one vector per row, and those are
// reduced together, as are m and l taken on: by single rows, a forward of 16 to 77 keys takes 5 to 10 % longer (Zen 3,
// AVX2).
template <class T>
struct SoftmaxRows {
  static constexpr int kRows = (kQueryBlock + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
  T m[kRows], l[kRows];
  bool poisoned[kRows];  // attends a non-finite input

  // Of the current step.
  Vec<T> lanes[kRows];
  T pivot[kRows];    // subtracted from the scores: m, but 0 for -inf, since -inf - -inf would be NaN
  T rescale[kRows];  // what earlier sums are multiplied by, 1 if the maximum did not grow

  explicit SoftmaxRows(int rows) {
    for (int i = 0; i < padded<T>(rows); ++i) {
      m[i] = -T(INFINITY);
      l[i] = 0;
      poisoned[i] = false;
      lanes[i] = Vec<T>{};
    }
  }

  // Takes in lanes[i], the maximum of row i by lanes.
  void raise_maxima(int rows) {
    for (int i = 0; i < rows; i += kWidth<T>) {
      const Vec<T> before = load(m + i), after = max<T>(reduce_rows<T>(lanes + i, max<T>), before);
      const Vec<T> from = after == -T(INFINITY) ? Vec<T>{} : after, factor = exp(before - from);
      store(m + i, after);
      store(pivot + i, from);
      store(rescale + i, factor);
      store(l + i, load(l + i) * factor);
    }
  }

  // Takes in lanes[i], the sum of row i's exponentials by lanes.
  void add_sums(int rows) {
    const auto add = [](Vec<T> a, Vec<T> b) { return a + b; };
    for (int i = 0; i < rows; i += kWidth<T>) store(l + i, load(l + i) + reduce_rows<T>(lanes + i, add));
  }
};

// The maximum of scores[0, n), by lanes. scores has room for whole vectors; the last one is filled up.
template <class T>
Vec<T> maximum(T* scores, int n) {
  constexpr int W = kWidth<T>;
  const int end = (n + W - 1) / W * W;
  for (int c = n; c < end; ++c) scores[c] = -T(INFINITY);
  Vec<T> max0 = broadcast(-T(INFINITY)), max1 = max0;
  int c = 0;
  for (; c + W < end; c += 2 * W) {
    max0 = max<T>(max0, load(scores + c));
    max1 = max<T>(max1, load(scores + c + W));
  }
  if (c < end) max0 = max<T>(max0, load(scores + c));
  return max<T>(max0, max1);
}

// scores[0, n) become e^(score - pivot); returns their sum, by lanes. (In base e, not 2, although that costs the
// exponential nothing: a row dominated by one key then has lse = m exactly, and the backward finds P = 1 for it, not
// 1 + eps * |m|.)
template <class T>
Vec<T> exponentiate(T* scores, int n, T pivot) {
  constexpr int W = kWidth<T>;
  Vec<T> sum0 = {}, sum1 = {};
  int c = 0;
  for (; c + W < n; c += 2 * W) {
    const Vec<T> p0 = exp(load(scores + c) - pivot), p1 = exp(load(scores + c + W) - pivot);
    store(scores + c, p0);
    store(scores + c + W, p1);
    sum0 += p0;
    sum1 += p1;
  }
  if (c < n) {
    const Vec<T> p0 = exp(load(scores + c) - pivot);
    store(scores + c, p0);
    sum0 += p0;
  }
  return sum0 + sum1;
}

// Up to so many queries, K is not worth transposing, and each score is a dot product of two rows. (One query, 12 heads,
// 1024 keys of 64: 670 us transposed, 254 so and in place; four queries: 920 and 525. Zen 3, AVX2, one thread.)
constexpr int kFewQueries = 4;
static_assert(kFewQueries <= kMR);

// scores[i][c] = scale q[i].k[c], filled up to a whole vector by repetitions of the last key; returns whether all are
// finite. A sum per lane, and those as a tree: short sums, whatever D.
template <class T>
bool multiply_few(int rows, const T* q, int64_t ldq, const T* k, int64_t ldk, int64_t depth, int keys, T scale,
                  T* scores, int64_t ld) {
  constexpr int W = kWidth<T>;
  const auto add = [](Vec<T> a, Vec<T> b) { return a + b; };
  FiniteCheck<T> check;
  for (int c = 0; c < keys; c += W) {
    const T* key[W];
    for (int j = 0; j < W; ++j) key[j] = k + smaller(c + j, keys - 1) * ldk;
    for (int i = 0; i < rows; ++i) {
      Vec<T> lanes[W] = {};
      for (int64_t d = 0; d < depth; d += W) {
        const Vec<T> x = load(q + i * ldq + d);
#pragma GCC unroll 16
        for (int j = 0; j < W; ++j) lanes[j] += x * load(key[j] + d);
      }
      const Vec<T> product = reduce_rows<T>(lanes, add);
      check.add(product);
      store(scores + i * ld + c, product * scale);
    }
  }
  return check.all_finite();
}

template <class T>
struct Forward {
  const AttentionForward& p;
  const int64_t units;
  const bool by_rows;   // K is not transposed; a question of shape alone, since it decides the order of sums
  const bool in_place;  // keys can be read as they lie in memory
  const bool streamed;  // else they are packed while they are read, for a head's are read once
  const int64_t ldq, ldk, ldv;
  MaskSummary mask;

  explicit Forward(const AttentionForward& problem)
      : p(problem),
        units((p.S + kUnit - 1) / kUnit),
        by_rows(p.L <= kFewQueries),
        in_place(by_rows && element_size(p.k.dtype) == sizeof(T) && p.k.col == 1 && p.v.col == 1 &&
                 p.D % kWidth<T> == 0 && p.Dv % kWidth<T> == 0),
        streamed(in_place || (p.Hq == p.Hkv && p.L <= kQueryBlock)),
        ldq(padded<T>(p.D)),
        ldk(by_rows ? ldq : p.D),
        ldv(leading_dimension<T>(p.Dv)),
        mask(problem) {}

  // Units that PackedKeys has room for.
  int64_t packed_units() const { return streamed ? smaller<int64_t>(units, kKeyBlock) : units; }

  // Packs a unit of the head as unit `at` of `to`.
  void pack_unit(int64_t b, int64_t kv_head, int64_t unit, int64_t at, const PackedKeys<T>& to) const {
    const int64_t first = unit * kUnit, keys = smaller<int64_t>(kUnit, p.S - first);
    const Matrix k = matrix(p, p.k, b, kv_head), v = matrix(p, p.v, b, kv_head);
    T *to_k = to.k + at * kUnit * ldk, *to_v = to.v + at * kUnit * ldv;
    const bool k_finite = by_rows ? pack_rows<T>(k, first, keys, p.D, to_k, ldk)
                                  : pack_transposed<T>(k, first, keys, p.D, static_cast<T>(p.scale), to_k);
    const bool finite = k_finite & pack_rows<T>(v, first, keys, p.Dv, to_v, ldv);
    to.marked[at] = !finite;
    if (finite) return;
    uint8_t* bad_key = to.bad_key + at * kUnit;
    for (int64_t c = 0; c < keys; ++c) {
      bad_key[c] = !row_is_finite<T>(k, first + c, p.D) || !row_is_finite<T>(v, first + c, p.Dv);
      if (!bad_key[c]) continue;
      if (by_rows) {
        memset(to_k + c * ldk, 0, ldk * sizeof(T));
      } else {
        clear_packed_key(to_k, c, p.D);
      }
      memset(to_v + c * ldv, 0, ldv * sizeof(T));
    }
  }

  // The queries [first, first + rows) of head h of batch element b. Returns false, with nothing stored, if something is
  // not finite that was read in_place.
  bool query_block(int64_t b, int64_t h, int64_t first, int rows, const PackedKeys<T>& keys, bool in_place,
                   const QueryBlock<T>& block) const {
    const ScoreMaker<T> maker(p, mask, b, h);
    const Dropout dropout(p, b, h);
    SoftmaxRows<T> softmax(rows);
    const Matrix q = matrix(p, p.q, b, h);
    const bool finite = pack_rows<T>(q, first, rows, p.D, block.q, ldq);
    for (int i = 0; !finite && i < rows; ++i) {
      softmax.poisoned[i] = !row_is_finite<T>(q, first + i, p.D);
      if (softmax.poisoned[i]) memset(block.q + i * ldq, 0, ldq * sizeof(T));
    }

    const int64_t kv_head = h / (p.Hq / p.Hkv), end = maker.visible.row_end(first + rows - 1);
    bool started = false, all_finite = true;
    for (int64_t unit = 0; unit * kUnit < end;) {
      Slot<T> slots[kKeyBlock];
      int count = 0;
      for (; count < kKeyBlock && unit * kUnit < end; ++unit) {
        Slot<T>& slot = slots[count];
        slot.first_key = unit * kUnit;
        if (!maker.visible.view(first, rows, slot.first_key, slot.groups)) continue;
        if (in_place) {
          take_in_place(b, kv_head, slot);
        } else {
          const int64_t at = streamed ? count : unit;
          if (streamed) pack_unit(b, kv_head, unit, at, keys);
          take_packed(keys, at, slot);
        }
        ++count;
      }
      all_finite &= key_block(maker, dropout, first, rows, slots, count, started, block, softmax);
      started |= count > 0;
    }
    for (int i = 0; in_place && i < rows; ++i) {
      if (softmax.l[i] != 0) all_finite &= row_is_finite<T>(accumulated(block), i, p.Dv);
    }
    if (in_place && !all_finite) return false;
    finish(b, h, first, rows, dropout, block, softmax);
    return true;
  }

 private:
  void take_packed(const PackedKeys<T>& keys, int64_t at, Slot<T>& slot) const {
    slot.k = keys.k + at * kUnit * ldk;
    slot.v = keys.v + at * kUnit * ldv;
    slot.ldk = ldk;
    slot.ldv = ldv;
    slot.bad_key = keys.marked[at] ? keys.bad_key + at * kUnit : nullptr;
  }

  void take_in_place(int64_t b, int64_t kv_head, Slot<T>& slot) const {
    const Matrix k = matrix(p, p.k, b, kv_head), v = matrix(p, p.v, b, kv_head);
    slot.k = reinterpret_cast<const T*>(k.data) + slot.first_key * k.row;
    slot.v = reinterpret_cast<const T*>(v.data) + slot.first_key * v.row;
    slot.ldk = k.row;
    slot.ldv = v.row;
    slot.bad_key = nullptr;
  }

  Matrix accumulated(const QueryBlock<T>& block) const {
    return {reinterpret_cast<char*>(block.acc), ldv, 1, sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32};
  }

  // acc and softmax take in the keys of `slots`; acc is set if nothing has `started` it. Returns whether all products
  // of q and k are finite, as far as that is known for nothing.
  bool key_block(const ScoreMaker<T>& maker, const Dropout& dropout, int64_t first, int rows, const Slot<T>* slots,
                 int count, bool started, const QueryBlock<T>& block, SoftmaxRows<T>& softmax) const {
    constexpr int ld = kScoreStride<T>;
    bool all_finite = true;
    for (int s = 0; s < count; ++s) {
      const Slot<T>& slot = slots[s];
      T* scores = block.scores + s * kUnit;
      if (by_rows) {
        const T scale = static_cast<T>(p.scale);
        const int columns = slot.groups[0].end;
        all_finite &= multiply_few<T>(rows, block.q, ldq, slot.k, slot.ldk, ldq, columns, scale, scores, ld);
      } else {
        multiply_panels<T>(rows, block.q, ldq, slot.k, p.D, scores, ld, slot.groups);
      }
    }
    int seen[kQueryBlock] = {};
    for (int s = 0; s < count; ++s) {
      finish_scores(maker, first, rows, slots[s], s * kUnit, block.scores, seen, softmax.poisoned);
    }
    for (int i = 0; i < rows; ++i) softmax.lanes[i] = maximum(block.scores + i * ld, seen[i]);
    softmax.raise_maxima(rows);
    for (int i = 0; i < rows; ++i) softmax.lanes[i] = exponentiate(block.scores + i * ld, seen[i], softmax.pivot[i]);
    softmax.add_sums(rows);

    for (int g = 0; g < row_groups(rows); ++g) {
      int end = 0;  // of what the group has computed
      for (int s = 0; s < count; ++s) {
        if (slots[s].groups[g].end > 0) end = s * kUnit + slots[s].groups[g].end;
      }
      for (int i = g * kMR; i < smaller(rows, (g + 1) * kMR); ++i) {
        for (int c = seen[i]; c < end; ++c) block.scores[i * ld + c] = 0;
      }
    }
    for (int i = 0; dropout.on && i < rows; ++i) {
      for (int s = 0; s * kUnit < seen[i]; ++s) {
        uint32_t words[kUnit];
        dropout.draw(first + i, slots[s].first_key, words);
        dropout.drop(words, smaller(kUnit, seen[i] - s * kUnit), block.scores + i * ld + s * kUnit);
      }
    }
    for (int i = 0; started && i < rows; ++i) {
      if (softmax.rescale[i] == 1) continue;
      for (int64_t d = 0; d < p.Dv; d += kWidth<T>) {
        T* acc = block.acc + i * ldv + d;
        store(acc, load(acc) * softmax.rescale[i]);
      }
    }
    for (int s = 0; s < count; ++s) {
      Range depth[kQueryGroups];
      for (int g = 0; g < row_groups(rows); ++g) depth[g] = {slots[s].groups[g].begin, slots[s].groups[g].end};
      multiply_rows<T>(rows, block.scores + s * kUnit, ld, 1, slots[s].v, slots[s].ldv,
                       static_cast<int>(padded<T>(p.Dv)), block.acc, ldv, depth, started || s > 0);
    }
    return all_finite;
  }

  // Products with the unit of `slot`, at `offset` of a row's scores, become scores; columns before them that a row has
  // not seen become -inf. seen[i] is the number of columns up to the last one that row i sees.
  void finish_scores(const ScoreMaker<T>& maker, int64_t first, int rows, const Slot<T>& slot, int offset, T* scores,
                     int* seen, bool* poisoned) const {
    for (int i = 0; i < rows; ++i, scores += kScoreStride<T>) {
      const GroupView& view = slot.groups[i / kMR];
      const int n = maker.visible.columns(first + i, slot.first_key, view.end);
      if (n == 0) continue;
      for (int c = seen[i]; c < offset; ++c) scores[c] = -T(INFINITY);
      maker.finish(first + i, slot.first_key, n, view.masked, scores + offset);
      if (slot.bad_key != nullptr) poisoned[i] |= attends(slot.bad_key, scores + offset, n);
      seen[i] = offset + n;
    }
  }

  // Whether one of the marked keys has a score that takes part.
  static bool attends(const uint8_t* bad_key, const T* scores, int n) {
    for (int c = 0; c < n; ++c) {
      if (bad_key[c] && scores[c] != -T(INFINITY)) return true;
    }
    return false;
  }

  // Normalises and writes out and lse.
  void finish(int64_t b, int64_t h, int64_t first, int rows, const Dropout& dropout, const QueryBlock<T>& block,
              const SoftmaxRows<T>& softmax) const {
    const Matrix out = matrix(p, p.out, b, h), lse = matrix(p, p.lse, b, h);
    for (int i = 0; i < rows; ++i) {
      const bool empty = softmax.l[i] == 0;  // nothing to attend to, or only scores of -inf
      const T l = softmax.poisoned[i] && !empty ? T(NAN) : softmax.l[i];
      if (empty) memset(block.acc + i * ldv, 0, ldv * sizeof(T));  // it may never have been set
      store_row<T>(out, first + i, p.Dv, block.acc + i * ldv, empty ? T(0) : static_cast<T>(dropout.keep_scale) / l);
      if (p.lse.data == nullptr) continue;
      element<T>(lse, first + i) = empty ? -T(INFINITY) : softmax.m[i] + log(l);
    }
  }
};

// A call of fewer multiplications than this takes a few microseconds: not worth waking a second thread, which takes
// one.
template <class T>
int useful_threads(const AttentionProblem& p) {
  constexpr double kMinProducts = 1 << 17;
  return static_cast<double>(p.B) * p.Hq * p.L * p.S * (p.D + p.Dv) < kMinProducts ? 1 : p.threads;
}

// Tasks per thread from which whole heads are dealt out; below that, a head's blocks are.
constexpr int kHeadsPerThread = 4;

template <class T>
void attention_forward(const AttentionForward& p) {
  Forward<T> kernel(p);
  const int threads = useful_threads<T>(p);
  const int64_t kv_heads = p.B * p.Hkv, group = p.Hkv == 0 ? 0 : p.Hq / p.Hkv;
  const int64_t blocks = (p.L + kQueryBlock - 1) / kQueryBlock;
  const bool by_head = threads == 1 || kv_heads >= kHeadsPerThread * threads;

  const int64_t packs = kernel.streamed ? threads : by_head ? smaller<int64_t>(threads, kv_heads) : kv_heads;
  PackedKeys<T>* keys = nullptr;
  QueryBlock<T>* buffers = nullptr;
  const auto lay_out = [&](Carver carver) {
    keys = carver.take<PackedKeys<T>>(packs);
    buffers = carver.take<QueryBlock<T>>(threads);
    kernel.mask.blocks.data = carver.take<GroupView>(kernel.mask.count);
    for (int64_t i = 0; i < packs; ++i) {
      const PackedKeys<T> piece(carver, kernel.packed_units(), kernel.ldk, kernel.ldv);
      if (keys != nullptr) keys[i] = piece;
    }
    for (int i = 0; i < threads; ++i) {
      const QueryBlock<T> piece(carver, kernel.ldq, kernel.ldv);
      if (buffers != nullptr) buffers[i] = piece;
    }
    return carver.bytes;
  };
  lay_out({reserve_scratch(lay_out({nullptr}))});
  if (p.mask.data != nullptr) kernel.mask.fill(p, threads);

  const auto run_block = [&](int64_t kv, int64_t g, int64_t block, const PackedKeys<T>& packed, int worker) {
    const int64_t first = block * kQueryBlock;
    const int rows = static_cast<int>(smaller<int64_t>(kQueryBlock, p.L - first));
    const int64_t b = kv / p.Hkv, h = kv % p.Hkv * group + g;
    if (kernel.in_place && kernel.query_block(b, h, first, rows, packed, true, buffers[worker])) return;
    kernel.query_block(b, h, first, rows, packed, false, buffers[worker]);
  };
  const int64_t heads = kv_heads * group;
  if (kernel.streamed) {
    parallel_for(threads, heads,
                 [&](int worker, int64_t i) { run_block(i / group, i % group, 0, keys[worker], worker); });
    return;
  }
  if (by_head) {
    parallel_for(threads, kv_heads, [&](int worker, int64_t kv) {
      for (int64_t u = 0; u < kernel.units; ++u) kernel.pack_unit(kv / p.Hkv, kv % p.Hkv, u, u, keys[worker]);
      for (int64_t i = 0; i < group * blocks; ++i) run_block(kv, i / blocks, i % blocks, keys[worker], worker);
    });
    return;
  }
  parallel_for(threads, kv_heads * kernel.units, [&](int, int64_t i) {
    const int64_t kv = i / kernel.units;
    kernel.pack_unit(kv / p.Hkv, kv % p.Hkv, i % kernel.units, i % kernel.units, keys[kv]);
  });
  // The last blocks first: under a causal mask they are the longest.
  parallel_for(threads, heads * blocks, [&](int worker, int64_t i) {
    const int64_t head = i % heads;
    run_block(head / group, head % group, blocks - 1 - i / heads, keys[head / group], worker);
  });
}
