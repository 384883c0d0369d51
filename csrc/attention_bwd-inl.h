// Backward by recomputation (FlashAttention-2, arXiv 2307.08691, Algorithm 2):
//   P = e^(scores - lse),  dP = do v^T,  dS = P (dP - delta),  delta = rowsum(do * out) - dlse
//   dv = P^T do,  dk = scale dS^T q,  dq = scale dS k,  dbias = dS summed over the broadcast dimensions.
// P^T and dS^T are read where they lie: the micro-kernel takes its first operand with any strides, so that no product
// needs a transposition.
//
// Keys are cut into chunks, counted from key 0 by constants of the shape. Within a chunk, units of keys are the outer
// loop and blocks of queries the inner one; dq of a chunk is summed up by itself and added to the total in the order of
// chunks, dk and dv in the order of heads. Threads take either whole heads or chunks, and the additions are the same.

// Queries per tile, and so the longest running sum in dk and dv. The more there are, the less often dk and dv pass
// through the registers: 96 gain 2 to 4 % over 48. Short sequences take 48 nonetheless, because of causal masks: with
// 96, dk and dv at 77 to 128 queries would be 1.1 to 1.2 times as far from float64 as torch's kernel's are, and 5 %
// slower. (Zen 3, AVX2, one thread.)
constexpr int kTileRows = 96;
constexpr int kShortTileRows = 48;
constexpr int kShortQueries = 256;  // fewer are short
constexpr int kTileStride = kUnit;
constexpr int kTileGroups = kTileRows / kMR;  // of queries; there are fewer of keys
static_assert(kUnit <= kTileRows && kTileRows % kMR == 0 && kShortTileRows % kMR == 0);

// A chunk has at least this many units, since it costs an addition to dq (2 units: 2 % slower at 1024 keys); and there
// are at most so many chunks, since each may need a dq of its own.
constexpr int kMinChunkUnits = 4;
constexpr int kMaxChunks = 8;

// Keys of one key/value head, from a multiple of kUnit on, and their gradients. Keys with a non-finite element are
// packed as zeros: the lse of the rows that attend them is NaN already, so are P and dS there, and nowhere else.
template <class T>
struct KeySpan {
  T* kt;       // [unit][panel][D][kPanel], times scale; not used by rows
  T* vt;       // [unit][panel][Dv][kPanel], times dropout's 1 / (1 - p); by rows, [key][ldv], without
  T* k;        // [key][ldk]
  T *dk, *dv;  // [key][ldk], [key][ldv]: sums, without scale and 1 / (1 - p)

  KeySpan() = default;
  KeySpan(Carver& carver, int64_t keys, int64_t D, int64_t ldk, int64_t ldv) {
    const int64_t units = (keys + kUnit - 1) / kUnit;
    kt = carver.take<T>(units * kUnit * D);
    vt = carver.take<T>(units * kUnit * ldv);
    k = carver.take<T>(keys * ldk);
    dk = carver.take<T>(keys * ldk);
    dv = carver.take<T>(keys * ldv);
  }
};

// The queries of one head. Rows with a non-finite q or do are packed as zeros and get lse = NaN, with the same effect.
template <class T>
struct QuerySpan {
  T* q;       // [L][ldk]
  T* dout;    // [L][ldv]
  T* lse;     // [L]; +inf for rows that attend nothing, so that their P is 0
  T* delta;   // [L]
  T *p, *ds;  // [kTileRows][kTileStride], the tile at hand

  QuerySpan() = default;
  QuerySpan(Carver& carver, int64_t L, int64_t ldk, int64_t ldv) {
    q = carver.take<T>(L * ldk);
    dout = carver.take<T>(L * ldv);
    lse = carver.take<T>(L);
    delta = carver.take<T>(L);
    p = carver.take<T>(kTileRows * kTileStride);
    ds = carver.take<T>(kTileRows * kTileStride);
  }
};

// sum + lost takes in x exactly, but for the rounding of lost (Knuth's TwoSum).
template <class T>
PYATTN_INLINE void add_compensated(T& sum, T& lost, T x) {
  const T total = sum + x, added = total - sum;
  lost += (sum - (total - added)) + (x - added);
  sum = total;
}

// Where dS is summed up for dbias. An element of a bias that is broadcast receives up to B * Hq * L * S terms one by
// one, so it is summed in scratch, in pairs of a sum and what that lost: a plain sum of a million terms is off by 700
// eps. Scratch is twice bias's own shape, once per chunk of keys if bias is broadcast along them. A bias that is not
// broadcast receives each element once, directly.
template <class T>
struct BiasGradient {
  bool on = false, stored = false;  // stored: elements are written, not added
  Tensor sums;                      // like dbias, in elements of T
  int64_t chunk = 0;                // stride between the chunks' parts
  int64_t rows = 0, columns = 0;    // of one matrix
  int64_t scratch = 0;              // elements
  int64_t lost = 0;                 // stride from a sum to what it lost

  BiasGradient(const AttentionBackward& p, int64_t chunks) : on(p.dbias.data != nullptr), sums(p.dbias) {
    if (!on) return;
    const bool one_row = p.dbias.row == 0, one_column = p.dbias.col == 0 && p.S != 1;
    rows = one_row ? 1 : p.L;
    columns = one_column ? 1 : p.S;
    bool shared = one_row || one_column || (p.dbias.head == 0 && p.Hq > 1);
    for (int d = 0; d < p.batch_rank; ++d) shared |= p.dbias.batch[d] == 0 && p.batch_shape[d] > 1;
    stored = !shared;
    if (stored) return;

    scratch = columns;
    sums.dtype = sizeof(T) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
    sums.col = one_column ? 0 : 1;
    sums.row = one_row ? 0 : columns;
    scratch *= rows;
    chunk = one_column ? scratch : 0;
    scratch *= one_column ? chunks : 1;
    sums.head = p.dbias.head == 0 ? 0 : scratch;
    scratch *= p.dbias.head == 0 ? 1 : p.Hq;
    for (int d = p.batch_rank - 1; d >= 0; --d) {
      sums.batch[d] = p.dbias.batch[d] == 0 ? 0 : scratch;
      scratch *= p.dbias.batch[d] == 0 ? 1 : p.batch_shape[d];
    }
    lost = scratch;
    scratch *= 2;
  }

  // dS of one query and the keys first_key + c, in the order in which the caller comes by; ds is zero from n to kUnit.
  void add_row(const Matrix& to, int64_t part, int64_t query, int64_t first_key, int n, const T* ds) const {
    if (stored) {
      Matrix from_key = to;
      from_key.data += first_key * to.col * element_size(to.dtype);
      return store_row<T>(from_key, query, n, ds, T(1));
    }
    T* row = reinterpret_cast<T*>(to.data) + part * chunk + query * to.row + first_key * to.col;
    if (to.col == 1) {
      for (int c = 0; c < n; ++c) add_compensated(row[c], row[lost + c], ds[c]);
    } else {
      Vec<T> sum = {};
      for (int c = 0; c < kUnit; c += kWidth<T>) sum += load(ds + c);
      add_compensated(row[0], row[lost], reduce_add<T>(sum));
    }
  }
};

// The work that one task does without interruption: all (batch element, key/value head) pairs that share an element of
// dbias, in this order. Without dbias every pair is an owner of its own.
struct Owners {
  int64_t count = 0, pairs = 0;  // owners, and pairs of each
  int64_t heads = 1;             // key/value heads of an owner
  const AttentionBackward& p;

  explicit Owners(const AttentionBackward& problem) : p(problem) {
    int64_t batches = 1;
    if (p.dbias.data != nullptr) {
      if (p.dbias.head == 0) heads = p.Hkv;
      for (int d = 0; d < p.batch_rank; ++d) batches *= p.dbias.batch[d] == 0 ? p.batch_shape[d] : 1;
    }
    pairs = batches * heads;
    count = pairs == 0 ? 0 : p.B * p.Hkv / pairs;
  }

  // Pair `pair` of owner `owner`: flat batch index and key/value head.
  void find(int64_t owner, int64_t pair, int64_t& b, int64_t& kv_head) const {
    const int64_t owners_per_batch = p.Hkv / heads;
    kv_head = owner % owners_per_batch * heads + pair % heads;
    int64_t own = owner / owners_per_batch, shared = pair / heads, place = 1;
    b = 0;
    for (int d = p.batch_rank - 1; d >= 0; --d) {
      const bool is_shared = p.dbias.data != nullptr && p.dbias.batch[d] == 0;
      int64_t& index = is_shared ? shared : own;
      b += index % p.batch_shape[d] * place;
      index /= p.batch_shape[d];
      place *= p.batch_shape[d];
    }
  }
};

template <class T>
struct Backward {
  const AttentionBackward& p;
  const int64_t ldk, ldv, units, chunk_units, chunks, group, tile_rows;
  const bool by_rows;  // K and V are not transposed, as in the forward
  const T keep_scale;
  BiasGradient<T> dbias;
  MaskSummary mask;

  explicit Backward(const AttentionBackward& problem)
      : p(problem),
        ldk(leading_dimension<T>(p.D)),
        ldv(leading_dimension<T>(p.Dv)),
        units((p.S + kUnit - 1) / kUnit),
        chunk_units(larger<int64_t>(kMinChunkUnits, (units + kMaxChunks - 1) / kMaxChunks)),
        chunks(larger<int64_t>(1, (units + chunk_units - 1) / chunk_units)),
        group(p.Hkv == 0 ? 0 : p.Hq / p.Hkv),
        tile_rows(p.L < kShortQueries ? kShortTileRows : kTileRows),
        by_rows(p.L <= kFewQueries),
        keep_scale(static_cast<T>(Dropout::scale(p))),
        dbias(problem, chunks),
        mask(problem) {}

  int64_t chunk_begin(int64_t chunk) const { return smaller(chunk * chunk_units * kUnit, p.S); }

  // Packs the keys [begin, end) of a key/value head and clears their gradients.
  void pack_keys(int64_t b, int64_t kv_head, int64_t begin, int64_t end, const KeySpan<T>& to) const {
    const Matrix k = matrix(p, p.k, b, kv_head), v = matrix(p, p.v, b, kv_head);
    for (int64_t first = begin; first < end; first += kUnit) {
      const int64_t keys = smaller<int64_t>(kUnit, end - first), at = first - begin;
      T *kt = to.kt + at * p.D, *vt = to.vt + at * (by_rows ? ldv : p.Dv), *rows = to.k + at * ldk;
      bool finite = pack_rows<T>(k, first, keys, p.D, rows, ldk);
      if (by_rows) {
        finite &= pack_rows<T>(v, first, keys, p.Dv, vt, ldv);
      } else {
        finite &= pack_transposed<T>(k, first, keys, p.D, static_cast<T>(p.scale), kt) &
                  pack_transposed<T>(v, first, keys, p.Dv, keep_scale, vt);
      }
      for (int64_t c = 0; !finite && c < keys; ++c) {
        if (row_is_finite<T>(k, first + c, p.D) && row_is_finite<T>(v, first + c, p.Dv)) continue;
        memset(rows + c * ldk, 0, ldk * sizeof(T));
        if (by_rows) {
          memset(vt + c * ldv, 0, ldv * sizeof(T));
        } else {
          clear_packed_key(kt, c, p.D);
          clear_packed_key(vt, c, p.Dv);
        }
      }
    }
    memset(to.dk, 0, (end - begin) * ldk * sizeof(T));
    memset(to.dv, 0, (end - begin) * ldv * sizeof(T));
  }

  void pack_queries(int64_t b, int64_t h, const QuerySpan<T>& to) const {
    const Matrix q = matrix(p, p.q, b, h), dout = matrix(p, p.dout, b, h), out = matrix(p, p.out, b, h);
    const Matrix lse = matrix(p, p.lse, b, h);
    const bool finite = pack_rows<T>(q, 0, p.L, p.D, to.q, ldk) & pack_rows<T>(dout, 0, p.L, p.Dv, to.dout, ldv);
    for (int64_t i = 0; i < p.L; ++i) {
      to.delta[i] = dot_row<T>(out, i, p.Dv, to.dout + i * ldv);
      const T lse_i = element<T>(lse, i);
      to.lse[i] = lse_i == -T(INFINITY) ? T(INFINITY) : lse_i;
      if (finite || (row_is_finite<T>(q, i, p.D) && row_is_finite<T>(dout, i, p.Dv))) continue;
      if (lse_i != -T(INFINITY)) to.lse[i] = T(NAN);
      memset(to.q + i * ldk, 0, ldk * sizeof(T));
      memset(to.dout + i * ldv, 0, ldv * sizeof(T));
    }
    if (p.dlse.data == nullptr) return;
    const Matrix dlse = matrix(p, p.dlse, b, h);
    for (int64_t i = 0; i < p.L; ++i) to.delta[i] -= element<T>(dlse, i);
  }

  // One chunk of keys and all queries of head h: adds to keys.dk and keys.dv, sets dq [L][ldk]. `keys` starts at key
  // `origin`.
  void run_chunk(int64_t b, int64_t h, int64_t chunk, int64_t origin, const KeySpan<T>& keys,
                 const QuerySpan<T>& queries, T* dq) const {
    const ScoreMaker<T> maker(p, mask, b, h);
    const Dropout dropout(p, b, h);
    const int64_t begin = chunk_begin(chunk), end = chunk_begin(chunk + 1);
    if (begin == end) memset(dq, 0, p.L * ldk * sizeof(T));
    for (int64_t key = begin; key < end; key += kUnit) {
      // The first unit sets dq, the others add to it.
      const bool started = key > begin;
      const int64_t first = smaller(maker.visible.first_row(key) / tile_rows * tile_rows, p.L);
      if (!started) memset(dq, 0, first * ldk * sizeof(T));
      for (int64_t i = first; i < p.L; i += tile_rows) {
        const int rows = static_cast<int>(smaller(tile_rows, p.L - i));
        run_tile(maker, dropout, b, h, chunk, i, rows, key, origin, keys, queries, started, dq);
      }
    }
  }

  // Writes dk and dv of the keys [begin, end).
  void store_keys(int64_t b, int64_t kv_head, int64_t begin, int64_t end, const KeySpan<T>& from) const {
    const Matrix dk = matrix(p, p.dk, b, kv_head), dv = matrix(p, p.dv, b, kv_head);
    for (int64_t j = begin; j < end; ++j) {
      store_row<T>(dk, j, p.D, from.dk + (j - begin) * ldk, static_cast<T>(p.scale));
      store_row<T>(dv, j, p.Dv, from.dv + (j - begin) * ldv, keep_scale);
    }
  }

  // total += part
  void add_queries(int64_t begin, int64_t end, T* total, const T* part) const {
    for (int64_t i = begin * ldk; i < end * ldk; i += ldk) {
      for (int64_t c = i; c < i + padded<T>(p.D); c += kWidth<T>) store(total + c, load(total + c) + load(part + c));
    }
  }

  void store_queries(int64_t b, int64_t h, int64_t begin, int64_t end, const T* dq) const {
    const Matrix to = matrix(p, p.dq, b, h);
    for (int64_t i = begin; i < end; ++i) store_row<T>(to, i, p.D, dq + i * ldk, static_cast<T>(p.scale));
  }

  // Calls f(to, sums) for every distinct matrix of dbias and where its sums are.
  template <class F>
  void for_each_bias(const F& f) const {
    for (int64_t i = 0; i < distinct_matrices(p, p.dbias); ++i) {
      const MatrixIndex index = distinct_matrix(p, p.dbias, i);
      char* data = static_cast<char*>(p.dbias.data) + matrix_offset(p, p.dbias, index) * element_size(p.dbias.dtype);
      f(Matrix{data, p.dbias.row, p.dbias.col, p.dbias.dtype},
        static_cast<T*>(dbias.sums.data) + matrix_offset(p, dbias.sums, index));
    }
  }

  // Clears dbias, which receives nothing from tiles that are skipped, and its sums.
  void clear_bias() const {
    if (dbias.scratch > 0) memset(dbias.sums.data, 0, dbias.scratch * sizeof(T));
    const T zeros[kWidth<T>] = {};
    for_each_bias([&](const Matrix& to, T*) {
      for (int64_t i = 0; i < dbias.rows; ++i) {
        for (int64_t j = 0; j < dbias.columns; j += kWidth<T>) {
          Matrix from_key = to;
          from_key.data += j * to.col * element_size(to.dtype);
          store_row<T>(from_key, i, lanes_left<T>(dbias.columns, j), zeros, T(1));
        }
      }
    });
  }

  // Moves dbias from its sums to the output, adding the chunks' parts in order.
  void store_bias() const {
    if (dbias.scratch == 0) return;
    for_each_bias([&](const Matrix& to, T* sums) {
      for (int64_t c = 1; dbias.chunk > 0 && c < chunks; ++c) {
        for (int64_t i = 0; i < dbias.chunk; ++i) {
          add_compensated(sums[i], sums[dbias.lost + i], sums[c * dbias.chunk + i]);
          sums[dbias.lost + i] += sums[dbias.lost + c * dbias.chunk + i];
        }
      }
      for (int64_t i = 0; i < dbias.rows; ++i) {
        for (int64_t j = 0; j < dbias.columns; j += kWidth<T>) {
          T lanes[kWidth<T>] = {};
          const int64_t n = lanes_left<T>(dbias.columns, j);
          const T* row = sums + i * dbias.columns + j;
          for (int64_t c = 0; c < n; ++c) lanes[c] = row[c] + row[dbias.lost + c];
          Matrix from_key = to;
          from_key.data += j * to.col * element_size(to.dtype);
          store_row<T>(from_key, i, n, lanes, T(1));
        }
      }
    });
  }

 private:
  // The queries [first, first + rows) and the unit of keys from first_key on.
  void run_tile(const ScoreMaker<T>& maker, const Dropout& dropout, int64_t b, int64_t h, int64_t chunk, int64_t first,
                int rows, int64_t first_key, int64_t origin, const KeySpan<T>& keys, const QuerySpan<T>& queries,
                bool started, T* dq) const {
    const Visibility& visible = maker.visible;
    GroupView groups[kTileGroups];
    if (!visible.view(first, rows, first_key, groups)) {
      if (!started) memset(dq + first * ldk, 0, rows * ldk * sizeof(T));
      return;
    }

    // The keys that each group of queries sees, and the queries that see each group of keys.
    Range seen_keys[kTileGroups], seen_queries[kTileGroups];
    int count = 0;
    for (int g = 0; g < row_groups(rows); ++g) {
      seen_keys[g] = {groups[g].begin, groups[g].end};
      count = larger<int>(count, groups[g].end);
    }
    for (int k = 0; k < row_groups(count); ++k) {
      Range& seen = seen_queries[k] = {rows, 0};
      for (int g = 0; g < row_groups(rows); ++g) {
        if (groups[g].begin >= (k + 1) * kMR || groups[g].end <= k * kMR) continue;
        seen = {smaller(seen.begin, g * kMR), smaller(rows, (g + 1) * kMR)};
      }
      seen.begin =
          larger(seen.begin, static_cast<int>(smaller<int64_t>(visible.first_row(first_key + k * kMR) - first, rows)));
    }

    constexpr int ld = kTileStride;
    const int64_t at = first_key - origin;
    const T *q = queries.q + first * ldk, *dout = queries.dout + first * ldv;
    if (by_rows) {
      const T scale = static_cast<T>(p.scale);
      multiply_few<T>(rows, q, ldk, keys.k + at * ldk, ldk, padded<T>(p.D), count, scale, queries.p, ld);
      multiply_few<T>(rows, dout, ldv, keys.vt + at * ldv, ldv, padded<T>(p.Dv), count, keep_scale, queries.ds, ld);
    } else {
      multiply_panels<T>(rows, q, ldk, keys.kt + at * p.D, p.D, queries.p, ld, groups);
      multiply_panels<T>(rows, dout, ldv, keys.vt + at * p.Dv, p.Dv, queries.ds, ld, groups);
    }

    const Matrix bias = dbias.on ? matrix(p, dbias.sums, b, h) : Matrix{};
    for (int i = 0; i < rows; ++i) {
      const int64_t query = first + i;
      const GroupView& view = groups[i / kMR];
      const int n = visible.columns(query, first_key, view.end);
      T *prob = queries.p + i * ld, *ds = queries.ds + i * ld;
      if (n > 0) {
        finish_row(maker, dropout, query, first_key, n, view.masked, queries.lse[query], queries.delta[query], prob,
                   ds);
      }
      for (int c = n; c < kUnit; ++c) prob[c] = ds[c] = 0;
      if (dbias.on) dbias.add_row(bias, chunk, query, first_key, n, ds);
    }

    const int width_k = static_cast<int>(padded<T>(p.D)), width_v = static_cast<int>(padded<T>(p.Dv));
    multiply_rows<T>(count, queries.p, 1, ld, dout, ldv, width_v, keys.dv + at * ldv, ldv, seen_queries, true);
    multiply_rows<T>(count, queries.ds, 1, ld, q, ldk, width_k, keys.dk + at * ldk, ldk, seen_queries, true);
    multiply_rows<T>(rows, queries.ds, ld, 1, keys.k + at * ldk, ldk, width_k, dq + first * ldk, ldk, seen_keys,
                     started);
  }

  // One row of a tile: products q.k and do.v become the P that multiplies do (that is, with dropout) and dS.
  void finish_row(const ScoreMaker<T>& maker, const Dropout& dropout, int64_t query, int64_t first_key, int n,
                  bool masked, T lse, T delta, T* prob, T* ds) const {
    uint32_t words[kUnit];
    if (dropout.on) {
      dropout.draw(query, first_key, words);
      dropout.drop(words, n, ds);
    }
    if (!masked && !maker.has_bias) {
      softmax_gradient<false>(n, lse, delta, prob, ds);
    } else {
      maker.finish(query, first_key, n, masked, prob);
      softmax_gradient<true>(n, lse, delta, prob, ds);
    }
    if (dropout.on) dropout.drop(words, n, prob);
  }

  // prob: scores to e^(scores - lse); ds: dP to prob (dP - delta). With kMasked, a score of -inf gives zeros even where
  // lse or delta is NaN.
  template <bool kMasked>
  static void softmax_gradient(int n, T lse, T delta, T* prob, T* ds) {
    for (int c = 0; c < n; c += kWidth<T>) {
      const Vec<T> score = load(prob + c);
      Vec<T> p = exp(score - lse);
      Vec<T> gradient = p * (load(ds + c) - delta);
      if constexpr (kMasked) {
        const auto hidden = score == -T(INFINITY);
        p = hidden ? Vec<T>{} : p;
        gradient = hidden ? Vec<T>{} : gradient;
      }
      store(prob + c, p);
      store(ds + c, gradient);
    }
  }
};

template <class T>
void attention_backward(const AttentionBackward& p) {
  Backward<T> kernel(p);
  const Owners owners(p);
  const int threads = useful_threads<T>(p);
  const bool by_owner = threads == 1 || owners.count >= kHeadsPerThread * threads;
  const int64_t query_elements = p.L * kernel.ldk, group = kernel.group, chunks = kernel.chunks;

  KeySpan<T>* keys = nullptr;
  QuerySpan<T>* queries = nullptr;
  T* dq = nullptr;
  // Of dq: by owner, each thread has the total of one head and the sum of one chunk; else each chunk of each head of
  // the owners' current pairs has its own.
  const int64_t dq_count = by_owner ? threads * (chunks > 1 ? 2 : 1) : owners.count * group * chunks;
  const int64_t span = by_owner ? p.S : smaller(p.S, kernel.chunk_units * kUnit);
  const auto lay_out = [&](Carver carver) {
    keys = carver.take<KeySpan<T>>(threads);
    queries = carver.take<QuerySpan<T>>(threads);
    dq = carver.take<T>(dq_count * query_elements);
    kernel.dbias.sums.data = kernel.dbias.scratch > 0 ? carver.take<T>(kernel.dbias.scratch) : p.dbias.data;
    kernel.mask.blocks.data = carver.take<GroupView>(kernel.mask.count);
    for (int i = 0; i < threads; ++i) {
      const KeySpan<T> key_piece(carver, span, p.D, kernel.ldk, kernel.ldv);
      const QuerySpan<T> query_piece(carver, p.L, kernel.ldk, kernel.ldv);
      if (keys == nullptr) continue;
      keys[i] = key_piece;
      queries[i] = query_piece;
    }
    return carver.bytes;
  };
  lay_out({reserve_scratch(lay_out({nullptr}))});
  if (kernel.dbias.on) kernel.clear_bias();
  if (p.mask.data != nullptr) kernel.mask.fill(p, threads);

  if (by_owner) {
    parallel_for(threads, owners.count, [&](int worker, int64_t owner) {
      T* total = dq + (chunks > 1 ? 2 : 1) * worker * query_elements;
      for (int64_t pair = 0; pair < owners.pairs; ++pair) {
        int64_t b, kv_head;
        owners.find(owner, pair, b, kv_head);
        kernel.pack_keys(b, kv_head, 0, p.S, keys[worker]);
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
          kernel.pack_queries(b, h, queries[worker]);
          kernel.run_chunk(b, h, 0, 0, keys[worker], queries[worker], total);
          for (int64_t chunk = 1; chunk < chunks; ++chunk) {
            kernel.run_chunk(b, h, chunk, 0, keys[worker], queries[worker], total + query_elements);
            kernel.add_queries(0, p.L, total, total + query_elements);
          }
          kernel.store_queries(b, h, 0, p.L, total);
        }
        kernel.store_keys(b, kv_head, 0, p.S, keys[worker]);
      }
    });
  }
  for (int64_t pair = 0; !by_owner && pair < owners.pairs; ++pair) {
    parallel_for(threads, owners.count * chunks, [&](int worker, int64_t i) {
      // The first chunks first: under a causal mask they are the longest.
      const int64_t owner = i % owners.count, chunk = i / owners.count;
      const int64_t begin = kernel.chunk_begin(chunk), end = kernel.chunk_begin(chunk + 1);
      int64_t b, kv_head;
      owners.find(owner, pair, b, kv_head);
      kernel.pack_keys(b, kv_head, begin, end, keys[worker]);
      for (int64_t g = 0; g < group; ++g) {
        kernel.pack_queries(b, kv_head * group + g, queries[worker]);
        kernel.run_chunk(b, kv_head * group + g, chunk, begin, keys[worker], queries[worker],
                         dq + ((owner * group + g) * chunks + chunk) * query_elements);
      }
      kernel.store_keys(b, kv_head, begin, end, keys[worker]);
    });
    const int64_t pieces = (p.L + kUnit - 1) / kUnit;
    parallel_for(threads, owners.count * group * pieces, [&](int, int64_t i) {
      const int64_t head = i / pieces, begin = i % pieces * kUnit, end = smaller<int64_t>(begin + kUnit, p.L);
      T* total = dq + head * chunks * query_elements;
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        kernel.add_queries(begin, end, total, total + chunk * query_elements);
      }
      int64_t b, kv_head;
      owners.find(head / group, pair, b, kv_head);
      kernel.store_queries(b, kv_head * group + head % group, begin, end, total);
    });
  }
  if (kernel.dbias.on) kernel.store_bias();
}
