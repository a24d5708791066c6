// Products of many tokens rounded to int8, for processors that multiply and sum bytes at once
// (AVX-512 VNNI). A strip of rows is turned once, so that lanes are rows, and meets all tokens.
#pragma once

#include "int8_linear_block.h"
#include "token_groups.h"

namespace {

// Sums kept in registers: tokens × vectors of rows.
constexpr int kMostTokens = 8, kColumns = 2;
constexpr int64_t kStripRows = kColumns * kWidth;
// From here on turning a strip pays.
constexpr int64_t kLeastTokens = 9;
constexpr int64_t kScalesTogether = 4;  // blocks whose scales are turned together

inline int64_t roundUp(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// A strip whose lanes are rows; then sums.
struct Strip {
  uint8_t* words;  // (words of 4 bytes of a row, row)
  float* scales;   // (block, row)
  uint8_t* zeros;  // (words of 4 bytes of a row's zero points, row)
  float* sums;     // (token, vector of rows, lane of a block, row)
};

inline size_t layOut(const Blocks& b, float* memory, Strip* strip) {
  size_t used = 0;
  const auto take = [&](int64_t floats) {
    float* start = memory == nullptr ? nullptr : memory + used;
    used += floats;
    return start;
  };
  Strip local{};
  Strip& out = strip == nullptr ? local : *strip;
  out.words = reinterpret_cast<uint8_t*>(take(b.rowBytes() / 4 * kStripRows));
  out.scales = take(roundUp(b.perRow, kScalesTogether) * kStripRows);
  const int64_t zeros = b.zeroPoints == nullptr ? 0 : (b.zeroBytes() + 3) / 4;
  out.zeros = reinterpret_cast<uint8_t*>(take(zeros * kStripRows));
  out.sums = take(kMostTokens * kColumns * kWidth * kWidth);
  return used;
}

size_t stripFloats(const Linear& p) { return layOut(*p.blocks, nullptr, nullptr); }

int64_t stripRows(const Linear&) { return kStripRows; }

inline __m128i load128(const void* p, int64_t bytes) {
  if (bytes >= 16) return _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm_maskz_loadu_epi8(static_cast<__mmask16>((1 << bytes) - 1), p);
}

inline __m512i fourOf(const __m128i* rows) {  // rows 0, 4, 8, 12
  __m512i v = _mm512_castsi128_si512(rows[0]);
  v = _mm512_inserti32x4(v, rows[4], 1);
  v = _mm512_inserti32x4(v, rows[8], 2);
  return _mm512_inserti32x4(v, rows[12], 3);
}

// Lane r of out[j] = the j-th 4 bytes of row r.
inline void transpose(const __m128i* rows, __m512i* out) {
  const __m512i a = fourOf(rows), b = fourOf(rows + 1), c = fourOf(rows + 2), d = fourOf(rows + 3);
  const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d);
  const __m512i ef = _mm512_unpackhi_epi32(a, b), gh = _mm512_unpackhi_epi32(c, d);
  out[0] = _mm512_unpacklo_epi64(ab, cd), out[1] = _mm512_unpackhi_epi64(ab, cd);
  out[2] = _mm512_unpacklo_epi64(ef, gh), out[3] = _mm512_unpackhi_epi64(ef, gh);
}

// The bytes of kWidth rows.
inline void turnWords(const Blocks& b, const Row* rows, int64_t column, uint8_t* out) {
  const int64_t bytes = b.rowBytes(), vector = 4 * kStripRows;
  out += column * kChunk;
  int64_t first = 0;
  const auto turn = [&](int64_t some, int64_t count) {
    __m128i piece[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      piece[r] = load128(rows[r].packed + first, some);
    }
    __m512i words[4];
    transpose(piece, words);
    for (int64_t j = 0; j < count; ++j, out += vector) _mm512_store_si512(out, words[j]);
  };
  for (; first + 16 <= bytes; first += 16) turn(16, 4);
  if (first < bytes) turn(bytes - first, (bytes - first) / 4);
}

inline void turnScales(const Blocks& b, const Row* rows, int64_t column, float* out) {
  out += column * kWidth;
  for (int64_t block = 0; block < b.perRow; block += kScalesTogether, out += 4 * kStripRows) {
    const int64_t count = std::min(kScalesTogether, b.perRow - block);
    __m128i some[kWidth];
    for (int r = 0; r < kWidth; ++r) {
      if (b.scaleType == DataType::kFloat32) {
        some[r] = load128(rows[r].scales + 4 * block, 4 * count);
      } else {
        some[r] = _mm_castps_si128(_mm_cvtph_ps(load128(rows[r].scales + 2 * block, 2 * count)));
      }
    }
    __m512i scales[4];
    transpose(some, scales);
    for (int j = 0; j < 4; ++j) _mm512_store_si512(out + j * kStripRows, scales[j]);
  }
}

inline void turnZeros(const Blocks& b, const Row* rows, int64_t column, uint8_t* out) {
  const int64_t bytes = b.zeroBytes(), vector = 4 * kStripRows;
  out += column * kChunk;
  for (int64_t first = 0; first < bytes; first += 16) {
    const int64_t some = std::min<int64_t>(16, bytes - first);
    __m128i piece[kWidth];
    for (int r = 0; r < kWidth; ++r) piece[r] = load128(rows[r].zeros + first, some);
    __m512i words[4];
    transpose(piece, words);
    for (int64_t j = 0; 4 * j < some; ++j, out += vector) _mm512_store_si512(out, words[j]);
  }
}

// Rows behind the last one repeat it.
__attribute__((noinline)) void turnStrip(const Rows& all, int64_t firstRow, int64_t endRow,
                                         const Strip& strip) {
  for (int64_t column = 0; column < kColumns; ++column) {
    Row rows[kWidth];
    for (int64_t r = 0; r < kWidth; ++r) {
      rows[r] = all.at(std::min(firstRow + column * kWidth + r, endRow - 1));
    }
    turnWords(all.b, rows, column, strip.words);
    turnScales(all.b, rows, column, strip.scales);
    if (all.b.zeroPoints != nullptr) turnZeros(all.b, rows, column, strip.zeros);
  }
}

// The zero points of a block, by row.
template <int kBits>
inline __m512i zerosOf(const Strip& strip, int64_t block, int column) {
  constexpr int64_t kWord = 32 / kBits;
  const uint8_t* from = strip.zeros + block / kWord * (4 * kStripRows) + column * kChunk;
  const __m512i words = _mm512_load_si512(from);
  const __m128i shift = _mm_cvtsi64_si128(block % kWord * kBits);
  return _mm512_and_si512(_mm512_srl_epi32(words, shift), _mm512_set1_epi32((1 << kBits) - 1));
}

// Where a token's integers for the first group of a row's word are.
template <int kBits>
inline int64_t valuesAt(int64_t word) {
  return kBits == 8 ? 4 * word : word / kWidth * (2 * kChunk) + word % kWidth * 4;
}

// Asks for what comes behind a strip, as much for each of its blocks.
struct Ahead {
  const char *packed, *scales, *zeros;
  int64_t packedBytes, scaleBytes;

  Ahead(const Rows& rows, int64_t row)
      : packed(reinterpret_cast<const char*>(rows.at(row).packed)), scales(rows.at(row).scales),
        zeros(reinterpret_cast<const char*>(rows.at(row).zeros)),
        packedBytes(kStripRows * rows.b.bytes()),
        scaleBytes(kStripRows * (rows.b.scaleType == DataType::kFloat16 ? 2 : 4)) {}

  void ask(int64_t block) const {
    const char* from = packed + block * packedBytes;
    for (int64_t i = 0; i < packedBytes; i += 64) __builtin_prefetch(from + i, 0, 3);
    from = scales + block * scaleBytes;
    for (int64_t i = 0; i < scaleBytes; i += 64) __builtin_prefetch(from + i, 0, 3);
    if (zeros != nullptr && block % 4 == 0) {
      __builtin_prefetch(zeros + block * (kStripRows / 2), 0, 3);
    }
  }
};

// A strip with kTokens tokens. Block b is summed in lane b mod kWidth, and lanes as `sumsOf` does:
// the order of int8_linear_block.h. Never inlined: the registers are its own.
template <int kBits, bool kZeros, int kTokens>
__attribute__((noinline)) void meetStrip(const Linear& p, int64_t token, const Strip& strip,
                                         const Ahead* ahead) {
  const Blocks& b = *p.blocks;
  const int64_t words = b.bytes() / 4;
  Token tokens[kTokens];
  for (int t = 0; t < kTokens; ++t) tokens[t] = tokenAt(p, token + t);
  const uint8_t* from = strip.words;
  for (int64_t block = 0; block < b.perRow; ++block) {
    if (ahead != nullptr) ahead->ask(block);
    __m512i zeros[kColumns];
    for (int c = 0; kZeros && c < kColumns; ++c) zeros[c] = zerosOf<kBits>(strip, block, c);
    __m512i sum[kTokens][kColumns];
    for (int t = 0; t < kTokens; ++t) {
      const __m512i start = _mm512_set1_epi32(tokens[t].starts[block]);
      for (int c = 0; c < kColumns; ++c) {
        sum[t][c] = kZeros ? _mm512_madd_epi16(start, zeros[c]) : start;
      }
    }
    for (int64_t word = block * words; word < (block + 1) * words; ++word) {
      const int64_t at = valuesAt<kBits>(word);
      __m512i packed[kColumns];
      for (int c = 0; c < kColumns; ++c, from += kChunk) packed[c] = _mm512_load_si512(from);
      for (int part = 0; part < 8 / kBits; ++part) {
        __m512i w[kColumns];
        for (int c = 0; c < kColumns; ++c) {
          w[c] = kBits == 8 ? packed[c] : part == 0 ? low(packed[c]) : high(packed[c]);
        }
        for (int t = 0; t < kTokens; ++t) {
          int32_t four;
          std::memcpy(&four, tokens[t].values + at + part * kChunk, sizeof four);
          const __m512i x = _mm512_set1_epi32(four);
          for (int c = 0; c < kColumns; ++c) sum[t][c] = _mm512_dpbusd_epi32(sum[t][c], w[c], x);
        }
      }
    }
    Vec scales[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      scales[c] = load(strip.scales + block * kStripRows + c * kWidth);
    }
    float* to = strip.sums + block % kWidth * kWidth;
    for (int t = 0; t < kTokens; ++t) {
      const Vec own = splat(tokens[t].scales[block]);
      for (int c = 0; c < kColumns; ++c, to += kWidth * kWidth) {
        const Vec before = block < kWidth ? Vec{} : load(to);
        const Vec found = toFloats(reinterpret_cast<IntVec>(sum[t][c]));
        store(to, multiplyAdd(found, own * scales[c], before));
      }
    }
  }
}

// Adds the lanes of blocks of one token and column as `sumsOf` adds those of a vector.
inline Vec sumLanes(const float* sums) {
  const auto four = [&](int first) {
    const auto at = [&](int i) { return load(sums + (first + i) * kWidth); };
    return (at(0) + at(2)) + (at(1) + at(3));
  };
  static_assert(kWidth == 16, "the order of sumsOf with four pieces");
  return (four(0) + four(8)) + (four(4) + four(12));
}

template <int kBits, bool kZeros, typename T>
void meetTokens(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow,
                int64_t count, const Strip& strip) {
  const Ahead ahead(Rows(*p.blocks), firstRow + kStripRows);
  for (int64_t i = 0; i < int64_t{kMostTokens} * kColumns; ++i) {
    for (int64_t lane = p.blocks->perRow; lane < kWidth; ++lane) {
      store(strip.sums + (i * kWidth + lane) * kWidth, Vec{});
    }
  }
  forTokenGroups<kMostTokens>(firstToken, endToken, [&](auto size, int64_t token) {
    meetStrip<kBits, kZeros, size>(p, token, strip, token == firstToken ? &ahead : nullptr);
    for (int64_t t = 0; t < size; ++t) {
      alignas(64) float found[kStripRows];
      for (int64_t c = 0; c < kColumns; ++c) {
        const int64_t vector = t * kColumns + c;
        store(found + c * kWidth, sumLanes(strip.sums + vector * kWidth * kWidth));
      }
      writeRow<T>(p, token + t, firstRow, count, found);
    }
  });
}

// A strip of rows from firstRow on, with some tokens.
template <int kBits, typename T>
void stripProduct(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow,
                  int64_t endRow, const Strip& strip) {
  turnStrip(Rows(*p.blocks), firstRow, endRow, strip);
  const auto meet =
      p.blocks->zeroPoints == nullptr ? meetTokens<kBits, false, T> : meetTokens<kBits, true, T>;
  meet(p, firstToken, endToken, firstRow, endRow - firstRow, strip);
}

void strips(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow, int64_t endRow,
            float* scratch) {
  Strip strip{};
  layOut(*p.blocks, scratch, &strip);
  const bool half = p.dataType == DataType::kFloat16;
  const auto product = p.blocks->bits == 4
                           ? (half ? stripProduct<4, Half> : stripProduct<4, float>)
                           : (half ? stripProduct<8, Half> : stripProduct<8, float>);
  for (int64_t row = firstRow; row < endRow; row += kStripRows) {
    product(p, firstToken, endToken, row, std::min(row + kStripRows, endRow), strip);
  }
}

void many(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow, float* scratch) {
  strips(p, firstToken, endToken, firstRow, std::min(firstRow + kStripRows, p.outFeatures),
         scratch);
}

void fewOrStrips(const Linear& p, int64_t firstRow, int64_t endRow, float* scratch) {
  p.tokens < kLeastTokens ? few(p, firstRow, endRow, scratch)
                          : strips(p, 0, p.tokens, firstRow, endRow, scratch);
}

int64_t fewRows(const Linear& p) { return p.tokens < kLeastTokens ? fourRows(p) : kStripRows; }

size_t fewOrStripsFloats(const Linear& p) {
  return p.tokens < kLeastTokens ? noFloats(p) : stripFloats(p);
}

}  // namespace
