// What stands between a product q k^T and the softmax: which keys a query sees, and what is added to its scores.
// Forward and backward both pass every row of scores through here, so a new kind of mask or score needs no other place:
// bounds that follow from a row's index go into Visibility::row_end, element tests into Visibility::view and
// hide_masked, functions of the score into ScoreMaker::finish.

// What a group of up to kMR queries sees of a unit of keys: nothing outside the columns [begin, end).
struct GroupView {
  uint8_t begin, end;
  bool masked;  // the bool mask hides some of the columns below `end` from some of the queries
};
static_assert(kUnit <= UINT8_MAX);

// The bool mask of a call as blocks of kMR queries and kUnit keys see it: one view per block, made once per call. So
// the mask is read once and row by row, not for every head and pass in the order of tiles: a band of 256 keys among
// 4096 would spend more time on that than on its scores.
struct MaskSummary {
  Tensor blocks;              // [*batch, head, group, unit] of GroupView, with stride 0 where the mask is broadcast
  int64_t units, groups = 0;  // of one matrix
  int64_t count = 0;          // of all

  explicit MaskSummary(const AttentionProblem& p) : units(p.mask.col == 0 ? 1 : (p.S + kUnit - 1) / kUnit) {
    if (p.mask.data == nullptr) return;
    groups = p.mask.row == 0 ? 1 : (p.L + kMR - 1) / kMR;
    blocks.col = p.mask.col == 0 ? 0 : 1;
    blocks.row = p.mask.row == 0 ? 0 : units;
    blocks.head = p.mask.head == 0 ? 0 : groups * units;
    count = groups * units * (p.mask.head == 0 ? 1 : p.Hq);
    for (int d = p.batch_rank - 1; d >= 0; --d) {
      blocks.batch[d] = p.mask.batch[d] == 0 ? 0 : count;
      count *= p.mask.batch[d] == 0 ? 1 : p.batch_shape[d];
    }
  }

  void fill(const AttentionProblem& p, int threads) const {
    parallel_for(threads, distinct_matrices(p, p.mask), [&](int, int64_t i) {
      const MatrixIndex index = distinct_matrix(p, p.mask, i);
      const uint8_t* mask = static_cast<const uint8_t*>(p.mask.data) + matrix_offset(p, p.mask, index);
      GroupView* to = static_cast<GroupView*>(blocks.data) + matrix_offset(p, blocks, index);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t rows = p.mask.row == 0 ? 1 : smaller<int64_t>(kMR, p.L - g * kMR);
        for (int64_t u = 0; u < units; ++u) {
          const int keys = static_cast<int>(smaller<int64_t>(kUnit, p.S - u * kUnit));
          const uint8_t* corner = mask + g * kMR * p.mask.row + u * kUnit * p.mask.col;
          to[g * units + u] = summarise(corner, rows, p.mask.row, keys, p.mask.col);
        }
      }
    });
  }

  // One query's row of the mask over a unit, 0 from `keys` on.
  PYATTN_INLINE static void read_row(const uint8_t* row, int64_t stride, int keys, uint8_t* to) {
    if (stride == 1 && keys == kUnit) {
      memcpy(to, row, kUnit);
    } else {
      for (int c = 0; c < kUnit; ++c) to[c] = c < keys ? row[c * stride] : 0;
    }
  }

 private:
  // In words of 8 columns, since g++ 12 takes byte vectors apart here. Bytes other than 0 and 1 can only make a block
  // count as masked, and masked blocks are tested by element.
  static GroupView summarise(const uint8_t* mask, int64_t rows, int64_t row_stride, int keys, int64_t col_stride) {
    constexpr int kWords = kUnit / 8;
    uint64_t some[kWords] = {}, every[kWords];  // a column's byte is nonzero: some query sees it; every query does
    memset(every, 0xff, sizeof every);
    for (int64_t i = 0; i < rows; ++i) {
      uint64_t row[kWords];
      read_row(mask + i * row_stride, col_stride, keys, reinterpret_cast<uint8_t*>(row));
      for (int w = 0; w < kWords; ++w) some[w] |= row[w], every[w] &= row[w];
    }
    int begin = 0, words = kWords;
    while (words > 0 && some[words - 1] == 0) --words;
    if (words == 0) return {};
    while (some[begin] == 0) ++begin;
    bool masked = begin > 0;
    for (int w = begin; w < words - 1; ++w) {
      masked |= ((every[w] - 0x0101010101010101) & ~every[w] & 0x8080808080808080) != 0;  // has a zero byte
    }
    uint8_t last_some[8], last_every[8];
    memcpy(last_some, some + words - 1, 8);
    memcpy(last_every, every + words - 1, 8);
    int last = 8;
    while (last_some[last - 1] == 0) --last;
    for (int c = 0; c < last; ++c) masked |= last_every[c] == 0;
    return {static_cast<uint8_t>(begin * 8), static_cast<uint8_t>((words - 1) * 8 + last), masked};
  }
};

// Which keys the queries of one (batch, head) see.
struct Visibility {
  int64_t S;
  bool causal;
  int64_t diagonal, prefix;
  const uint8_t* mask = nullptr;  // nullptr: no bool mask
  int64_t mask_row = 0, mask_col = 0;
  const GroupView* blocks = nullptr;  // the mask's summary
  int64_t blocks_row = 0, blocks_col = 0;

  Visibility(const AttentionProblem& p, const MaskSummary& summary, int64_t b, int64_t h)
      : S(p.S), causal(p.causal), diagonal(p.diagonal), prefix(p.prefix) {
    if (p.mask.data == nullptr) return;
    mask = static_cast<const uint8_t*>(p.mask.data) + matrix_offset(p, p.mask, b, h);
    mask_row = p.mask.row;
    mask_col = p.mask.col;
    blocks = static_cast<const GroupView*>(summary.blocks.data) + matrix_offset(p, summary.blocks, b, h);
    blocks_row = summary.blocks.row;
    blocks_col = summary.blocks.col;
  }

  // Query i sees no key from row_end(i) on; it never decreases with i.
  int64_t row_end(int64_t i) const { return causal ? clamp<int64_t>(larger(i + diagonal + 1, prefix), 0, S) : S; }
  // The first query with row_end > key; key < S.
  int64_t first_row(int64_t key) const { return !causal || key < prefix ? 0 : larger<int64_t>(0, key - diagonal); }
  // Columns that query i sees of the unit from first_key on, as far as the unit's `columns` go.
  int columns(int64_t i, int64_t first_key, int columns) const {
    return static_cast<int>(clamp<int64_t>(row_end(i) - first_key, 0, columns));
  }

  // What each group of the queries [first, first + rows) sees of the unit; false if none sees anything. `first` is a
  // multiple of kMR.
  bool view(int64_t first, int rows, int64_t first_key, GroupView* groups) const {
    const int keys = static_cast<int>(smaller<int64_t>(kUnit, S - first_key));
    bool seen = false;
    for (int g = 0; g < row_groups(rows); ++g) {
      const int64_t last = first + smaller(rows, (g + 1) * kMR) - 1;
      GroupView view = {0, static_cast<uint8_t>(keys), false};
      if (mask != nullptr) view = blocks[last / kMR * blocks_row + first_key / kUnit * blocks_col];
      view.end = static_cast<uint8_t>(columns(last, first_key, view.end));
      if (view.begin >= view.end) view = {};
      groups[g] = view;
      seen |= view.end > 0;
    }
    return seen;
  }

  // In all of the unit, however little the query sees of it: both loops then have a constant length (backward and
  // forward with a band of 256 at S = 4096: 20 % of the time).
  template <class T>
  void hide_masked(int64_t query, int64_t first_key, T* scores) const {
    uint8_t row[kUnit];
    const int keys = static_cast<int>(smaller<int64_t>(kUnit, S - first_key));
    MaskSummary::read_row(mask + query * mask_row + first_key * mask_col, mask_col, keys, row);
    for (int c = 0; c < kUnit; ++c) scores[c] = row[c] != 0 ? scores[c] : -T(INFINITY);
  }
};

// scores[c] += bias[query][first_key + c]
template <class T>
void add_bias(const Matrix& bias, int64_t query, int64_t first_key, int64_t keys, T* scores) {
  with_storage<T>(bias.dtype, bias.data, [&](const auto* data) {
    for_each_vector<T>(data + query * bias.row + first_key * bias.col, bias.col, keys,
                       [&](int64_t c, Vec<T> x) { store(scores + c, load(scores + c) + x); });
  });
}

// The scores of one (batch, head) as everything between product and softmax leaves them.
template <class T>
struct ScoreMaker {
  Visibility visible;
  bool has_bias;
  Matrix bias;

  ScoreMaker(const AttentionProblem& p, const MaskSummary& summary, int64_t b, int64_t h)
      : visible(p, summary, b, h),
        has_bias(p.bias.data != nullptr),
        bias(has_bias ? matrix(p, p.bias, b, h) : Matrix{}) {}

  // Finishes scores[c] = scale q.k of one query and the keys first_key + c of a unit; scores has room for
  // whole vectors.
  void finish(int64_t query, int64_t first_key, int keys, bool masked, T* scores) const {
    if (has_bias) add_bias(bias, query, first_key, keys, scores);
    if (masked) visible.hide_masked(query, first_key, scores);
  }
};

// Dropout of one (batch, head).
struct Dropout {
  bool on;
  uint32_t threshold;  // an element stays iff its word is at least this
  double keep_scale;   // of what stays; with p = 1 it is 0, and so is everything
  PhiloxRow row;

  Dropout(const AttentionProblem& p, int64_t b, int64_t h)
      : on(p.dropout_p > 0),
        threshold(p.dropout_p < 1 ? static_cast<uint32_t>(p.dropout_p * 0x1p32) : UINT32_MAX),
        keep_scale(scale(p)),
        row{p.seed, 0, static_cast<uint32_t>(h), static_cast<uint32_t>(b)} {}

  static double scale(const AttentionProblem& p) { return p.dropout_p < 1 ? 1 / (1 - p.dropout_p) : 0; }

  // The words of one query and the keys of a unit.
  void draw(int64_t query, int64_t first_key, uint32_t* words) const {
    philox_words({row.seed, static_cast<uint32_t>(query), row.head, row.batch}, first_key, words);
  }
  // Zeroes the dropped ones of `keys` values; a NaN stays one, as in the definition's product with 0.
  template <class T>
  void drop(const uint32_t* words, int keys, T* values) const {
    for (int c = 0; c < keys; ++c) values[c] *= words[c] >= threshold ? T(1) : T(0);
  }
};
