// The one matrix product that everything is made of:  C (+)= A B, with A read element by element (any strides), B and C
// row-major in whole vectors.

// Register tile, in rows and vectors: MR * NV accumulators, NV of B, and one broadcast element of A.
// 6 * 2 + 2 + 1 = 15 of 16 registers, 6 * 4 + 4 + 1 = 29 of 32. (AVX-512: 7x4, 8x3, 12x2, 8x2 and 4x4 are all within 6
// %.)
constexpr int kMR = 6;
constexpr int kNV = kVectorRegisters == 32 ? 4 : 2;

// Columns of the panels into which a transposed operand is packed.
template <class T>
constexpr int kPanel = kNV * kWidth<T>;

// Longest running sum over head_dim. At 256 one sum was 1.24-1.47 times as far from float64 as torch's fp32 kernels.
constexpr int64_t kMaxDepth = 128;

// A half-open range of indices.
struct Range {
  int begin, end;
};

// C[MR][NV vectors] = (accumulate ? C : 0) + sum over k < depth of A(i, k) B[k]. The sum itself always starts from zero
// and C is added last: with depths of a unit of keys or a tile of queries, that makes long sums pairwise at their top
// level, which halves the error of a 512 key softmax-weighted sum at no cost.
template <class T, int MR, int NV>
__attribute__((noinline)) void tile(const T* a, int64_t row_a, int64_t col_a, const T* b, int64_t ldb, T* c,
                                    int64_t ldc, int64_t depth, bool accumulate) noexcept {
  constexpr int W = kWidth<T>;
  if (accumulate) {
    // Used only at the end, by when it has come from L2 (backward at D = 128 and 256: 2 % of the time).
    for (int i = 0; i < MR; ++i) __builtin_prefetch(c + i * ldc);
  }
  Vec<T> sum[MR][NV] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) row[j] = load(b + j * W);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Vec<T> x = broadcast(a[i * row_a]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sum[i][j] += x * row[j];
    }
    a += col_a;
    b += ldb;
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      T* out = c + i * ldc + j * W;
      store(out, accumulate ? load(out) + sum[i][j] : sum[i][j]);
    }
  }
}

template <class T>
using Tile = void (*)(const T*, int64_t, int64_t, const T*, int64_t, T*, int64_t, int64_t, bool) noexcept;

template <class T, int MR>
PYATTN_INLINE Tile<T> tile_of_width(int vectors) {
  if constexpr (kNV == 2) return vectors == 1 ? tile<T, MR, 1> : tile<T, MR, 2>;
  constexpr Tile<T> kTiles[] = {tile<T, MR, 1>, tile<T, MR, 2>, tile<T, MR, 3>, tile<T, MR, 4>};
  return kTiles[vectors - 1];
}

// The instance for `rows` <= kMR rows and `vectors` <= kNV vectors: remainders are smaller tiles, never scalar loops.
template <class T>
PYATTN_INLINE Tile<T> tile_of(int rows, int vectors) {
  switch (rows) {
    case 1:
      return tile_of_width<T, 1>(vectors);
    case 2:
      return tile_of_width<T, 2>(vectors);
    case 3:
      return tile_of_width<T, 3>(vectors);
    case 4:
      return tile_of_width<T, 4>(vectors);
    case 5:
      return tile_of_width<T, 5>(vectors);
    default:
      return tile_of_width<T, 6>(vectors);
  }
}

PYATTN_INLINE int row_groups(int rows) { return (rows + kMR - 1) / kMR; }

// c[rows][kUnit] = a b, b packed in panels [panel][depth][kPanel]. Group g of kMR rows is computed in its columns
// [groups[g].begin, groups[g].end) only, rounded to whole panels below and to whole vectors above; the others are left
// as they were.
template <class T, class Group>
void multiply_panels(int rows, const T* a, int64_t lda, const T* b, int64_t depth, T* c, int64_t ldc,
                     const Group* groups) {
  for (int n = 0; n < kUnit; n += kPanel<T>) {
    for (int g = 0; g < row_groups(rows); ++g) {
      if (groups[g].end <= n || groups[g].begin >= n + kPanel<T>) continue;
      const int vectors = (groups[g].end - n + kWidth<T> - 1) / kWidth<T>;
      const int i = g * kMR, count = rows - i < kMR ? rows - i : kMR;
      const Tile<T> tile = tile_of<T>(count, vectors < kNV ? vectors : kNV);
      // One pass even for a depth of 0, which makes zeros.
      for (int64_t k = 0; k == 0 || k < depth; k += kMaxDepth) {
        tile(a + i * lda + k, lda, 1, b + n * depth + k * kPanel<T>, kPanel<T>, c + i * ldc + n, ldc,
             depth - k < kMaxDepth ? depth - k : kMaxDepth, k > 0);
      }
    }
  }
}

// c[rows][columns] = (accumulate ? c : 0) + a b, b row-major; columns is a multiple of the vector. Group g of kMR rows
// sums over the range depth[g] only.
template <class T>
void multiply_rows(int rows, const T* a, int64_t row_a, int64_t col_a, const T* b, int64_t ldb, int columns, T* c,
                   int64_t ldc, const Range* depth, bool accumulate) {
  for (int n = 0; n < columns; n += kPanel<T>) {
    const int vectors = (columns - n) / kWidth<T> < kNV ? (columns - n) / kWidth<T> : kNV;
    for (int g = 0; g < row_groups(rows); ++g) {
      const Range k = depth[g];
      if (accumulate && k.begin >= k.end) continue;
      const int i = g * kMR, count = rows - i < kMR ? rows - i : kMR;
      tile_of<T>(count, vectors)(a + i * row_a + k.begin * col_a, row_a, col_a, b + k.begin * ldb + n, ldb,
                                 c + i * ldc + n, ldc, k.end - k.begin, accumulate);
    }
  }
}
