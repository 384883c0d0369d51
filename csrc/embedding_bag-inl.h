// Embedding bag: out = A table, where row b of the sparse matrix A holds the weights of bag b's tokens, and backward,
// dtable = A^T dout.
//
// A is a list of terms: the tokens that count, what their bag divides by already in the weights of the transpose.
// Padding is left out as the list is made: every token is written, and the end of the list moves past those that count,
// so that neither this loop nor the sums branch on padding. The transposition is a stable radix sort by table row: the
// terms of a row come together, in the order of their bags, and each row of the gradient is summed in registers and
// written once, whichever thread does it.

// Row `from` of the matrix that is read, times weight, is part of row `to` of the one that is written.
template <class T>
struct Term {
  uint32_t from, to;
  T weight;
};

// Terms that are added up before they join the total, so that neither sum is long enough to lose digits.
constexpr int64_t kSumTerms = 64;

// A row is fetched this many terms before it is added: rows lie anywhere, which no hardware foresees. The forward of
// 256 bags of 100 uniform ids out of 10000 rows of 128 floats takes, of torch's time in the same process, 1.2 to 1.3
// without, 0.75 to 0.85 with 8 and 0.9 to 1.0 with 16 (Zen 3, under load). Fetching whole rows in the first pass over
// the columns instead of each pass its own takes 1.2 times as long as this.
constexpr int64_t kTermsAhead = 8;

// Chunks of work for one thread read about this many elements.
constexpr int64_t kBagChunkElements = 32768;

// The most bits of a radix sort's digit: the counters of one take 16 KB.
constexpr int kDigitBits = 11;

// ---- Sums and maxima of listed rows

// The columns of a matrix from some column on. whole: vectors of neighbours; else one vector of `count` <= kWidth.
template <class T, class S, bool whole>
struct Columns {
  const S* data;
  int64_t row, col, count;

  PYATTN_INLINE Vec<T> operator()(uint32_t r, int vector) const {
    if constexpr (whole) return load(data + r * row + vector * kWidth<T>);
    return load_some<T>(data + r * row, col, count);
  }
  PYATTN_INLINE void prefetch(uint32_t r, int vectors) const {
    if constexpr (whole) {
      const char* line = reinterpret_cast<const char*>(data + r * row);
      for (int byte = 0; byte < vectors * kWidth<T> * static_cast<int>(sizeof(S)); byte += 64) {
        __builtin_prefetch(line + byte);
      }
    }
  }
};

template <int n>
struct Count {
  static constexpr int value = n;
};

// f(columns, first column, Count<vectors>) for all E columns, as many vectors at once as registers hold; the last
// vector overlaps the one before it.
template <class T, class S, class F>
PYATTN_INLINE void for_columns(const S* data, int64_t row, int64_t col, int64_t E, const F& f) {
  constexpr int W = kWidth<T>;
  int64_t c = 0;
  const auto block = [&](auto vectors) __attribute__((always_inline)) {
    f(Columns<T, S, true>{data + c, row, 1, W}, c, vectors);
    c += vectors.value * W;
  };
  if (col == 1 && E >= W) {
    while (c + 8 * W <= E) block(Count<8>{});
    if (c + 4 * W <= E) block(Count<4>{});
    if (c + 2 * W <= E) block(Count<2>{});
    if (c + W <= E) block(Count<1>{});
    if (c < E) {
      c = E - W;
      block(Count<1>{});
    }
    return;
  }
  for (; c < E; c += W) f(Columns<T, S, false>{data + c * col, row, col, lanes_left<T>(E, c)}, c, Count<1>{});
}

// to = the sum over the terms of weight * row.
template <int N, class T, class C>
PYATTN_INLINE void sum_terms(const Term<T>* terms, int64_t n, const C& columns, T* to) {
  Vec<T> total[N] = {};
  for (int64_t first = 0; first < n; first += kSumTerms) {
    const int64_t end = smaller(first + kSumTerms, n);
    Vec<T> sum[N] = {};
    for (int64_t t = first; t < end; ++t) {
      columns.prefetch(terms[smaller(t + kTermsAhead, n - 1)].from, N);
      const Vec<T> weight = broadcast(terms[t].weight);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) sum[i] += columns(terms[t].from, i) * weight;
    }
    for (int i = 0; i < N; ++i) total[i] += sum[i];
  }
  for (int i = 0; i < N; ++i) store(to + i * kWidth<T>, total[i]);
}

// to = the maximum over the n > 0 terms, and whose it is, of equal ones the first; a NaN is larger than anything.
template <int N, class T, class C>
PYATTN_INLINE void max_terms(const Term<T>* terms, int64_t n, const C& columns, T* to, int32_t* largest) {
  Vec<T> m[N];
  IntVec<T> id[N];
  for (int i = 0; i < N; ++i) m[i] = columns(terms[0].from, i), id[i] = IntVec<T>{} + terms[0].from;
  for (int64_t t = 1; t < n; ++t) {
    columns.prefetch(terms[smaller(t + kTermsAhead, n - 1)].from, N);
    for (int i = 0; i < N; ++i) {
      const Vec<T> x = columns(terms[t].from, i);
      const IntVec<T> larger = (IntVec<T>)(m[i] == m[i]) & ~(IntVec<T>)(x <= m[i]);
      m[i] = larger ? x : m[i];
      id[i] = larger ? IntVec<T>{} + terms[t].from : id[i];
    }
  }
  for (int i = 0; i < N; ++i) {
    store(to + i * kWidth<T>, m[i]);
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      largest[i * kWidth<T> + lane] = static_cast<int32_t>(id[i][lane]);
    }
  }
}

// ---- The tokens that count

inline int64_t integer(const BagIntegers& x, int64_t i) {
  return x.wide ? static_cast<const int64_t*>(x.data)[i * x.stride] : static_cast<const int32_t*>(x.data)[i * x.stride];
}

// The terms of one bag.
template <class T>
struct Bag {
  int64_t count;
  T divisor;  // of their sum; never 0
  bool fits;  // whether every id is a row
};

template <class T>
struct EmbeddingBag {
  const EmbeddingBagProblem& p;
  const int64_t chunk_bags, chunks;
  int64_t longest = 0;  // tokens of a bag, at most
  int64_t bad_bag = -1;

  explicit EmbeddingBag(const EmbeddingBagProblem& problem)
      : p(problem),
        chunk_bags(larger<int64_t>(1, kBagChunkElements * larger<int64_t>(1, p.bags) / (1 + terms_at_most(p) * p.E))),
        chunks((p.bags + chunk_bags - 1) / chunk_bags) {
    for (int64_t b = p.bags - 1; b >= 0; --b) {
      const int64_t first = begin(b), end = this->end(b);
      if (first < 0 || end < first || end > p.tokens || (b == 0 && first != 0)) bad_bag = b;
      longest = larger(longest, end - first);
    }
  }

  static int64_t terms_at_most(const EmbeddingBagProblem& p) {
    return p.offsets.data != nullptr ? p.tokens : p.bags * p.tokens;
  }

  int64_t begin(int64_t b) const { return p.offsets.data == nullptr ? 0 : integer(p.offsets, b); }
  int64_t end(int64_t b) const {
    if (p.offsets.data != nullptr) return b + 1 < p.bags || p.last_offset ? integer(p.offsets, b + 1) : p.tokens;
    return p.lengths.data == nullptr ? p.tokens : integer(p.lengths, b);
  }

  T weight(int64_t b, int64_t token) const {
    return with_storage<T>(p.weight.dtype, static_cast<char*>(p.w.data), [&](const auto* w) {
      return static_cast<T>(load_some<T>(w + b * p.w.bag + token * p.w.token, 1, 1)[0]);
    });
  }

  // Lists the terms of bag b, as of A or of its transpose, and, unless `places` is null, which tokens they are.
  // `simple`: nothing but the padding's id keeps a token from counting, and all weigh 1.
  template <class I, bool transposed, bool simple>
  Bag<T> list(int64_t b, Term<T>* terms, int64_t* places) const {
    const int64_t first = begin(b), tokens = end(b) - first;
    const I* ids = static_cast<const I*>(p.ids.data) + b * p.ids.bag + first * p.ids.token;
    const uint8_t* mask = static_cast<const uint8_t*>(p.mask.data) + b * p.mask.bag + first * p.mask.token;
    const bool any_id = !p.has_padding;
    const uint64_t keep_from = static_cast<uint64_t>(p.dropout_p * 0x1p32);
    const uint32_t bag = static_cast<uint32_t>(b);
    uint32_t words[kUnit];
    int64_t n = 0;
    bool fits = true;
    double total = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t id = ids[t * p.ids.token];
      bool counts = any_id | (id != p.padding_idx);
      if (!simple && p.mask.data != nullptr) counts &= mask[t * p.mask.token] != 0;
      fits &= !counts | (static_cast<uint64_t>(id) < static_cast<uint64_t>(p.V));
      const uint32_t row = static_cast<uint32_t>(id);
      T w = 1;
      if constexpr (!simple) {
        if (p.dropout_p > 0) {
          if (t % kUnit == 0) philox_words({p.seed, 0, 0, bag}, t, words);
          counts &= words[t % kUnit] >= keep_from;
        }
        if (p.w.data != nullptr && counts) w = weight(b, first + t);
        if (places != nullptr) places[n] = first + t;
        total += counts ? static_cast<double>(w) : 0.0;
      }
      terms[n] = transposed ? Term<T>{bag, row, w} : Term<T>{row, bag, w};
      n += counts;
    }
    T divisor = 1;
    if (p.mode == BagMode::kMean) divisor = simple ? static_cast<T>(n) : static_cast<T>(total);
    if (p.mode == BagMode::kSum && p.dropout_p < 1) divisor = static_cast<T>(1 - p.dropout_p);
    if (divisor == 0) n = 0, divisor = 1;
    return {n, divisor, fits};
  }
  template <bool transposed>
  Bag<T> list(int64_t b, Term<T>* terms, int64_t* places = nullptr) const {
    if (p.mask.data != nullptr || p.w.data != nullptr || p.dropout_p > 0 || places != nullptr) {
      return p.wide_ids ? list<int64_t, transposed, false>(b, terms, places)
                        : list<int32_t, transposed, false>(b, terms, places);
    }
    return p.wide_ids ? list<int64_t, transposed, true>(b, terms, nullptr)
                      : list<int32_t, transposed, true>(b, terms, nullptr);
  }
};

inline Matrix matrix(const BagMatrix& m) { return {static_cast<char*>(m.data), m.row, m.col, m.dtype}; }

// One thread's buffers: a bag's terms, with a place and a number for each, and a row with its ids.
template <class T>
struct BagBuffers {
  Term<T>* terms;
  int64_t* places;
  T *numbers, *row;
  int32_t* ids;

  BagBuffers(Carver& carver, int64_t longest, int64_t E) {
    terms = carver.take<Term<T>>(longest);
    places = carver.take<int64_t>(longest);
    numbers = carver.take<T>(longest);
    row = carver.take<T>(padded<T>(E));
    ids = carver.take<int32_t>(padded<T>(E));
  }
};

// f(bag, buffers) -> whether its ids are rows, for all bags. Returns -1, or the first bag of which that is not so.
template <class T, class F>
int64_t for_bags(const EmbeddingBag<T>& bags, const F& f) {
  if (bags.bad_bag >= 0) return bags.bad_bag;
  const EmbeddingBagProblem& p = bags.p;
  Carver one{nullptr};
  BagBuffers<T>(one, bags.longest, p.E);
  Carver carver{reserve_scratch(p.threads * one.bytes + bags.chunks * static_cast<int64_t>(sizeof(int64_t)) + 64)};
  int64_t* bad_bags = carver.take<int64_t>(bags.chunks);
  char* workers = carver.memory + carver.bytes;
  parallel_for(p.threads, bags.chunks, [&](int worker, int64_t chunk) {
    Carver mine{workers + worker * one.bytes};
    const BagBuffers<T> buffers(mine, bags.longest, p.E);
    bad_bags[chunk] = -1;
    for (int64_t b = chunk * bags.chunk_bags; b < smaller((chunk + 1) * bags.chunk_bags, p.bags); ++b) {
      if (!f(b, buffers)) {
        bad_bags[chunk] = b;
        return;
      }
    }
  });
  for (int64_t i = 0; i < bags.chunks; ++i) {
    if (bad_bags[i] >= 0) return bad_bags[i];
  }
  return -1;
}

// ---- The op

// row = the sum of the terms' rows of `from`.
template <class T>
void sum_rows(const BagMatrix& from, int64_t E, const Term<T>* terms, int64_t n, T* row) {
  with_storage<T>(from.dtype, static_cast<char*>(from.data), [&](const auto* data) {
    for_columns<T>(data, from.row, from.col, E,
                   [&](const auto& columns, int64_t c, auto vectors)
                       __attribute__((always_inline)) { sum_terms<vectors.value>(terms, n, columns, row + c); });
  });
}

template <class T>
void max_rows(const BagMatrix& from, int64_t E, const Term<T>* terms, int64_t n, T* row, int32_t* largest) {
  with_storage<T>(from.dtype, static_cast<char*>(from.data), [&](const auto* data) {
    for_columns<T>(data, from.row, from.col, E,
                   [&](const auto& columns, int64_t c, auto vectors) __attribute__((always_inline)) {
                     max_terms<vectors.value>(terms, n, columns, row + c, largest + c);
                   });
  });
}

template <class T>
int64_t bag_forward(const EmbeddingBagForward& p) {
  const EmbeddingBag<T> bags(p);
  const Matrix out = matrix(p.out);
  return for_bags(bags, [&](int64_t b, const BagBuffers<T>& buffers) {
    const Bag<T> bag = bags.template list<false>(b, buffers.terms);
    if (!bag.fits) return false;
    T* row = buffers.row;
    if (p.mode == BagMode::kMax && bag.count > 0) {
      max_rows(p.weight, p.E, buffers.terms, bag.count, row, buffers.ids);
      if (p.largest != nullptr) memcpy(p.largest + b * p.E, buffers.ids, static_cast<size_t>(p.E) * sizeof(int32_t));
    } else {
      sum_rows(p.weight, p.E, buffers.terms, bag.count, row);
      for (int64_t c = 0; c < p.E; c += kWidth<T>) store(row + c, load(row + c) / bag.divisor);
      if (p.largest != nullptr) memset(p.largest + b * p.E, 0xff, static_cast<size_t>(p.E) * sizeof(int32_t));
    }
    store_row(out, b, p.E, row, T(1));
    return true;
  });
}

// Sorts by `to` < V, stably; returns which of the two lists holds the result.
template <class T>
Term<T>* sort_terms(Term<T>* terms, Term<T>* other, int64_t n, int64_t V) {
  int bits = 0;
  while (bits < 32 && (V - 1) >> bits > 0) ++bits;
  const int passes = (bits + kDigitBits - 1) / kDigitBits;
  int64_t ends[1 << kDigitBits];
  for (int pass = 0, shift = 0; pass < passes; ++pass) {
    const int digit = (bits - shift + passes - pass - 1) / (passes - pass);
    const uint32_t last = (uint32_t{1} << digit) - 1;
    memset(ends, 0, (last + size_t{1}) * sizeof ends[0]);
    for (int64_t t = 0; t < n; ++t) ++ends[terms[t].to >> shift & last];
    for (uint32_t d = 1; d <= last; ++d) ends[d] += ends[d - 1];
    for (int64_t t = n - 1; t >= 0; --t) other[--ends[terms[t].to >> shift & last]] = terms[t];
    Term<T>* sorted = other;
    other = terms;
    terms = sorted;
    shift += digit;
  }
  return terms;
}

template <class T>
int64_t bag_transpose(const EmbeddingBagProblem& p, EmbeddingBagTerms& to) {
  static_assert(sizeof(Term<T>) <= kBagTermBytes, "what the caller has reserved for each");
  const EmbeddingBag<T> bags(p);
  if (bags.bad_bag >= 0) return bags.bad_bag;
  Term<T>* terms = static_cast<Term<T>*>(to.memory);
  int64_t n = 0;
  for (int64_t b = 0; b < p.bags; ++b) {
    const Bag<T> bag = bags.template list<true>(b, terms + n);
    if (!bag.fits) return b;
    if (bag.divisor != 1) {
      for (int64_t t = n; t < n + bag.count; ++t) terms[t].weight /= bag.divisor;
    }
    n += bag.count;
  }
  terms = sort_terms(terms, terms + to.capacity, n, p.V);
  to.rows = n > 0 ? 1 : 0;
  for (int64_t t = 1; t < n; ++t) to.rows += terms[t].to != terms[t - 1].to;
  to.sorted = terms;
  to.count = n;
  return -1;
}

// The first term of those in [first, n) whose row is `row` or beyond.
template <class T>
int64_t lower_bound(const Term<T>* terms, int64_t first, int64_t n, int64_t row) {
  while (first < n) {
    const int64_t middle = first + (n - first) / 2;
    if (terms[middle].to < row) {
      first = middle + 1;
    } else {
      n = middle;
    }
  }
  return first;
}

template <class T>
struct BagBackward {
  const EmbeddingBagBackward& p;
  const Matrix dweight;
  const Term<T>* terms;
  T* rows;  // one per thread

  explicit BagBackward(const EmbeddingBagBackward& problem)
      : p(problem), dweight(matrix(p.dweight)), terms(static_cast<const Term<T>*>(p.terms.sorted)) {
    Carver counting{nullptr};
    counting.take<T>(p.threads * padded<T>(p.E));
    Carver carver{reserve_scratch(counting.bytes)};
    rows = carver.take<T>(p.threads * padded<T>(p.E));
  }

  // row = what the maxima of the terms' bags send to the table row of the terms.
  void add_maxima(const Term<T>* first, int64_t n, T* row) const {
    const Matrix dout = matrix(p.dout);
    with_storage<T>(dout.dtype, dout.data, [&](const auto* data) {
      for (int64_t c = 0; c < p.E; c += kWidth<T>) {
        const int64_t count = lanes_left<T>(p.E, c);
        Vec<T> sum = {};
        for (int64_t t = 0; t < n; ++t) {
          if (t > 0 && first[t].from == first[t - 1].from) continue;  // the token is there twice
          const int32_t* largest = p.largest + first[t].from * p.E + c;
          IntVec<T> ids = {};
          for (int64_t i = 0; i < count; ++i) ids[i] = largest[i];
          const Vec<T> g = load_some<T>(data + first[t].from * dout.row + c * dout.col, dout.col, count);
          sum += ids == (IntVec<T>{} + first[t].to) ? g : Vec<T>{};
        }
        store(row + c, sum);
      }
    });
  }

  // Row `to` of dweight from the n > 0 terms of one row of the table.
  void write_row(int worker, int64_t to, const Term<T>* first, int64_t n) const {
    T* row = rows + worker * padded<T>(p.E);
    if (p.mode == BagMode::kMax) {
      add_maxima(first, n, row);
    } else {
      sum_rows(p.dout, p.E, first, n, row);
    }
    store_row(dweight, to, p.E, row, p.scale_by_frequency ? 1 / static_cast<T>(n) : T(1));
  }

  void clear_rows(int64_t first, int64_t end) const {
    if (dweight.col == 1 && dweight.row == p.E) {
      const int64_t row_bytes = p.E * element_size(dweight.dtype);
      memset(dweight.data + first * row_bytes, 0, static_cast<size_t>((end - first) * row_bytes));
      return;
    }
    with_storage<T>(dweight.dtype, dweight.data, [&](auto* data) {
      for (int64_t r = first; r < end; ++r) {
        for (int64_t c = 0; c < p.E; c += kWidth<T>) {
          store_some<T>(data + r * dweight.row + c * dweight.col, dweight.col, lanes_left<T>(p.E, c), Vec<T>{});
        }
      }
    });
  }

  int64_t end_of_row(int64_t first) const {
    int64_t end = first + 1;
    while (end < p.terms.count && terms[end].to == terms[first].to) ++end;
    return end;
  }

  // Every row of the table, a chunk of rows at a time.
  void dense() const {
    const int64_t chunk = kBagChunkElements / larger<int64_t>(1, p.E) + 1;
    parallel_for(p.threads, (p.V + chunk - 1) / chunk, [&](int worker, int64_t i) {
      int64_t row = i * chunk;
      const int64_t end = smaller(row + chunk, p.V);
      for (int64_t t = lower_bound(terms, 0, p.terms.count, row); t < p.terms.count && terms[t].to < end;) {
        const int64_t next = end_of_row(t);
        clear_rows(row, terms[t].to);
        write_row(worker, terms[t].to, terms + t, next - t);
        row = terms[t].to + 1;
        t = next;
      }
      clear_rows(row, end);
    });
  }

  // The rows that are named, close together. Which is the how-manieth is known by counting: a pass over the terms, then
  // any thread can do any row.
  void sparse() const {
    int64_t u = 0;
    for (int64_t t = 0; t < p.terms.count; t = end_of_row(t)) p.row_ids[u++] = terms[t].to;
    const int64_t chunk = kBagChunkElements / larger<int64_t>(1, p.E) + 1;
    parallel_for(p.threads, (p.terms.rows + chunk - 1) / chunk, [&](int worker, int64_t i) {
      int64_t t = lower_bound(terms, 0, p.terms.count, p.row_ids[i * chunk]);
      for (int64_t row = i * chunk; row < smaller((i + 1) * chunk, p.terms.rows); ++row) {
        const int64_t next = end_of_row(t);
        write_row(worker, row, terms + t, next - t);
        t = next;
      }
    });
  }
};

template <class T>
void bag_backward(const EmbeddingBagBackward& p) {
  if (p.E == 0 && !p.sparse) return;
  const BagBackward<T> backward(p);
  if (p.sparse) {
    backward.sparse();
  } else {
    backward.dense();
  }
}

// The gradient of the tokens' weights: each one's part of its bag's output, over the divisor, and in the mean less the
// output's own part.
template <class T>
int64_t bag_weights_backward(const EmbeddingBagBackward& p) {
  const EmbeddingBag<T> bags(p);
  const Matrix table = matrix(p.weight), dout = matrix(p.dout);
  return for_bags(bags, [&](int64_t b, const BagBuffers<T>& buffers) {
    const Bag<T> bag = bags.template list<false>(b, buffers.terms, buffers.places);
    if (!bag.fits) return false;
    pack_rows(dout, b, 1, p.E, buffers.row, 0);
    double mean = 0;
    T* dots = buffers.numbers;
    for (int64_t t = 0; t < bag.count; ++t) {
      dots[t] = dot_row(table, buffers.terms[t].from, p.E, buffers.row);
      mean += static_cast<double>(dots[t] * buffers.terms[t].weight);
    }
    const T less = p.mode == BagMode::kMean ? static_cast<T>(mean / static_cast<double>(bag.divisor)) : T(0);
    with_storage<T>(p.weight.dtype, static_cast<char*>(p.dw.data), [&](auto* dw) {
      for (int64_t t = 0; t < bag.count; ++t) {
        auto* to = dw + b * p.dw.bag + buffers.places[t] * p.dw.token;
        store_some<T>(to, 1, 1, broadcast((dots[t] - less) / bag.divisor));
      }
    });
    return true;
  });
}
