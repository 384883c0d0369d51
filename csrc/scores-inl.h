// What stands between a product q k^T and the softmax: which keys a query sees, and what is added to its scores.
// Forward and backward both pass every row of scores through here, so a new kind of mask or score needs no other place:
// bounds that follow from a row's index go into Visibility::row_end, element tests into Visibility::view and
// hide_masked, functions of the score into ScoreMaker::finish.

// What a group of up to kMR queries sees of a unit of keys.
struct GroupView {
  int columns;  // leading columns; beyond them it sees none
  bool masked;  // the bool mask hides some of them from some of the queries
};

// Which keys the queries of one (batch, head) see.
struct Visibility {
  int64_t S;
  bool causal;
  int64_t diagonal, prefix;
  const uint8_t* mask;  // nullptr: no bool mask
  int64_t mask_row, mask_col;

  Visibility(const AttentionProblem& p, int64_t b, int64_t h)
      : S(p.S),
        causal(p.causal),
        diagonal(p.diagonal),
        prefix(p.prefix),
        mask(nullptr),
        mask_row(p.mask.row),
        mask_col(p.mask.col) {
    if (p.mask.data != nullptr) mask = static_cast<const uint8_t*>(p.mask.data) + matrix_offset(p, p.mask, b, h);
  }

  // Query i sees no key from row_end(i) on; it never decreases with i.
  int64_t row_end(int64_t i) const { return causal ? clamp<int64_t>(larger(i + diagonal + 1, prefix), 0, S) : S; }
  // The first query with row_end > key; key < S.
  int64_t first_row(int64_t key) const { return !causal || key < prefix ? 0 : larger<int64_t>(0, key - diagonal); }
  // Columns that query i sees of the unit from first_key on, as far as the unit's `columns` go.
  int columns(int64_t i, int64_t first_key, int columns) const {
    return static_cast<int>(clamp<int64_t>(row_end(i) - first_key, 0, columns));
  }

  // What each group of the queries [first, first + rows) sees of the unit; false if none sees anything.
  //
  // The mask is read when a tile comes up, for every head anew: one byte against the 4 * head_dim and more operations
  // of a score, so that a summary kept from head to head would save next to nothing.
  bool view(int64_t first, int rows, int64_t first_key, GroupView* groups) const {
    const int keys = static_cast<int>(smaller<int64_t>(kUnit, S - first_key));
    int seen = 0;
    GroupView of_mask = {keys, false};
    for (int g = 0; g < row_groups(rows); ++g) {
      const int64_t query = first + g * kMR, count = smaller<int64_t>(kMR, first + rows - query);
      groups[g] = {columns(query + count - 1, first_key, keys), false};
      if (mask != nullptr && groups[g].columns > 0) {
        if (mask_row != 0 || seen == 0) of_mask = view_mask(query, mask_row == 0 ? 1 : count, first_key, keys);
        groups[g] = {smaller(groups[g].columns, of_mask.columns), of_mask.masked};
      }
      seen |= groups[g].columns;
    }
    return seen > 0;
  }

  template <class T>
  void hide_masked(int64_t query, int64_t first_key, int keys, T* scores) const {
    const uint8_t* row = mask + query * mask_row + first_key * mask_col;
    for (int c = 0; c < keys; ++c) {
      if (row[c * mask_col] == 0) scores[c] = -T(INFINITY);
    }
  }

 private:
  GroupView view_mask(int64_t query, int64_t rows, int64_t first_key, int keys) const {
    uint8_t some[kUnit] = {}, hidden[kUnit] = {};  // per column: a query sees it; one does not
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* row = mask + (query + i) * mask_row + first_key * mask_col;
      if (mask_col == 1) {
        for (int c = 0; c < keys; ++c) some[c] |= row[c], hidden[c] |= row[c] == 0;
      } else {
        for (int c = 0; c < keys; ++c) some[c] |= row[c * mask_col], hidden[c] |= row[c * mask_col] == 0;
      }
    }
    int columns = keys;
    while (columns > 0 && some[columns - 1] == 0) --columns;
    uint8_t masked = 0;
    for (int c = 0; c < columns; ++c) masked |= hidden[c];
    return {columns, masked != 0};
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

  ScoreMaker(const AttentionProblem& p, int64_t b, int64_t h)
      : visible(p, b, h), has_bias(p.bias.data != nullptr), bias(has_bias ? matrix(p, p.bias, b, h) : Matrix{}) {}

  // Finishes scores[c] = scale q.k of one query and the keys first_key + c of a unit; scores has room for
  // whole vectors.
  void finish(int64_t query, int64_t first_key, int keys, bool masked, T* scores) const {
    if (has_bias) add_bias(bias, query, first_key, keys, scores);
    if (masked) visible.hide_masked(query, first_key, keys, scores);
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
