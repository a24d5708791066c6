// Vectors of floats as wide as the instruction set this file is compiled for.
//
// Everything has internal linkage: the same header is compiled several times with different
// instruction sets, and the linker must not mix them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// gcc's own headers leave registers undefined on purpose, and gcc warns of them where inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntVec __attribute__((vector_size(4 * kWidth)));
typedef float Vec4 __attribute__((vector_size(16)));

struct Half {
  uint16_t bits;
};

inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline float toFloat(float x) { return x; }

inline float toFloat(Half h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  const uint32_t magnitude = h.bits & 0x7fff;
  float value;
  if (magnitude >= 0x7c00) {  // infinity or not a number
    const uint32_t bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // Exponent and fraction move into place; the product mends the bias, subnormals included.
  const uint32_t bits = magnitude << 13;
  std::memcpy(&value, &bits, sizeof value);
  value *= 0x1p112f;
  return sign ? -value : value;
#endif
}

inline void fromFloat(float x, float* out) { *out = x; }

inline void fromFloat(float x, Half* out) {
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits >= 0x47800000) {  // 65536 and beyond, infinity, not a number
    out->bits = static_cast<uint16_t>(sign | (bits > 0x7f800000 ? 0x7e00 : 0x7c00));
  } else if (bits < 0x38800000) {  // subnormal: adding 0.5 rounds at its last bit
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    out->bits = static_cast<uint16_t>(sign | (bits - 0x3f000000));
  } else {  // round to nearest, ties to even
    bits += 0xfff + (bits >> 13 & 1);
    out->bits = static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13);
  }
#endif
}

inline Vec load(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = toFloat(p[i]);
  return v;
#endif
}

inline Vec load(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

// The first count < kWidth elements, zeros behind them; what lies behind is not read.
template <typename T>
inline Vec loadPart(const T* p, int64_t count) {
  T part[kWidth] = {};
  std::memcpy(part, p, count * sizeof(T));
  return load(part);
}

#if defined(__AVX512F__)
template <>
inline Vec loadPart(const float* p, int64_t count) {
  return reinterpret_cast<Vec>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << count) - 1), p));
}

template <>
inline Vec loadPart(const Half* p, int64_t count) {
  const __mmask16 some = static_cast<__mmask16>((1 << count) - 1);
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, p)));
}
#endif

// Rows become columns, four by four.
inline void transpose4(Vec4* a, Vec4* b, Vec4* c, Vec4* d) {
#if defined(__x86_64__)
  _MM_TRANSPOSE4_PS(*a, *b, *c, *d);
#else
  const Vec4 a0 = *a, b0 = *b, c0 = *c, d0 = *d;
  *a = Vec4{a0[0], b0[0], c0[0], d0[0]};
  *b = Vec4{a0[1], b0[1], c0[1], d0[1]};
  *c = Vec4{a0[2], b0[2], c0[2], d0[2]};
  *d = Vec4{a0[3], b0[3], c0[3], d0[3]};
#endif
}

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Reductions: halves are added until four lanes remain.
template <typename V, typename Op>
inline float reduce(V v, Op op) {
  float lanes[sizeof(V) / sizeof(float)];
  std::memcpy(lanes, &v, sizeof v);
  constexpr int count = sizeof(V) / sizeof(float);
  Vec4 four;
  std::memcpy(&four, lanes, sizeof four);
  for (int i = 4; i < count; i += 4) {
    Vec4 next;
    std::memcpy(&next, lanes + i, sizeof next);
    four = op(four, next);
  }
  const Vec4 two = op(four, Vec4{four[2], four[3], four[0], four[1]});
  const Vec4 one = op(two, Vec4{two[1], two[0], two[3], two[2]});
  return one[0];
}

inline float sumOf(Vec v) {
  return reduce(v, [](Vec4 a, Vec4 b) { return a + b; });
}

inline float maximumOf(Vec v) {
  return reduce(v, [](Vec4 a, Vec4 b) { return a > b ? a : b; });
}

#if defined(__AVX512F__)
#define LMINF_SIMD(name) _mm512_##name
#elif defined(__AVX2__)
#define LMINF_SIMD(name) _mm256_##name
#elif defined(__x86_64__)
#define LMINF_SIMD(name) _mm_##name
#endif

// a · b + c, rounded once wherever the instruction set can: said and not left to the compiler, so
// that every function that sums in one order finds the same bits.
inline Vec multiplyAdd(Vec a, Vec b, Vec c) {
#if defined(__FMA__)
  return LMINF_SIMD(fmadd_ps)(a, b, c);
#else
  return a * b + c;
#endif
}

// Four sums at once: result[i] = the sum of the lanes of the i-th argument.
inline Vec4 sumsOf(Vec a, Vec b, Vec c, Vec d) {
#if defined(LMINF_SIMD)
  const Vec ab = LMINF_SIMD(unpacklo_ps)(a, b) + LMINF_SIMD(unpackhi_ps)(a, b);
  const Vec cd = LMINF_SIMD(unpacklo_ps)(c, d) + LMINF_SIMD(unpackhi_ps)(c, d);
  const Vec lanes = LMINF_SIMD(shuffle_ps)(ab, cd, 0x44) + LMINF_SIMD(shuffle_ps)(ab, cd, 0xEE);
  Vec4 piece[kWidth / 4];
  std::memcpy(piece, &lanes, sizeof lanes);
  for (int count = kWidth / 4; count > 1; count /= 2) {
    for (int i = 0; i < count / 2; ++i) piece[i] += piece[i + count / 2];
  }
  return piece[0];
#else
  return Vec4{sumOf(a), sumOf(b), sumOf(c), sumOf(d)};
#endif
}

// eˣ for x ≤ 0 to about one unit in the last place; 0 below −87.3.
inline Vec expNonPositive(Vec x) {
  const Vec floor = splat(-87.3f);
  const Vec clamped = maximum(x, floor);
  // Adding 1.5·2²³ leaves the nearest integer in the low bits of the sum.
  const Vec magic = splat(12582912.0f);
  const Vec shifted = clamped * 1.44269504088896341f + magic;
  const Vec n = shifted - magic;
  // ln 2 in two pieces, the first of few bits, so that n·ln 2 loses nothing.
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440054690583e-4f;
  // Taylor's series to r⁷ with |r| ≤ ln 2 / 2: the rest is below 6e-9.
  Vec y = splat(1.0f / 5040);
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * (r * r) + r + 1.0f;
  IntVec exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent - 0x4B400000 + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < floor ? Vec{} : y * power;
}

inline Vec tanhOf(Vec x) {
  const Vec size = x < 0.0f ? -x : x;
  const Vec e = expNonPositive(size * -2.0f);
  const Vec large = (1.0f - e) / (1.0f + e);
  // Near zero 1 − e cancels; there x − x³/3 + 2x⁵/15 − 17x⁷/315 + 62x⁹/2835 is exact enough.
  const Vec z = x * x;
  Vec small = splat(62.0f / 2835);
  small = small * z - 17.0f / 315;
  small = small * z + 2.0f / 15;
  small = small * z - 1.0f / 3;
  small = small * z * size + size;
  const Vec value = size < 0.25f ? small : large;
  return x < 0.0f ? -value : value;
}

}  // namespace
