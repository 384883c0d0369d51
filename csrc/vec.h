// The vector interface that the kernels are written in: GCC vector extensions, plus the few operations that they lack.
//
// Included once per variant, inside the variant's namespace; the width follows the flags this file is compiled with.
// Portable vectors reach 85-96 % of hand-written intrinsics in the matrix products, so intrinsics are kept for what
// compilers do badly: half-precision conversion and the widening multiplication of Philox.

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

#define PYATTN_INLINE inline __attribute__((always_inline))

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using IntVec = typename Simd<T>::Int;
template <class T>
constexpr int kWidth = kVectorBytes / sizeof(T);

template <class T>
PYATTN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x + 0 would be a real addition, because -0 + 0 is +0; x - 0 is x
}

PYATTN_INLINE Vec<float> load(const float* p) { return *reinterpret_cast<const Simd<float>::Unaligned*>(p); }
PYATTN_INLINE Vec<double> load(const double* p) { return *reinterpret_cast<const Simd<double>::Unaligned*>(p); }
PYATTN_INLINE void store(float* p, Vec<float> x) { *reinterpret_cast<Simd<float>::Unaligned*>(p) = x; }
PYATTN_INLINE void store(double* p, Vec<double> x) { *reinterpret_cast<Simd<double>::Unaligned*>(p) = x; }

// ---- Half precision: widened exactly, narrowed by rounding to nearest, ties to even.

typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Bits64 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));

PYATTN_INLINE Bits32 widen_bits(const uint16_t* p) {
  Bits16 narrow;
  memcpy(&narrow, p, sizeof narrow);
  return __builtin_convertvector(narrow, Bits32);
}
PYATTN_INLINE void narrow_bits(uint16_t* p, Bits32 bits) {
  const Bits16 narrow = __builtin_convertvector(bits, Bits16);
  memcpy(p, &narrow, sizeof narrow);
}
PYATTN_INLINE Bits32 select(Bits32 condition, Bits32 yes, Bits32 no) { return (condition & yes) | (~condition & no); }

PYATTN_INLINE Vec<float> load(const BFloat16* p) { return (Vec<float>)(widen_bits(&p->bits) << 16); }
PYATTN_INLINE void store(BFloat16* p, Vec<float> x) {
  const Bits32 bits = (Bits32)x;
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 quiet_nan = (bits >> 16) | 0x40;  // rounding could carry a NaN's payload into an infinity
  narrow_bits(&p->bits, select((Bits32)(x != x), quiet_nan, rounded));
}

#if defined(__AVX512F__)
PYATTN_INLINE Vec<float> load(const Float16* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PYATTN_INLINE void store(Float16* p, Vec<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
PYATTN_INLINE Vec<float> load(const Float16* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PYATTN_INLINE void store(Float16* p, Vec<float> x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
PYATTN_INLINE Vec<float> load(const Float16* p) {
  const Bits32 half = widen_bits(&p->bits), sign = (half & 0x8000) << 16, magnitude = (half & 0x7fff) << 13;
  // Read as float32, the magnitude's exponent is too small by 127 - 15; the product restores it, subnormals included.
  const Bits32 finite = (Bits32)((Vec<float>)magnitude * 0x1p112f);
  return (Vec<float>)(sign | select((Bits32)(magnitude >= 0x0f800000), magnitude | 0x7f800000, finite));
}
PYATTN_INLINE void store(Float16* p, Vec<float> x) {
  const Bits32 bits = (Bits32)x, sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const Bits32 normal = (magnitude - ((127 - 15) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves the value, rounded to a multiple of 2^-24, in the low bits: the subnormal halves.
  const Bits32 subnormal = (Bits32)((Vec<float>)magnitude + 0.5f) - 0x3f000000;
  Bits32 half = select((Bits32)(magnitude < ((127 - 14) << 23)), subnormal, normal);
  half = select((Bits32)(magnitude >= 0x477ff000), Bits32{} + 0x7c00, half);  // 65520 and above round to infinity
  half = select((Bits32)(magnitude > 0x7f800000), Bits32{} + 0x7e00, half);
  narrow_bits(&p->bits, half | sign);
}
#endif

// ---- Lanes

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using Type = Lanes<I...>;
};

// Lane i of the result is lane Pick::at(i) of a followed by b.
template <class T, class Pick, int... I>
PYATTN_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, Lanes<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::at(I)...);
#else
  return __builtin_shuffle(a, b, IntVec<T>{Pick::at(I)...});
#endif
}
template <class T, class Pick>
PYATTN_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
  return shuffle<T, Pick>(a, b, typename MakeLanes<kWidth<T>>::Type{});
}

template <int H, int W>
struct Rotated {
  static constexpr int at(int i) { return (i + H) % W; }
};
// One step of a transposition: exchanges blocks of H lanes between rows whose indices differ by H.
template <int H, int W>
struct Upper {
  static constexpr int at(int i) { return i & H ? i - H + W : i; }
};
template <int H, int W>
struct Lower {
  static constexpr int at(int i) { return i & H ? i + W : i + H; }
};

template <class T>
PYATTN_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <class T, int H = kWidth<T> / 2>
PYATTN_INLINE T reduce_max(Vec<T> x) {
  const Vec<T> m = max<T>(x, shuffle<T, Rotated<H, kWidth<T>>>(x, x));
  if constexpr (H > 1) return reduce_max<T, H / 2>(m);
  return m[0];
}
template <class T, int H = kWidth<T> / 2>
PYATTN_INLINE T reduce_add(Vec<T> x) {
  const Vec<T> sum = x + shuffle<T, Rotated<H, kWidth<T>>>(x, x);
  if constexpr (H > 1) return reduce_add<T, H / 2>(sum);
  return sum[0];
}

// Transposes a square of kWidth rows in place.
template <class T, int H = kWidth<T> / 2>
PYATTN_INLINE void transpose(Vec<T>* rows) {
  constexpr int W = kWidth<T>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & H) continue;
    const Vec<T> upper = shuffle<T, Upper<H, W>>(rows[i], rows[i + H]);
    rows[i + H] = shuffle<T, Lower<H, W>>(rows[i], rows[i + H]);
    rows[i] = upper;
  }
  if constexpr (H > 1) transpose<T, H / 2>(rows);
}

// Lane i of the result is rows[i] reduced over its lanes by f(Vec, Vec); kWidth rows, which are overwritten. Half a
// transposition, in place of kWidth reductions that take twice its shuffles for a single number each.
template <class T, int H = kWidth<T> / 2, class F>
PYATTN_INLINE Vec<T> reduce_rows(Vec<T>* rows, const F& f) {
  constexpr int W = kWidth<T>;
#pragma GCC unroll 8
  for (int i = 0; i < H; ++i) {
    rows[i] = f(shuffle<T, Upper<H, W>>(rows[i], rows[i + H]), shuffle<T, Lower<H, W>>(rows[i], rows[i + H]));
  }
  if constexpr (H > 1) return reduce_rows<T, H / 2>(rows, f);
  return rows[0];
}

// ---- Functions

// e^x for x <= 88 (709 in double), 0 below the range of normal numbers (and at -inf), NaN for NaN. x log2(e) is split
// into an integer n and a rest f in [-0.5, 0.5]; the polynomials are the minimax ones for 2^f in relative error (Remez
// exchange in 60 digits): 1.9e-9 at degree 6, 3.1e-18 at degree 11, so that rounding is all that remains. exp(0) is
// exactly 1.
PYATTN_INLINE Vec<float> exp(Vec<float> x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  constexpr float kLog2E = 1.44269504f;
  const Vec<float> shifted = x * kLog2E + kRound;
  const Vec<float> f = x * kLog2E - (shifted - kRound);
  Vec<float> p = broadcast(1.5345812161e-4f) * f + 1.3399931177e-3f;
  p = p * f + 9.6184889563e-3f;
  p = p * f + 5.5503287771e-2f;
  p = p * f + 2.4022646891e-1f;
  p = p * f + 6.9314720574e-1f;
  p = p * f + 1.0f;
  const Vec<float> power = (Vec<float>)(((Bits32)shifted << 23) + 0x3f800000);
  return x < -87.3f ? Vec<float>{} : p * power;
}
PYATTN_INLINE Vec<double> exp(Vec<double> x) {
  constexpr double kRound = 0x1.8p52;
  constexpr double kLog2E = 1.4426950408889634;
  const Vec<double> shifted = x * kLog2E + kRound;
  const Vec<double> f = x * kLog2E - (shifted - kRound);
  Vec<double> p = broadcast(4.43528270695727715e-10) * f + 7.0741056135081428e-9;
  p = p * f + 1.01781980216719308e-7;
  p = p * f + 1.32154330896763992e-6;
  p = p * f + 1.52527334899885256e-5;
  p = p * f + 1.54035304625144321e-4;
  p = p * f + 1.33335581467899217e-3;
  p = p * f + 9.61812910758833524e-3;
  p = p * f + 5.55041086648199216e-2;
  p = p * f + 2.40226506959101562e-1;
  p = p * f + 6.9314718055994533e-1;
  p = p * f + 1.0;
  const Vec<double> power = (Vec<double>)(((Bits64)shifted << 52) + (1023ULL << 52));
  return x < -708.0 ? Vec<double>{} : p * power;
}

template <class T>
PYATTN_INLINE IntVec<T> sign_bit() {
  return (IntVec<T>)broadcast(T(-0.0));
}
template <class T>
PYATTN_INLINE Vec<T> magnitude(Vec<T> x) {
  return (Vec<T>)((IntVec<T>)x & ~sign_bit<T>());
}

// 1 / (1 + e^-x), by e^-|x|, which cannot overflow; accurate relative to the result at either end.
template <class T>
PYATTN_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp(-magnitude<T>(x));
  return (x < T(0) ? e : broadcast(T(1))) / (e + T(1));
}

// (tanh(x) / x - 1) / x^2 as a function of z = x^2, |x| <= 0.625: minimax to 1.9e-8 and 1.7e-18 of tanh (Chebyshev, in
// 60 digits).
PYATTN_INLINE Vec<float> tanh_series(Vec<float> z) {
  Vec<float> p = broadcast(-6.0967142e-3f) * z + 2.0997179e-2f;
  p = p * z - 5.3850910e-2f;
  p = p * z + 1.3332770e-1f;
  return p * z - 3.3333329e-1f;
}
PYATTN_INLINE Vec<double> tanh_series(Vec<double> z) {
  Vec<double> p = broadcast(6.48516348279311315e-6) * z - 3.12011014257974e-5;
  p = p * z + 9.25711612955676827e-5;
  p = p * z - 2.37590649605556196e-4;
  p = p * z + 5.89660657775704335e-4;
  p = p * z - 1.45577541204780551e-3;
  p = p * z + 3.59212175115496227e-3;
  p = p * z - 8.86323510324087792e-3;
  p = p * z + 2.18694885190083058e-2;
  p = p * z - 5.39682539678969917e-2;
  p = p * z + 1.33333333333330416e-1;
  return p * z - 3.33333333333333329e-1;
}

// 1 - 2 / (e^2|x| + 1), and a series where that would lose digits: with 2 sigmoid(2x) - 1, or with e^2x - 1 as the
// numerator, the output of an LSTM was 1.4 times as far from float64 as torch's.
template <class T>
PYATTN_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> size = magnitude<T>(x), z = x * x;
  const Vec<T> bounded = size > T(20) ? broadcast(T(20)) : size;  // where it is 1 in either type
  const Vec<T> large = broadcast(T(1)) - broadcast(T(2)) / (exp(bounded * T(2)) + T(1));
  const Vec<T> result = size < T(0.625) ? size + size * (z * tanh_series(z)) : large;
  return (Vec<T>)((IntVec<T>)result | ((IntVec<T>)x & sign_bit<T>()));
}

// 64-bit lanes: the product of their low halves.
#if defined(__AVX512F__)
PYATTN_INLINE Bits64 multiply_low_halves(Bits64 a, Bits64 b) {
  return (Bits64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
PYATTN_INLINE Bits64 multiply_low_halves(Bits64 a, Bits64 b) {
  return (Bits64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
#elif defined(__SSE2__)
PYATTN_INLINE Bits64 multiply_low_halves(Bits64 a, Bits64 b) { return (Bits64)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
PYATTN_INLINE Bits64 multiply_low_halves(Bits64 a, Bits64 b) { return (a & 0xffffffff) * (b & 0xffffffff); }
#endif
