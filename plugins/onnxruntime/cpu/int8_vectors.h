// Vectors of integers: bytes of a weight row, their products with rounded activations, and the sums
// of blocks. Compiled once per instruction set.
//
// A chunk is as many bytes of a weight row as a vector has. Every lane of 4 bytes belongs to one
// block, which has at least two lanes.
#pragma once

#include "simd.h"

namespace {

typedef uint8_t Bytes __attribute__((vector_size(4 * kWidth)));
typedef uint32_t WordVec __attribute__((vector_size(4 * kWidth)));

constexpr int64_t kChunk = 4 * kWidth;  // bytes

inline Bytes loadBytes(const void* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec toFloats(IntVec v) { return __builtin_convertvector(v, Vec); }

#if defined(__AVX512F__)
typedef __m512i Native;
#elif defined(__AVX2__)
typedef __m256i Native;
#elif defined(__x86_64__)
typedef __m128i Native;
#endif

#if defined(__AVX2__)
#if defined(__AVX512F__)
#define LMINF_AND(a, b) _mm512_and_si512(a, b)
#else
#define LMINF_AND(a, b) _mm256_and_si256(a, b)
#endif

inline Native native(Bytes v) { return reinterpret_cast<Native>(v); }
inline Native low(Native v) { return LMINF_AND(v, LMINF_SIMD(set1_epi8)(15)); }
inline Native high(Native v) {
  return LMINF_AND(LMINF_SIMD(srli_epi16)(v, 4), LMINF_SIMD(set1_epi8)(15));
}
inline Native nativeAt(const int8_t* p) { return native(loadBytes(p)); }
#endif

// Every lane of `sums` grows by the products of its bytes of a chunk with a token's integers.
template <int kBits>
inline IntVec dotChunk(IntVec sums, Bytes chunk, const int8_t* x) {
#if defined(__AVX512VNNI__)
  const Native w = native(chunk);
  Native sum = reinterpret_cast<Native>(sums);
  if constexpr (kBits == 4) {
    sum = _mm512_dpbusd_epi32(sum, low(w), nativeAt(x));
    return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(sum, high(w), nativeAt(x + kChunk)));
  } else {
    return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(sum, w, nativeAt(x)));
  }
#elif defined(__AVX2__)
  const Native w = native(chunk);
  if constexpr (kBits == 4) {  // 4 · 15 · 127 fits 16 bits
    const Native pairs =
        LMINF_SIMD(add_epi16)(LMINF_SIMD(maddubs_epi16)(low(w), nativeAt(x)),
                              LMINF_SIMD(maddubs_epi16)(high(w), nativeAt(x + kChunk)));
    return sums +
           reinterpret_cast<IntVec>(LMINF_SIMD(madd_epi16)(pairs, LMINF_SIMD(set1_epi16)(1)));
  } else {  // 2 · 255 · 127 does not: bytes become 16 bits, the even ones and the odd ones
    const Native v = nativeAt(x);
    const Native even =
        LMINF_SIMD(madd_epi16)(LMINF_AND(w, LMINF_SIMD(set1_epi16)(255)),
                               LMINF_SIMD(srai_epi16)(LMINF_SIMD(slli_epi16)(v, 8), 8));
    const Native odd =
        LMINF_SIMD(madd_epi16)(LMINF_SIMD(srli_epi16)(w, 8), LMINF_SIMD(srai_epi16)(v, 8));
    return sums + reinterpret_cast<IntVec>(even) + reinterpret_cast<IntVec>(odd);
  }
#else
  uint8_t w[kChunk];
  std::memcpy(w, &chunk, sizeof w);
  for (int lane = 0; lane < kWidth; ++lane) {
    int32_t sum = 0;
    for (int i = 4 * lane; i < 4 * lane + 4; ++i) {
      sum += kBits == 8 ? w[i] * x[i] : (w[i] & 15) * x[i] + (w[i] >> 4) * x[kChunk + i];
    }
    sums[lane] += sum;
  }
  return sums;
#endif
}

// starts · zeros, where both fit 16 bits.
inline IntVec scaleStarts(IntVec starts, IntVec zeros) {
#if defined(LMINF_SIMD)
  return reinterpret_cast<IntVec>(
      LMINF_SIMD(madd_epi16)(reinterpret_cast<Native>(starts), reinterpret_cast<Native>(zeros)));
#else
  return starts * zeros;
#endif
}

// Lane i = lanes 2i and 2i + 1 of a followed by b.
inline IntVec addPairs(IntVec a, IntVec b) {
#if defined(__AVX512F__)
  IntVec even;
  for (int i = 0; i < kWidth; ++i) even[i] = 2 * i;
  const Native x = reinterpret_cast<Native>(a), y = reinterpret_cast<Native>(b);
  return reinterpret_cast<IntVec>(_mm512_permutex2var_epi32(x, reinterpret_cast<Native>(even), y)) +
         reinterpret_cast<IntVec>(
             _mm512_permutex2var_epi32(x, reinterpret_cast<Native>(even + 1), y));
#elif defined(__AVX2__)
  const Native halves = _mm256_hadd_epi32(reinterpret_cast<Native>(a), reinterpret_cast<Native>(b));
  return reinterpret_cast<IntVec>(_mm256_permute4x64_epi64(halves, 0xD8));
#else
  return IntVec{a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]};
#endif
}

// The first bytes of a chunk, zeros behind them; what lies behind is not read.
inline Bytes loadSomeBytes(const void* p, int64_t count) {
#if defined(__AVX512F__)
  const uint64_t all = ~uint64_t{0};
  return reinterpret_cast<Bytes>(_mm512_maskz_loadu_epi8(all >> (kChunk - count), p));
#else
  uint8_t some[kChunk] = {};
  std::memcpy(some, p, count);
  return loadBytes(some);
#endif
}

// The zero points of kWidth blocks; the first of them begins a byte.
template <int kBits>
inline IntVec zerosAt(const uint8_t* zeros) {
  if constexpr (kBits == 8) {
    typedef uint8_t Narrow __attribute__((vector_size(kWidth)));
    Narrow narrow;
    std::memcpy(&narrow, zeros, sizeof narrow);
    return __builtin_convertvector(narrow, IntVec);
  }
  // A word holds eight.
  uint32_t words[2] = {};
  std::memcpy(words, zeros, kWidth / 2);
  WordVec lanes, half;
  for (int i = 0; i < kWidth; ++i) lanes[i] = i % 8 * 4, half[i] = i / 8;
  const WordVec all = half == 0 ? words[0] - WordVec{} : words[1] - WordVec{};
  return reinterpret_cast<IntVec>(all >> lanes & (15 - WordVec{}));
}

// The same of fewer blocks, whose zero points take `count` bytes; 0 for the others.
template <int kBits>
inline IntVec lastZeros(const uint8_t* zeros, int64_t count) {
  uint8_t some[16] = {};
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1 << count) - 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(some), _mm_maskz_loadu_epi8(mask, zeros));
#else
  std::memcpy(some, zeros, count);
#endif
  return zerosAt<kBits>(some);
}

}  // namespace
