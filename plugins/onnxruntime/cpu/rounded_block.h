// The arithmetic of products with activations rounded to int8, compiled once per instruction set.
//
// A chunk is as many bytes of a weight row as a vector has. Every lane of 4 bytes belongs to one
// block, which has at least two lanes. A rounded token holds, for every lane of a row, the scale
// of its block (float) and where its sums begin (int32); then the integers, ordered as the row's:
// of 4 bits, those of the low halves of a chunk before those of the high ones.
#pragma once

#include <algorithm>

#include "linear_output.h"
#include "rounded.h"
#include "simd.h"

namespace {

using lminf::cpu::Blocks;

typedef uint8_t Bytes __attribute__((vector_size(4 * kWidth)));
typedef uint32_t WordVec __attribute__((vector_size(4 * kWidth)));

constexpr int64_t kChunk = 4 * kWidth;  // bytes
constexpr int64_t kMostBlock = 256;
// How far ahead weights and their scales are asked for: over the ends of pages, where hardware
// stops.
constexpr int64_t kAheadBytes = 8192, kScalesAheadBytes = 2048;

// --- the activations ----------------------------------------------------------------------------

inline int64_t chunksOf(const Blocks& b) { return (b.rowBytes() + kChunk - 1) / kChunk; }

// One rounded token.
struct Token {
  const float* scales;
  const int32_t* starts;
  const int8_t* values;
};

inline size_t tokenBytes(const Blocks& b) {
  const int64_t bytes = chunksOf(b) * kChunk * (2 + 8 / b.bits);
  return static_cast<size_t>((bytes + 63) / 64 * 64);
}

inline Token tokenAt(const Linear& p, int64_t token) {
  const int64_t lanes = chunksOf(*p.blocks) * kWidth;
  const uint8_t* start = p.rounded + token * tokenBytes(*p.blocks);
  return {reinterpret_cast<const float*>(start),
          reinterpret_cast<const int32_t*>(start) + lanes,
          reinterpret_cast<const int8_t*>(start) + 8 * lanes};
}

inline float largestOf(const float* x, int64_t count) {
  Vec most{};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Vec v = load(x + i);
    most = maximum(most, v < 0.0f ? -v : v);
  }
  float largest = maximumOf(most);
  for (; i < count; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

// Each lane's nearest integer, ties to even.
inline IntVec nearest(Vec v) {
#if defined(LMINF_SIMD)
  return reinterpret_cast<IntVec>(LMINF_SIMD(cvtps_epi32)(v));
#else
  IntVec out;
  for (int i = 0; i < kWidth; ++i) out[i] = static_cast<int32_t>(std::lrint(v[i]));
  return out;
#endif
}

// Rounds one block (count ≤ size elements) to the nearest integers; returns the scale. The product
// is rounded before it is made an integer: ties, of which embeddings of few bits have many, then
// fall as in onnxruntime.
inline float roundBlock(const float* x, int64_t count, int8_t* out) {
  const float largest = largestOf(x, count);
  // Of numbers this small the reciprocal would be infinite.
  const float divisor = largest < 0x1p-100f ? 0.0f : 127.0f / largest;
  typedef int8_t Narrow __attribute__((vector_size(kWidth)));
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Narrow narrow = __builtin_convertvector(nearest(load(x + i) * divisor), Narrow);
    std::memcpy(out + i, &narrow, sizeof narrow);
  }
  for (; i < count; ++i) out[i] = static_cast<int8_t>(nearest(splat(x[i] * divisor))[0]);
  return largest / 127.0f;
}

void roundToken(const Blocks& b, const float* x, int64_t length, uint8_t* out, int8_t* scratch) {
  const int64_t chunks = chunksOf(b), lanes = chunks * kWidth, perChunk = kChunk * 8 / b.bits;
  const int64_t lanesOfBlock = b.bytes() / 4;
  float* scales = reinterpret_cast<float*>(out);
  int32_t* starts = reinterpret_cast<int32_t*>(out) + lanes;
  int8_t* values = reinterpret_cast<int8_t*>(out) + 8 * lanes;
  std::memset(out, 0, 8 * lanes);
  int8_t* plain = b.bits == 4 ? scratch : values;
  std::fill(plain + length, plain + chunks * perChunk, int8_t{0});
  // The integers of symmetric weights stand for themselves less 2^(bits − 1).
  const int32_t zero = b.zeroPoints != nullptr ? 1 : b.bits == 4 ? 8 : 128;
  for (int64_t block = 0; block < b.perRow; ++block) {
    const int64_t first = block * b.size, count = std::min(b.size, length - first);
    const float scale = roundBlock(x + first, count, plain + first);
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += plain[first + i];
    starts[block * lanesOfBlock] = -zero * sum;
    for (int64_t lane = 0; lane < lanesOfBlock; ++lane) scales[block * lanesOfBlock + lane] = scale;
  }
  if (b.bits == 8) return;
  for (int64_t chunk = 0; chunk < chunks; ++chunk, plain += perChunk, values += perChunk) {
    for (int64_t i = 0; i < kChunk; ++i) values[i] = plain[2 * i];
    for (int64_t i = 0; i < kChunk; ++i) values[kChunk + i] = plain[2 * i + 1];
  }
}

void roundFloats(const Blocks& b, const float* x, int64_t length, float* out) {
  int8_t rounded[kMostBlock];
  for (int64_t first = 0; first < length; first += b.size) {
    const int64_t count = std::min(b.size, length - first);
    const float scale = roundBlock(x + first, count, rounded);
    for (int64_t i = 0; i < count; ++i) out[first + i] = static_cast<float>(rounded[i]) * scale;
  }
}

// --- vectors of integers ------------------------------------------------------------------------

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
    const Native pairs = LMINF_SIMD(add_epi16)(
        LMINF_SIMD(maddubs_epi16)(low(w), nativeAt(x)),
        LMINF_SIMD(maddubs_epi16)(high(w), nativeAt(x + kChunk)));
    return sums + reinterpret_cast<IntVec>(
                      LMINF_SIMD(madd_epi16)(pairs, LMINF_SIMD(set1_epi16)(1)));
  } else {  // 2 · 255 · 127 does not: bytes become 16 bits, the even ones and the odd ones
    const Native v = nativeAt(x);
    const Native even = LMINF_SIMD(madd_epi16)(
        LMINF_AND(w, LMINF_SIMD(set1_epi16)(255)),
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
    some = _mm512_castps128_ps512(
        _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(scales))));
  }
  const __m512i index = reinterpret_cast<__m512i>(laneBlocks(kPerChunk));
  return reinterpret_cast<Vec>(_mm512_permutexvar_ps(index, some));
#elif defined(__AVX2__)
  __m256 some;
  if constexpr (kPerChunk == 4) {
    some = _mm256_castps128_ps256(_mm_loadu_ps(scales));
  } else {
    some = _mm256_castps128_ps256(
        _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(scales))));
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

// --- few tokens ---------------------------------------------------------------------------------

// Weight rows one behind the other, or one row for many (strides of 0); scales are floats.
struct Rows {
  const uint8_t* packed;
  const float* scales;
  const uint8_t* zeros;
  int64_t stride, scalesStride, zerosStride;

  Rows at(int64_t r) const {
    return {packed + r * stride, scales + r * scalesStride, zeros + r * zerosStride,
            stride, scalesStride, zerosStride};
  }
};

// How often a vector of a token meets one of a row: sums kept in registers.
constexpr int kMeetings = 4;

template <int kBits, bool kZeros, int kTokens>
inline void meetChunk(Bytes packed, Vec scales, IntVec zeros, int64_t chunk, const Token* tokens,
                      Vec* sums) {
  for (int t = 0; t < kTokens; ++t) {
    IntVec start;
    std::memcpy(&start, tokens[t].starts + chunk * kWidth, sizeof start);
    if constexpr (kZeros) start = scaleStarts(start, zeros);
    const IntVec sum =
        dotChunk<kBits>(start, packed, tokens[t].values + chunk * (kChunk * 8 / kBits));
    sums[t] += toFloats(sum) * (load(tokens[t].scales + chunk * kWidth) * scales);
  }
}

// What is left of a row behind its whole chunks: fewer than kPerChunk blocks, read from copies.
template <int kBits, int kPerChunk, bool kZeros, int kTokens>
inline void meetRest(const Blocks& b, const Rows& row, int64_t chunk, int64_t block,
                     const Token* tokens, Vec* sums) {
  uint8_t packed[kChunk] = {}, lastZeros[4] = {};
  float scales[kWidth] = {};
  std::memcpy(packed, row.packed + chunk * kChunk, b.rowBytes() - chunk * kChunk);
  std::memcpy(scales, row.scales + block, (b.perRow - block) * sizeof(float));
  IntVec zeros{};
  if constexpr (kZeros) {
    const int64_t first = block * kBits / 8;
    std::memcpy(lastZeros, row.zeros + first, b.zeroBytes() - first);
    zeros = spreadZeros<kBits, kPerChunk>(lastZeros, block % (8 / kBits));
  }
  meetChunk<kBits, kZeros, kTokens>(loadBytes(packed), spreadScales<kPerChunk>(scales), zeros,
                                    chunk, tokens, sums);
}

// kRows rows at once with kTokens tokens, whose vectors they share; lanes are not summed yet.
// kPerChunk: blocks of a chunk, of which larger blocks have several.
template <int kBits, int kPerChunk, bool kZeros, int kTokens, int kRows>
inline void meetSome(const Blocks& b, const Rows& rows, const Token* tokens, Vec* found) {
  const int64_t bytes = b.rowBytes(), whole = bytes / kChunk;
  const int64_t chunksOfBlock = std::max<int64_t>(b.bytes() / kChunk, 1);
  Vec sums[kRows][kTokens] = {};
  for (int r = 0; r < kRows; ++r) {
    const char* scales = reinterpret_cast<const char*>(rows.at(r).scales);
    for (int64_t i = 0; i < b.perRow * 4; i += 64) {
      __builtin_prefetch(scales + i + kScalesAheadBytes, 0, 2);
    }
  }
  int64_t block = 0, left = chunksOfBlock;
  const uint8_t* packed = rows.packed;
  for (int64_t chunk = 0; chunk < whole; ++chunk, packed += kChunk) {
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(packed + r * rows.stride + kAheadBytes, 0, 2);
      IntVec zeros{};
      if constexpr (kZeros) {
        zeros = spreadZeros<kBits, kPerChunk>(rows.zeros + r * rows.zerosStride, block);
      }
      const Vec scales = spreadScales<kPerChunk>(rows.scales + r * rows.scalesStride + block);
      meetChunk<kBits, kZeros, kTokens>(loadBytes(packed + r * rows.stride), scales, zeros, chunk,
                                        tokens, sums[r]);
    }
    if (kPerChunk > 1) {
      block += kPerChunk;
    } else if (--left == 0) {
      ++block, left = chunksOfBlock;
    }
  }
  if (whole * kChunk < bytes) {
    for (int r = 0; r < kRows; ++r) {
      meetRest<kBits, kPerChunk, kZeros, kTokens>(b, rows.at(r), whole, block, tokens, sums[r]);
    }
  }
  std::memcpy(found, sums, sizeof sums);
}

// `count` rows from `row` on, and scratch memory for their scales.
Rows rowsAt(const Linear& p, int64_t row, int64_t count, float* scratch) {
  const Blocks& b = *p.blocks;
  const float* scales = static_cast<const float*>(b.scales) + row * b.perRow;
  if (p.dataType == DataType::kFloat16) {
    const Half* halves = static_cast<const Half*>(b.scales) + row * b.perRow;
    for (int64_t i = 0; i < count * b.perRow; ++i) scratch[i] = toFloat(halves[i]);
    scales = scratch;
  }
  const int64_t one = count > 1 ? 1 : 0;
  const int64_t zeros = b.zeroPoints == nullptr ? 0 : b.zeroBytes();
  return {b.packed + row * b.rowBytes(), scales, b.zeroPoints + row * zeros,
          one * b.rowBytes(), one * b.perRow, one * zeros};
}

// Four rows with kTokens tokens, of which `count` are written.
template <int kBits, int kPerChunk, bool kZeros, int kTokens>
__attribute__((noinline)) void meetRows(const Linear& p, int64_t token, const Rows& rows,
                                        int64_t firstRow, int64_t count) {
  constexpr int kRows = kMeetings / kTokens;
  Token tokens[kTokens];
  for (int t = 0; t < kTokens; ++t) tokens[t] = tokenAt(p, token + t);
  Vec sums[4][kTokens];
  for (int r = 0; r < 4; r += kRows) {
    meetSome<kBits, kPerChunk, kZeros, kTokens, kRows>(*p.blocks, rows.at(r), tokens, sums[r]);
  }
  for (int t = 0; t < kTokens; ++t) {
    const Vec4 four = sumsOf(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
    float found[4];
    std::memcpy(found, &four, sizeof found);
    p.dataType == DataType::kFloat32 ? writeRow<float>(p, token + t, firstRow, count, found)
                                 : writeRow<Half>(p, token + t, firstRow, count, found);
  }
}

// Four rows meet all tokens before the next four are streamed; those left at the end come singly.
template <int kBits, int kPerChunk, bool kZeros>
void streamRows(const Linear& p, int64_t firstRow, int64_t endRow, float* scratch) {
  for (int64_t row = firstRow, count; row < endRow; row += count) {
    count = endRow - row < 4 ? 1 : 4;
    const Rows rows = rowsAt(p, row, count, scratch);
    int64_t token = 0;
    const auto next = [&](auto size, auto function) {
      for (; token + size <= p.tokens; token += size) function(p, token, rows, row, count);
    };
    next(4, meetRows<kBits, kPerChunk, kZeros, 4>);
    next(2, meetRows<kBits, kPerChunk, kZeros, 2>);
    next(1, meetRows<kBits, kPerChunk, kZeros, 1>);
  }
}

template <int kBits, bool kZeros>
void streamBlocks(const Linear& p, int64_t firstRow, int64_t endRow, float* scratch) {
  const int64_t perChunk = kChunk / p.blocks->bytes();
  if constexpr (kWidth >= 16 && kBits == 4) {
    if (perChunk == 8) return streamRows<kBits, 8, kZeros>(p, firstRow, endRow, scratch);
  }
  if constexpr (kWidth >= 16 || (kWidth == 8 && kBits == 4)) {
    if (perChunk == 4) return streamRows<kBits, 4, kZeros>(p, firstRow, endRow, scratch);
  }
  if (perChunk == 2) return streamRows<kBits, 2, kZeros>(p, firstRow, endRow, scratch);
  streamRows<kBits, 1, kZeros>(p, firstRow, endRow, scratch);
}

void few(const Linear& p, int64_t firstRow, int64_t endRow, float* scratch) {
  const bool zeros = p.blocks->zeroPoints != nullptr;
  const auto stream = p.blocks->bits == 4 ? (zeros ? streamBlocks<4, true> : streamBlocks<4, false>)
                                          : (zeros ? streamBlocks<8, true> : streamBlocks<8, false>);
  stream(p, firstRow, endRow, scratch);
}

size_t fewFloats(const Linear& p) {
  return p.dataType == DataType::kFloat32 ? 0 : static_cast<size_t>(4 * p.blocks->perRow);
}

}  // namespace
