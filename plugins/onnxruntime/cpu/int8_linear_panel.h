// Products of many tokens rounded to int8, for processors that multiply and sum bytes at once
// (AVX-512 VNNI).
#pragma once

#include "dequantize.h"
#include "int8_linear_block.h"

namespace {

constexpr int kBlockTokens = 6, kColumns = 4;  // sums kept in registers: tokens × vectors of rows
constexpr int64_t kPanelRows = kColumns * kWidth;
constexpr int64_t kDepth = 256;  // a panel's columns at a time
constexpr int64_t kMostBlocks = kDepth / 16;
// Groups of 4 columns, kPanelRows bytes · 4 each; scales and zero points of the blocks, by row.
constexpr int64_t kPanelBytes = kDepth * kPanelRows;

struct Panel {
  uint8_t* groups;
  float* scales;
  int32_t* zeros;
};

inline Panel panelIn(float* scratch) {
  float* scales = scratch + kPanelBytes / 4;
  return {reinterpret_cast<uint8_t*>(scratch), scales,
          reinterpret_cast<int32_t*>(scales + kMostBlocks * kPanelRows)};
}

constexpr int64_t kPanelFloats = kPanelBytes / 4 + 2 * kMostBlocks * kPanelRows;

inline __m128i load128(const uint8_t* p, int64_t bytes) {
  if (bytes >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  uint8_t some[16] = {};
  std::memcpy(some, p, bytes);
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(some));
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

// Packs blocks firstBlock … firstBlock + count − 1 of up to kPanelRows rows. Rows behind the last
// repeat it: their results are not read.
template <int kBits>
void packPanel(const Blocks& b, int64_t firstRow, int64_t endRow, int64_t firstBlock, int64_t count,
               const Panel& panel) {
  const int64_t bytes = count * b.bytes(), lanes = kChunk / 4;
  for (int64_t column = 0; column < kColumns; ++column) {
    const uint8_t* starts[kWidth];
    for (int64_t r = 0; r < kWidth; ++r) {
      const int64_t row = std::min(firstRow + column * kWidth + r, endRow - 1);
      starts[r] = b.packed + row * b.rowBytes() + firstBlock * b.bytes();
      for (int64_t block = 0; block < count; ++block) {
        panel.scales[block * kPanelRows + column * kWidth + r] =
            scaleAt(b, row, firstBlock + block);
      }
      if (b.zeroPoints == nullptr) continue;
      const uint8_t* zeros = b.zeroPoints + row * b.zeroBytes();
      for (int64_t block = firstBlock; block < firstBlock + count; ++block) {
        panel.zeros[(block - firstBlock) * kPanelRows + column * kWidth + r] =
            kBits == 8 ? zeros[block] : zeros[block / 2] >> 4 * (block % 2) & 15;
      }
    }
    for (int64_t first = 0; first < bytes; first += 16) {
      __m128i rows[kWidth];
      for (int64_t r = 0; r < kWidth; ++r) rows[r] = load128(starts[r] + first, bytes - first);
      __m512i words[4];
      transpose(rows, words);
      for (int64_t j = 0; j < 4 && first / 4 + j < bytes / 4; ++j) {
        const int64_t word = first / 4 + j;
        uint8_t* group = panel.groups + (word * (8 / kBits) * kColumns + column) * 4 * lanes;
        if constexpr (kBits == 8) {
          _mm512_store_si512(group, words[j]);
        } else {
          _mm512_store_si512(group, low(words[j]));
          _mm512_store_si512(group + kPanelRows * 4, high(words[j]));
        }
      }
    }
  }
}

// Where a token's integers for the first group of a row's word are.
template <int kBits>
inline int64_t valuesAt(int64_t word) {
  return kBits == 8 ? 4 * word : word / kWidth * (2 * kChunk) + word % kWidth * 4;
}

// sums[t][row] grows by the products of kTokens tokens with `count` blocks of the panel; firstWord
// is the first of a row's words of 4 bytes. Never inlined: the registers are its own.
template <int kBits, bool kZeros, int kTokens>
__attribute__((noinline)) void tile(const Linear& p, int64_t token, int64_t firstWord,
                                    const Panel& panel, int64_t count, float* sums) {
  const int64_t words = p.blocks->bytes() / 4;
  Token tokens[kTokens];
  for (int t = 0; t < kTokens; ++t) tokens[t] = tokenAt(p, token + t);
  const uint8_t* group = panel.groups;
  for (int64_t block = 0; block < count; ++block) {
    const int64_t first = firstWord + block * words;
    __m512i sum[kTokens][kColumns];
    for (int t = 0; t < kTokens; ++t) {
      const __m512i start = _mm512_set1_epi32(tokens[t].starts[first]);
      for (int c = 0; c < kColumns; ++c) {
        sum[t][c] = start;
        if constexpr (kZeros) {
          const int32_t* zeros = panel.zeros + block * kPanelRows + c * kWidth;
          sum[t][c] = _mm512_madd_epi16(start, _mm512_load_si512(zeros));
        }
      }
    }
    for (int64_t word = first; word < first + words; ++word) {
      const int64_t at = valuesAt<kBits>(word);
      for (int part = 0; part < 8 / kBits; ++part, group += kPanelRows * 4) {
        __m512i w[kColumns];
        for (int c = 0; c < kColumns; ++c) w[c] = _mm512_load_si512(group + c * kChunk);
        for (int t = 0; t < kTokens; ++t) {
          int32_t four;
          std::memcpy(&four, tokens[t].values + at + part * kChunk, sizeof four);
          const __m512i x = _mm512_set1_epi32(four);
          for (int c = 0; c < kColumns; ++c) sum[t][c] = _mm512_dpbusd_epi32(sum[t][c], w[c], x);
        }
      }
    }
    Vec scales[kColumns];
    for (int c = 0; c < kColumns; ++c)
      scales[c] = load(panel.scales + block * kPanelRows + c * kWidth);
    for (int t = 0; t < kTokens; ++t) {
      const Vec scale = splat(tokens[t].scales[first]);
      for (int c = 0; c < kColumns; ++c) {
        float* to = sums + t * kPanelRows + c * kWidth;
        const Vec found = toFloats(reinterpret_cast<IntVec>(sum[t][c]));
        store(to, load(to) + found * (scale * scales[c]));
      }
    }
  }
}

template <int kBits, bool kZeros>
void multiplyPanel(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstWord,
                   const Panel& panel, int64_t count, float* sums) {
  int64_t token = firstToken;
  const auto next = [&](auto size, auto function) {
    for (; token + size <= endToken; token += size, sums += size * kPanelRows) {
      function(p, token, firstWord, panel, count, sums);
    }
  };
  next(kBlockTokens, tile<kBits, kZeros, kBlockTokens>);
  next(4, tile<kBits, kZeros, 4>);
  next(2, tile<kBits, kZeros, 2>);
  next(1, tile<kBits, kZeros, 1>);
}

template <int kBits, typename T>
void panelProduct(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow,
                  float* scratch) {
  const Blocks& b = *p.blocks;
  const int64_t tokens = endToken - firstToken,
                endRow = std::min(firstRow + kPanelRows, p.outFeatures);
  const Panel panel = panelIn(scratch);
  float* sums = scratch + kPanelFloats;
  std::fill_n(sums, tokens * kPanelRows, 0.0f);
  for (int64_t block = 0; block < b.perRow; block += kDepth / b.size) {
    const int64_t count = std::min(kDepth / b.size, b.perRow - block);
    packPanel<kBits>(b, firstRow, endRow, block, count, panel);
    const auto multiply =
        b.zeroPoints == nullptr ? multiplyPanel<kBits, false> : multiplyPanel<kBits, true>;
    multiply(p, firstToken, endToken, block * b.bytes() / 4, panel, count, sums);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    writeRow<T>(p, firstToken + t, firstRow, endRow - firstRow, sums + t * kPanelRows);
  }
}

void many(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow, float* scratch) {
  const bool half = p.dataType == DataType::kFloat16;
  const auto product = p.blocks->bits == 4
                           ? (half ? panelProduct<4, Half> : panelProduct<4, float>)
                           : (half ? panelProduct<8, Half> : panelProduct<8, float>);
  product(p, firstToken, endToken, firstRow, scratch);
}

int64_t panelRows(const Linear&) { return kPanelRows; }

size_t manyFloats(const Linear& p) {
  const int64_t tokens = std::min<int64_t>(p.tokens, lminf::cpu::kPieceTokens);
  return static_cast<size_t>(kPanelFloats + tokens * kPanelRows);
}

}  // namespace
