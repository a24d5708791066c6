// Vectors of integers: bytes of a weight row, their products with rounded activations, and scales
// and zero points spread over the lanes of their blocks. Compiled once per instruction set.
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

inline IntVec laneBlocks(int perChunk) {
  IntVec v;
  for (int i = 0; i < kWidth; ++i) v[i] = i * perChunk / kWidth;
  return v;
}

// The scales of a chunk's blocks, each in its lanes. They are loaded at once: a vector put
// together in memory would wait for what was stored.
template <int kPerChunk>
inline Vec spreadScales(const float* scales) {
  if constexpr (kPerChunk == 1) return splat(*scales);
#if defined(__AVX512F__)
  __m512 some;
  if constexpr (kPerChunk == 8) {
    some = _mm512_castps256_ps512(_mm256_loadu_ps(scales));
  } else if constexpr (kPerChunk == 4) {
    some = _mm512_castps128_ps512(_mm_loadu_ps(scales));
  } else {
    some =
        _mm512_castps128_ps512(_mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(scales))));
  }
  const __m512i index = reinterpret_cast<__m512i>(laneBlocks(kPerChunk));
  return reinterpret_cast<Vec>(_mm512_permutexvar_ps(index, some));
#elif defined(__AVX2__)
  __m256 some;
  if constexpr (kPerChunk == 4) {
    some = _mm256_castps128_ps256(_mm_loadu_ps(scales));
  } else {
    some =
        _mm256_castps128_ps256(_mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(scales))));
  }
  const __m256i index = reinterpret_cast<__m256i>(laneBlocks(kPerChunk));
  return reinterpret_cast<Vec>(_mm256_permutevar8x32_ps(some, index));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = scales[i * kPerChunk / kWidth];
  return v;
#endif
}

// The zero points of a chunk's blocks, each in its lanes; `block` is the first of them.
template <int kBits, int kPerChunk>
inline IntVec spreadZeros(const uint8_t* zeros, int64_t block) {
  uint32_t bits = 0;
  if constexpr (kPerChunk * kBits < 8) {
    bits = zeros[block / 2] >> 4 * (block % 2);
  } else {
    std::memcpy(&bits, zeros + block * kBits / 8, kPerChunk * kBits / 8);
  }
  const WordVec all = bits - WordVec{};
  const WordVec shifts = reinterpret_cast<WordVec>(laneBlocks(kPerChunk)) * uint32_t{kBits};
  return reinterpret_cast<IntVec>(all >> shifts & ((1u << kBits) - 1 - WordVec{}));
}

}  // namespace
