// Reading and writing tensors: rows of any storage type and stride to and from buffers of the compute type.

// The matrix of one (batch, head) of a tensor.
struct Matrix {
  char* data;
  int64_t row, col;
  Dtype dtype;
};

PYATTN_INLINE int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Elements from the start of `tensor` to its matrix (b, h), b being the flat batch index.
inline int64_t matrix_offset(const AttentionProblem& p, const Tensor& tensor, int64_t b, int64_t h) {
  int64_t offset = h * tensor.head;
  for (int d = p.batch_rank - 1; d >= 0; --d) {
    offset += b % p.batch_shape[d] * tensor.batch[d];
    b /= p.batch_shape[d];
  }
  return offset;
}

// Where a matrix is, one index per dimension.
struct MatrixIndex {
  int64_t batch[kMaxBatchRank];
  int64_t head;
};

inline int64_t matrix_offset(const AttentionProblem& p, const Tensor& tensor, const MatrixIndex& index) {
  int64_t offset = index.head * tensor.head;
  for (int d = 0; d < p.batch_rank; ++d) offset += index.batch[d] * tensor.batch[d];
  return offset;
}

// The matrices of a tensor that is broadcast where its stride is 0, each once. There may be some where what they are
// broadcast to is empty.
inline int64_t distinct_matrices(const AttentionProblem& p, const Tensor& tensor) {
  int64_t count = tensor.head == 0 ? 1 : p.Hq;
  for (int d = 0; d < p.batch_rank; ++d) count *= tensor.batch[d] == 0 ? 1 : p.batch_shape[d];
  return count;
}
inline MatrixIndex distinct_matrix(const AttentionProblem& p, const Tensor& tensor, int64_t i) {
  MatrixIndex index = {};
  if (tensor.head != 0) {
    index.head = i % p.Hq;
    i /= p.Hq;
  }
  for (int d = p.batch_rank - 1; d >= 0; --d) {
    if (tensor.batch[d] == 0) continue;
    index.batch[d] = i % p.batch_shape[d];
    i /= p.batch_shape[d];
  }
  return index;
}

inline Matrix matrix(const AttentionProblem& p, const Tensor& tensor, int64_t b, int64_t h) {
  char* data = static_cast<char*>(tensor.data) + matrix_offset(p, tensor, b, h) * element_size(tensor.dtype);
  return {data, tensor.row, tensor.col, tensor.dtype};
}

// Calls f with `data` as a pointer to its storage type: double for T = double, else float, BFloat16 or Float16.
template <class T, class F>
PYATTN_INLINE auto with_storage(Dtype dtype, char* data, const F& f) {
  if constexpr (sizeof(T) == 8) {
    return f(reinterpret_cast<double*>(data));
  } else if (dtype == Dtype::kBFloat16) {
    return f(reinterpret_cast<BFloat16*>(data));
  } else if (dtype == Dtype::kFloat16) {
    return f(reinterpret_cast<Float16*>(data));
  } else {
    return f(reinterpret_cast<float*>(data));
  }
}

// n <= kWidth elements, `stride` apart; the other lanes are 0.
template <class T, class S>
PYATTN_INLINE Vec<T> load_some(const S* p, int64_t stride, int64_t n) {
  if (stride == 1 && n == kWidth<T>) return load(p);
  S lanes[kWidth<T>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i * stride];
  return load(lanes);
}
template <class T, class S>
PYATTN_INLINE void store_some(S* p, int64_t stride, int64_t n, Vec<T> x) {
  if (stride == 1 && n == kWidth<T>) return store(p, x);
  S lanes[kWidth<T>];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i * stride] = lanes[i];
}

template <class T>
PYATTN_INLINE int64_t lanes_left(int64_t n, int64_t i) {
  return n - i < kWidth<T> ? n - i : kWidth<T>;
}

// Leading dimension for rows of n elements: whole vectors, and no multiple of 256 bytes, so that a column walked down
// by the micro-kernel does not fall on a few sets of the L1 cache.
template <class T>
PYATTN_INLINE int64_t padded(int64_t n) {
  return (n + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}
template <class T>
PYATTN_INLINE int64_t leading_dimension(int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t lines = (padded<T>(n) + kLine - 1) / kLine;
  return lines % 4 == 0 ? (lines + 1) * kLine : padded<T>(n);
}

// Whether everything added was finite, by the largest magnitude. (Sums of x * 0 would tell as well, but are a chain of
// 4 cycles per vector, which is longer than all the rest of packing takes.)
template <class T>
struct FiniteCheck {
  using Bits = IntVec<T>;
  using Word = decltype(Bits{}[0] + 0);
  static constexpr Word kInfinity = static_cast<Word>(sizeof(T) == 8 ? 0x7ff0000000000000 : 0x7f800000);
  static constexpr Word kMagnitude = static_cast<Word>(sizeof(T) == 8 ? 0x7fffffffffffffff : 0x7fffffff);
  Bits largest = {};

  PYATTN_INLINE void add(Vec<T> x) {
    const Bits magnitude = (Bits)x & kMagnitude;
    largest = largest > magnitude ? largest : magnitude;
  }
  PYATTN_INLINE bool all_finite() const {
    const Bits bad = largest >= kInfinity;
    bool finite = true;
    for (int i = 0; i < kWidth<T>; ++i) finite &= bad[i] == 0;
    return finite;
  }
};

// Calls f(c, vector of elements c, c + 1, ...) over n elements `stride` apart; the last vector is filled up with zeros.
template <class T, class S, class F>
PYATTN_INLINE void for_each_vector(const S* p, int64_t stride, int64_t n, const F& f) {
  int64_t c = 0;
  if (stride == 1) {
    for (; c + kWidth<T> <= n; c += kWidth<T>) f(c, load(p + c));
  }
  for (; c < n; c += kWidth<T>) f(c, load_some<T>(p + c * stride, stride, lanes_left<T>(n, c)));
}

// to[i][c] = from[first + i][c], zeros from `columns` to the next whole vector. Returns whether all are finite.
template <class T>
bool pack_rows(const Matrix& from, int64_t first, int64_t rows, int64_t columns, T* to, int64_t ld) {
  return with_storage<T>(from.dtype, from.data, [&](const auto* data) {
    FiniteCheck<T> check;
    for (int64_t i = 0; i < rows; ++i) {
      for_each_vector<T>(data + (first + i) * from.row, from.col, columns, [&](int64_t c, Vec<T> x) {
        check.add(x);
        store(to + i * ld + c, x);
      });
    }
    return check.all_finite();
  });
}

// A square block: rows `from`, `row` apart, transposed, times factor, to rows of `to`, ldt apart.
template <class T, class S>
PYATTN_INLINE void pack_square(const S* from, int64_t row, T factor, T* to, int64_t ldt, FiniteCheck<T>& check) {
  constexpr int W = kWidth<T>;
  Vec<T> block[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    const Vec<T> x = load(from + i * row);
    check.add(x);
    block[i] = x * factor;
  }
  transpose<T>(block);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * ldt, block[i]);
}

// The transpose of `count` <= kWidth rows of `columns` elements, times `factor`, to rows of one vector, ldt apart.
template <class T, class S>
void pack_columns(const S* rows, int64_t row, int64_t col, int64_t count, int64_t columns, T factor, T* to, int64_t ldt,
                  FiniteCheck<T>& check) {
  constexpr int W = kWidth<T>;
  int64_t d = 0;
  if (count == W && col == 1) {
    for (; d + W <= columns; d += W) pack_square<T>(rows + d, row, factor, to + d * ldt, ldt, check);
  }
  // What is left of it, in squares filled up with zeros.
  for (; d < columns; d += W) {
    const int64_t width = lanes_left<T>(columns, d);
    T square[W * W] = {}, transposed[W * W];
    for (int64_t i = 0; i < count; ++i) store(square + i * W, load_some<T>(rows + i * row + d * col, col, width));
    pack_square<T>(square, W, factor, transposed, W, check);
    for (int64_t i = 0; i < width; ++i) store(to + (d + i) * ldt, load(transposed + i * W));
  }
}

// The transpose of `keys` <= kUnit rows of `depth` elements, times `factor`, in panels [panel][depth][kPanel] with
// zeros from `keys` to the next whole vector. Returns whether all elements read are finite.
template <class T>
bool pack_transposed(const Matrix& from, int64_t first, int64_t keys, int64_t depth, T factor, T* to) {
  return with_storage<T>(from.dtype, from.data, [&](const auto* data) {
    FiniteCheck<T> check;
    for (int64_t key = 0; key < keys; key += kWidth<T>) {
      pack_columns<T>(data + (first + key) * from.row, from.row, from.col, lanes_left<T>(keys, key), depth, factor,
                      to + key / kPanel<T> * kPanel<T> * depth + key % kPanel<T>, kPanel<T>, check);
    }
    return check.all_finite();
  });
}

// Zeroes key c of a unit packed by pack_transposed.
template <class T>
void clear_packed_key(T* unit, int64_t c, int64_t depth) {
  T* panel = unit + c / kPanel<T> * kPanel<T> * depth + c % kPanel<T>;
  for (int64_t d = 0; d < depth; ++d) panel[d * kPanel<T>] = 0;
}

// Whether one row of a matrix is finite.
template <class T>
bool row_is_finite(const Matrix& from, int64_t i, int64_t columns) {
  return with_storage<T>(from.dtype, from.data, [&](const auto* data) {
    FiniteCheck<T> check;
    for_each_vector<T>(data + i * from.row, from.col, columns, [&](int64_t, Vec<T> x) { check.add(x); });
    return check.all_finite();
  });
}

// to[i][:] = factor * from[:], rounded once to the storage type.
template <class T>
void store_row(const Matrix& to, int64_t i, int64_t columns, const T* from, T factor) {
  with_storage<T>(to.dtype, to.data, [&](auto* data) {
    auto* row = data + i * to.row;
    int64_t c = 0;
    if (to.col == 1) {
      for (; c + kWidth<T> <= columns; c += kWidth<T>) store(row + c, load(from + c) * factor);
    }
    for (; c < columns; c += kWidth<T>) {
      store_some<T>(row + c * to.col, to.col, lanes_left<T>(columns, c), load(from + c) * factor);
    }
  });
}

// Sum over c of from[i][c] * x[c]; x is padded with zeros to a whole vector.
template <class T>
T dot_row(const Matrix& from, int64_t i, int64_t columns, const T* x) {
  return with_storage<T>(from.dtype, from.data, [&](const auto* data) {
    Vec<T> sum = {};
    for_each_vector<T>(data + i * from.row, from.col, columns, [&](int64_t c, Vec<T> y) { sum += y * load(x + c); });
    return reduce_add<T>(sum);
  });
}

// Element (i, 0) of a matrix stored in the compute type: lse, dlse.
template <class T>
PYATTN_INLINE T& element(const Matrix& m, int64_t i) {
  return reinterpret_cast<T*>(m.data)[i * m.row];
}

template <class T>
PYATTN_INLINE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
PYATTN_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
PYATTN_INLINE T clamp(T x, T low, T high) {
  return x < low ? low : x > high ? high : x;
}

// Hands out aligned pieces of one allocation. Run over a layout twice: with no memory it counts the bytes.
struct Carver {
  char* memory;
  int64_t bytes = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory + bytes);
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return memory == nullptr ? nullptr : piece;
  }
};

// Scratch of the calling thread, kept for its next call: memory fresh from the system costs a page fault per 4 KB,
// which at small sizes is more than the arithmetic. At most kKeptScratch bytes stay with a thread; a call that needs
// more pays for it anew, and does so much work that it does not show.
constexpr int64_t kKeptScratch = 32 << 20;

struct ScratchMemory {
  char* memory = nullptr;
  int64_t bytes = 0;

  ~ScratchMemory() { release(); }
  void release() {
    ::operator delete(memory, alignment(bytes));
    memory = nullptr;
    bytes = 0;
  }
  // The kernels walk over several matrices at once, more pages of 4 KB than the first level of the TLB holds: with huge
  // pages a backward at D = 128 and 256 takes 2 % less (Zen 3, a virtual machine).
  static std::align_val_t alignment(int64_t bytes) { return std::align_val_t(bytes < kHugePage ? 64 : kHugePage); }
};
thread_local ScratchMemory scratch;

// At least `bytes` bytes, valid until the next call; throws std::bad_alloc.
inline char* reserve_scratch(int64_t bytes) {
  if (bytes > scratch.bytes) {
    scratch.release();
    scratch.memory = static_cast<char*>(::operator new(static_cast<size_t>(bytes), ScratchMemory::alignment(bytes)));
    scratch.bytes = bytes;
    prefer_huge_pages(scratch.memory, bytes);
  }
  return scratch.memory;
}
inline void trim_scratch() {
  if (scratch.bytes > kKeptScratch) scratch.release();
}

// body(worker, i) for i < n, worker < threads being the index of the thread that runs it; in order of i if threads
// == 1. body must not throw, nor must the result depend on the order.
template <class F>
void parallel_for(int threads, int64_t n, const F& body) {
#if defined(_OPENMP)
  if (threads > 1 && n > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < n; ++i) body(omp_get_thread_num(), i);
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) body(0, i);
}

// The same, and after body(worker, i) then(worker, i), one at a time and in the order of i.
template <class F, class G>
void parallel_for_ordered(int threads, int64_t n, const F& body, const G& then) {
#if defined(_OPENMP)
  if (threads > 1 && n > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) ordered
    for (int64_t i = 0; i < n; ++i) {
      body(omp_get_thread_num(), i);
#pragma omp ordered
      then(omp_get_thread_num(), i);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i) {
    body(0, i);
    then(0, i);
  }
}
