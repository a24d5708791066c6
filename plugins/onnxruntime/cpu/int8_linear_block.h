// Products of few tokens with activations rounded to int8, compiled once per instruction set.
#pragma once

#include "ask.h"
#include "int8_activations.h"
#include "int8_linear.h"
#include "int8_vectors.h"
#include "linear_output.h"
#include "token_groups.h"

namespace {

// How far ahead weights are asked for; their scales a quarter of that.
template <bool kOnce>
constexpr int64_t kAheadBytes = kOnce ? 8192 : 4096;

constexpr int64_t kFour = 4;      // rows that are summed together
constexpr int kMostTogether = 4;  // tokens that share a row's integers

// One weight row.
struct Row {
  const uint8_t* packed;
  const char* scales;
  const uint8_t* zeros;
};

// A weight's rows, with what every one of them needs and is dear to find.
struct Rows {
  const Blocks& b;
  int64_t bytes, scaleBytes, zeroBytes;

  explicit Rows(const Blocks& blocks)
      : b(blocks), bytes(blocks.rowBytes()),
        scaleBytes(blocks.perRow * (blocks.scaleType == DataType::kFloat16 ? 2 : 4)),
        zeroBytes(blocks.zeroPoints == nullptr ? 0 : blocks.zeroBytes()) {}

  Row at(int64_t row) const {
    return {b.packed + row * bytes, static_cast<const char*>(b.scales) + row * scaleBytes,
            b.zeroPoints + row * zeroBytes};
  }
};

// Tokens one behind the other.
struct Tokens {
  Token first;
  int64_t stride;  // bytes

  template <typename T>
  static const T* shift(const T* p, int64_t bytes) {
    return reinterpret_cast<const T*>(reinterpret_cast<const int8_t*>(p) + bytes);
  }

  Token at(int64_t t) const {
    return {shift(first.scales, t * stride), shift(first.starts, t * stride),
            first.values + t * stride};
  }
};

inline Tokens tokensFrom(const Linear& p, int64_t token) {
  return {tokenAt(p, token), static_cast<int64_t>(tokenBytes(*p.blocks))};
}

// Sums of kWidth blocks of a row, in order, each with kTokens tokens. A block has kLanes lanes, the
// last ones of `perLeaf` chunks; `left` bytes of the row are left, which only a tail looks at.
template <int kBits, int kLanes, bool kTail, int kTokens, bool kOnce>
__attribute__((always_inline)) inline void sumBlocks(const uint8_t* packed, int64_t left,
                                                     int64_t perLeaf, const int8_t* values,
                                                     int64_t stride, IntVec* out) {
  if (kTail && left <= 0) {
    for (int t = 0; t < kTokens; ++t) out[t] = IntVec{};
  } else if constexpr (kLanes == 1) {
    for (int t = 0; t < kTokens; ++t) out[t] = IntVec{};
    for (int64_t c = 0; c < perLeaf; ++c, packed += kChunk, values += kChunk * 8 / kBits) {
      askFor<kOnce>(packed + kAheadBytes<kOnce>);
      Bytes chunk;
      if constexpr (kTail) {
        const int64_t some = left - c * kChunk;
        if (some <= 0) break;
        chunk = some < kChunk ? loadSomeBytes(packed, some) : loadBytes(packed);
      } else {
        chunk = loadBytes(packed);
      }
      for (int t = 0; t < kTokens; ++t) {
        out[t] = dotChunk<kBits>(out[t], chunk, values + t * stride);
      }
    }
  } else {
    const int64_t bytes = kLanes / 2 * perLeaf * kChunk;
    IntVec second[kTokens];
    sumBlocks<kBits, kLanes / 2, kTail, kTokens, kOnce>(packed, left, perLeaf, values, stride, out);
    sumBlocks<kBits, kLanes / 2, kTail, kTokens, kOnce>(packed + bytes, left - bytes, perLeaf,
                                                        values + bytes * 8 / kBits, stride, second);
    for (int t = 0; t < kTokens; ++t) out[t] = addPairs(out[t], second[t]);
  }
}

inline Vec scalesAt(const Blocks& b, const Row& row, int64_t block) {
  if (b.scaleType == DataType::kFloat32)
    return load(reinterpret_cast<const float*>(row.scales) + block);
  return load(reinterpret_cast<const Half*>(row.scales) + block);
}

inline Vec lastScales(const Blocks& b, const Row& row, int64_t block) {
  const int64_t count = b.perRow - block;
  if (b.scaleType == DataType::kFloat32) {
    return loadPart(reinterpret_cast<const float*>(row.scales) + block, count);
  }
  return loadPart(reinterpret_cast<const Half*>(row.scales) + block, count);
}

// kWidth blocks of a row, from `block` on, with kTokens tokens. sums[t]: block b belongs to lane
// b mod kWidth, and a lane's blocks are added in order. That and `sumsOf` is the order of every
// sum, however many tokens are computed together: sums of a block's integers are exact.
template <int kBits, int kLanes, bool kZeros, bool kTail, int kTokens, bool kOnce>
__attribute__((always_inline)) inline void meetBlocks(const Rows& rows, const Row& row,
                                                      int64_t block, int64_t perLeaf,
                                                      const Tokens& tokens, Vec* sums) {
  const Blocks& b = rows.b;
  const int64_t byte = kLanes < kWidth ? block * (4 * kLanes) : block * b.bytes();
  IntVec found[kTokens];
  sumBlocks<kBits, kLanes, kTail, kTokens, kOnce>(row.packed + byte, rows.bytes - byte, perLeaf,
                                                  tokens.first.values + byte * 8 / kBits,
                                                  tokens.stride, found);
  const Vec scales = kTail ? lastScales(b, row, block) : scalesAt(b, row, block);
  IntVec zeros{};
  if constexpr (kZeros) {
    const int64_t at = block * kBits / 8;
    zeros = kTail ? lastZeros<kBits>(row.zeros + at, rows.zeroBytes - at)
                  : zerosAt<kBits>(row.zeros + at);
  }
  for (int t = 0; t < kTokens; ++t) {
    const Token token = tokens.at(t);
    IntVec start;
    std::memcpy(&start, token.starts + block, sizeof start);
    if constexpr (kZeros) start = scaleStarts(start, zeros);
    sums[t] = multiplyAdd(toFloats(found[t] + start), load(token.scales + block) * scales, sums[t]);
  }
}

// One row with kTokens tokens; lanes are not summed yet.
template <int kBits, int kLanes, bool kZeros, int kTokens, bool kOnce>
__attribute__((always_inline)) inline void meetRow(const Rows& rows, const Row& row,
                                                   int64_t perLeaf, const Tokens& tokens,
                                                   Vec* out) {
  for (int64_t i = 0; i < rows.scaleBytes; i += 64) {
    askFor<kOnce>(row.scales + i + kAheadBytes<kOnce> / 4);
  }
  const int64_t blocks = rows.b.perRow;
  Vec sums[kTokens] = {};
  int64_t block = 0;
  for (; block + kWidth <= blocks; block += kWidth) {
    meetBlocks<kBits, kLanes, kZeros, false, kTokens, kOnce>(rows, row, block, perLeaf, tokens,
                                                             sums);
  }
  if (block < blocks) {
    meetBlocks<kBits, kLanes, kZeros, true, kTokens, kOnce>(rows, row, block, perLeaf, tokens,
                                                            sums);
  }
  std::copy_n(sums, kTokens, out);
}

// `count` rows, kFour at most, with kTokens tokens.
template <int kBits, int kLanes, bool kZeros, int kTokens, bool kOnce>
__attribute__((noinline)) void meetRows(const Linear& p, const Rows& given, const Tokens& tokens,
                                        int64_t token, int64_t firstRow, int64_t count) {
  const Rows rows = given;
  const int64_t perLeaf = kLanes < kWidth ? 1 : rows.b.bytes() / kChunk;
  Vec sums[kFour][kTokens] = {};
  for (int64_t r = 0; r < count; ++r) {
    const Row row = rows.at(firstRow + r);
    meetRow<kBits, kLanes, kZeros, kTokens, kOnce>(rows, row, perLeaf, tokens, sums[r]);
  }
  for (int t = 0; t < kTokens; ++t) {
    const Vec4 four = sumsOf(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
    float found[kFour];
    std::memcpy(found, &four, sizeof found);
    p.dataType == DataType::kFloat32 ? writeRow<float>(p, token + t, firstRow, count, found)
                                     : writeRow<Half>(p, token + t, firstRow, count, found);
  }
}

// Four rows meet all tokens before the next four are streamed.
template <int kBits, int kLanes, bool kZeros>
void streamRows(const Linear& p, int64_t firstRow, int64_t endRow) {
  const Rows rows(*p.blocks);
  const Tokens tokens = tokensFrom(p, 0);
  for (int64_t row = firstRow; row < endRow; row += kFour) {
    const int64_t count = std::min(kFour, endRow - row);
    forTokenGroups<kMostTogether>(0, p.tokens, [&](auto size, int64_t token) {
      asking([&](auto once) {
        meetRows<kBits, kLanes, kZeros, size, once>(p, rows, {tokens.at(token), tokens.stride},
                                                    token, row, count);
      });
    });
  }
}

template <int kBits, bool kZeros>
void streamBlocks(const Linear& p, int64_t firstRow, int64_t endRow) {
  const int64_t lanes = p.blocks->bytes() / 4;
  if constexpr (kWidth >= 16) {
    if (lanes == 8) return streamRows<kBits, 8, kZeros>(p, firstRow, endRow);
  }
  if constexpr (kWidth >= 8) {
    if (lanes == 4) return streamRows<kBits, 4, kZeros>(p, firstRow, endRow);
  }
  if constexpr (kBits == 4) {
    if (lanes == 2) return streamRows<kBits, 2, kZeros>(p, firstRow, endRow);
  }
  streamRows<kBits, kWidth, kZeros>(p, firstRow, endRow);
}

void few(const Linear& p, int64_t firstRow, int64_t endRow, float*) {
  const bool zeros = p.blocks->zeroPoints != nullptr;
  const auto stream = p.blocks->bits == 4
                          ? (zeros ? streamBlocks<4, true> : streamBlocks<4, false>)
                          : (zeros ? streamBlocks<8, true> : streamBlocks<8, false>);
  stream(p, firstRow, endRow);
}

int64_t fourRows(const Linear&) { return kFour; }

size_t noFloats(const Linear&) { return 0; }

}  // namespace
