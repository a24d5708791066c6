// Products of few tokens with activations rounded to int8, compiled once per instruction set.
#pragma once

#include "int8_activations.h"
#include "int8_linear.h"
#include "int8_vectors.h"
#include "linear_output.h"

namespace {

// How far ahead weights and their scales are asked for: over the ends of pages, where hardware
// stops; as data used once, for the reason told in linear_block.h.
constexpr int64_t kAheadBytes = 8192, kScalesAheadBytes = 2048;

// Weight rows one behind the other, or one row for many (strides of 0); scales are floats.
struct Rows {
  const uint8_t* packed;
  const float* scales;
  const uint8_t* zeros;
  int64_t stride, scalesStride, zerosStride;

  Rows at(int64_t r) const {
    return {packed + r * stride,
            scales + r * scalesStride,
            zeros + r * zerosStride,
            stride,
            scalesStride,
            zerosStride};
  }
};

// How often a vector of a token meets one of a row: sums kept in registers. A single token takes
// wide vectors row after row, as memory streams best; narrow ones share its vectors to save work.
template <int kTokens>
constexpr int kRowsAtOnce = kTokens == 1 && kWidth >= 16 ? 1 : 4 / kTokens;

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
      __builtin_prefetch(scales + i + kScalesAheadBytes, 0, 0);
    }
  }
  int64_t block = 0, left = chunksOfBlock;
  const uint8_t* packed = rows.packed;
  for (int64_t chunk = 0; chunk < whole; ++chunk, packed += kChunk) {
    for (int r = 0; r < kRows; ++r) {
      __builtin_prefetch(packed + r * rows.stride + kAheadBytes, 0, 0);
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
  if (b.scaleType == DataType::kFloat16) {
    const Half* halves = static_cast<const Half*>(b.scales) + row * b.perRow;
    const int64_t all = count * b.perRow;
    for (int64_t byte = 0; byte < all * 2; byte += 64) {
      const char* ahead = reinterpret_cast<const char*>(halves) + byte + kScalesAheadBytes;
      __builtin_prefetch(ahead, 0, 0);
    }
    int64_t i = 0;
    for (; i + kWidth <= all; i += kWidth) store(scratch + i, load(halves + i));
    for (; i < all; ++i) scratch[i] = toFloat(halves[i]);
    scales = scratch;
  }
  const int64_t one = count > 1 ? 1 : 0;
  const int64_t zeros = b.zeroPoints == nullptr ? 0 : b.zeroBytes();
  return {b.packed + row * b.rowBytes(),
          scales,
          b.zeroPoints + row * zeros,
          one * b.rowBytes(),
          one * b.perRow,
          one * zeros};
}

// Four rows with kTokens tokens, of which `count` are written.
template <int kBits, int kPerChunk, bool kZeros, int kTokens>
__attribute__((noinline)) void meetRows(const Linear& p, int64_t token, const Rows& rows,
                                        int64_t firstRow, int64_t count) {
  constexpr int kRows = kRowsAtOnce<kTokens>;
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
  const auto stream = p.blocks->bits == 4
                          ? (zeros ? streamBlocks<4, true> : streamBlocks<4, false>)
                          : (zeros ? streamBlocks<8, true> : streamBlocks<8, false>);
  stream(p, firstRow, endRow, scratch);
}

size_t fewFloats(const Linear& p) {
  return p.blocks->scaleType == DataType::kFloat32 ? 0 : static_cast<size_t>(4 * p.blocks->perRow);
}

}  // namespace
