// The arithmetic of products with weights, compiled once per instruction set.
#pragma once

#include <algorithm>

#include "dequantize.h"
#include "linear.h"
#include "linear_output.h"
#include "simd.h"

namespace {

// Sums kept in registers, of few tokens and of many: rows × vectors.
constexpr int kSums = 8;
constexpr int kBlockTokens = 6;
constexpr int kColumns = kWidth == 16 ? 4 : 2;
constexpr int64_t kPanelRows = kWidth == 16 ? 64 : 32;
constexpr int64_t kDepth = 256;  // a panel's columns at a time
// A panel is strips of as many weight rows as a cache line has floats; one line more between them
// keeps them out of each other's way in the cache.
constexpr int64_t kStrip = 16;
constexpr int64_t kStripFloats = (kDepth + 1) * kStrip;
constexpr int64_t kPanelFloats = kPanelRows / kStrip * kStripFloats;
// How far ahead weights are asked for: over the end of a page, where hardware stops. They are used
// once a step and are more than a cache holds, so they shall not push out what onnxruntime has
// there, of which it reads most between two products.
constexpr int64_t kAheadBytes = 4096;

// --- few tokens ---------------------------------------------------------------------------------

// One weight row with kTokens tokens; lanes are not summed yet.
template <int kTokens, typename W>
inline void meetRow(const Linear& p, int64_t token, const W* row, Vec* sums, float* rest) {
  constexpr int kUnroll = kSums / kTokens;
  constexpr int64_t kStep = kUnroll * kWidth;
  const int64_t length = p.inFeatures;
  const float* x = p.x + token * length;
  Vec sum[kTokens][kUnroll] = {};
  int64_t k = 0;
  for (; k + kStep <= length; k += kStep) {
    if constexpr (kTokens == 1 || kStep * sizeof(W) >= 64) {
      for (int64_t byte = 0; byte < static_cast<int64_t>(kStep * sizeof(W)); byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(row + k) + byte + kAheadBytes, 0, 0);
      }
    }
    for (int u = 0; u < kUnroll; ++u) {
      const Vec part = load(row + k + u * kWidth);
      for (int t = 0; t < kTokens; ++t) {
        sum[t][u] += load(x + t * length + k + u * kWidth) * part;
      }
    }
  }
  for (; k + kWidth <= length; k += kWidth) {
    const Vec part = load(row + k);
    for (int t = 0; t < kTokens; ++t) sum[t][0] += load(x + t * length + k) * part;
  }
  for (int t = 0; t < kTokens; ++t) {
    sums[t] = sum[t][0];
    for (int u = 1; u < kUnroll; ++u) sums[t] += sum[t][u];
    rest[t] = 0.0f;
  }
  for (; k < length; ++k) {
    const float weight = toFloat(row[k]);
    for (int t = 0; t < kTokens; ++t) rest[t] += x[t * length + k] * weight;
  }
}

// Weight rows firstRow … endRow − 1, which stand at `rows`, with kTokens tokens.
template <int kTokens, typename W, typename T>
void meetRows(const Linear& p, int64_t token, const W* rows, int64_t stride, int64_t firstRow,
              int64_t endRow) {
  int64_t row = firstRow;
  for (; row + 4 <= endRow; row += 4, rows += 4 * stride) {  // in the order of memory
    Vec sums[4][kTokens];
    float rest[4][kTokens];
    for (int r = 0; r < 4; ++r) meetRow<kTokens>(p, token, rows + r * stride, sums[r], rest[r]);
    for (int t = 0; t < kTokens; ++t) {
      const Vec4 four = sumsOf(sums[0][t], sums[1][t], sums[2][t], sums[3][t]);
      for (int r = 0; r < 4; ++r) write<T>(p, token + t, row + r, four[r] + rest[r][t]);
    }
  }
  for (; row < endRow; ++row, rows += stride) {
    Vec sums[kTokens];
    float rest[kTokens];
    meetRow<kTokens>(p, token, rows, sums, rest);
    for (int t = 0; t < kTokens; ++t) write<T>(p, token + t, row, sumOf(sums[t]) + rest[t]);
  }
}

// The same rows with all tokens.
template <typename W, typename T>
void meetTokens(const Linear& p, const W* rows, int64_t stride, int64_t firstRow, int64_t endRow) {
  int64_t token = 0;
  for (; token + 4 <= p.tokens; token += 4)
    meetRows<4, W, T>(p, token, rows, stride, firstRow, endRow);
  for (; token + 2 <= p.tokens; token += 2)
    meetRows<2, W, T>(p, token, rows, stride, firstRow, endRow);
  for (; token < p.tokens; ++token) meetRows<1, W, T>(p, token, rows, stride, firstRow, endRow);
}

// Four rows meet all tokens before the next four are streamed.
template <typename T>
void streamRows(const Linear& p, int64_t firstRow, int64_t endRow, float* scratch) {
  const int64_t length = p.inFeatures, step = p.tokens == 1 && p.blocks == nullptr ? endRow : 4;
  for (int64_t row = firstRow; row < endRow; row += step) {
    const int64_t end = std::min(row + step, endRow);
    if (p.blocks == nullptr) {
      const T* rows = static_cast<const T*>(p.weight) + row * length;
      meetTokens<T, T>(p, rows, length, row, end);
    } else {
      const int64_t stride = p.blocks->perRow * p.blocks->size;
      dequantizeRows(*p.blocks, row, end - row, 0, p.blocks->perRow, scratch, stride);
      meetTokens<float, T>(p, scratch, stride, row, end);
    }
  }
}

void few(const Linear& p, int64_t firstRow, int64_t endRow, float* scratch) {
  p.dataType == DataType::kFloat32 ? streamRows<float>(p, firstRow, endRow, scratch)
                                   : streamRows<Half>(p, firstRow, endRow, scratch);
}

size_t fewFloats(const Linear& p) {
  return p.blocks == nullptr ? 0 : static_cast<size_t>(4 * p.blocks->perRow * p.blocks->size);
}

// --- many tokens --------------------------------------------------------------------------------

inline Vec4 load4(const float* p) {
  Vec4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec4 load4(const Half* p) {
  return Vec4{toFloat(p[0]), toFloat(p[1]), toFloat(p[2]), toFloat(p[3])};
}

// Where the panel holds row r of its first column; the next column is a strip further.
inline float* columnOf(float* panel, int64_t r) {
  return panel + r / kStrip * kStripFloats + r % kStrip;
}

// The panel's column k of rows r … r + 3 = their element k; memory behind them is asked for.
template <typename W>
void packFour(const W* weight, int64_t stride, int64_t r, int64_t depth, float* panel) {
  const W* rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = weight + i * stride;
  float* out = columnOf(panel, r);
  int64_t k = 0;
  for (; k + 4 <= depth; k += 4) {
    if (k % kStrip == 0) {
      for (int i = 4; i < 8; ++i) __builtin_prefetch(rows[0] + i * stride + k, 0, 2);
    }
    Vec4 a = load4(rows[0] + k), b = load4(rows[1] + k), c = load4(rows[2] + k),
         d = load4(rows[3] + k);
    transpose4(&a, &b, &c, &d);
    std::memcpy(out + (k + 0) * kStrip, &a, sizeof a);
    std::memcpy(out + (k + 1) * kStrip, &b, sizeof b);
    std::memcpy(out + (k + 2) * kStrip, &c, sizeof c);
    std::memcpy(out + (k + 3) * kStrip, &d, sizeof d);
  }
  for (; k < depth; ++k) {
    for (int i = 0; i < 4; ++i) out[k * kStrip + i] = toFloat(rows[i][k]);
  }
}

// The panel's column k of row r = weight[r][k] for count rows; zeros for the rows behind them.
template <typename W>
void pack(const W* weight, int64_t stride, int64_t count, int64_t depth, float* panel) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) packFour(weight + r * stride, stride, r, depth, panel);
  for (; r < kPanelRows; ++r) {
    for (int64_t k = 0; k < depth; ++k) {
      columnOf(panel, r)[k * kStrip] = r < count ? toFloat(weight[r * stride + k]) : 0.0f;
    }
  }
}

// The same of a weight in blocks, from its column `first` on.
inline void packBlocks(const Blocks& b, int64_t firstRow, int64_t count, int64_t first,
                       int64_t depth, float* panel) {
  alignas(64) float rows[4 * kDepth];
  const int64_t block = first / b.size, blocks = (depth + b.size - 1) / b.size;
  for (int64_t r = 0; r < kPanelRows; r += 4) {
    const int64_t here = std::min<int64_t>(std::max<int64_t>(count - r, 0), 4);
    dequantizeRows(b, firstRow + r, here, block, blocks, rows, kDepth);
    std::fill(rows + here * kDepth, rows + 4 * kDepth, 0.0f);
    packFour(rows, kDepth, r, depth, panel);
  }
}

// sums[t][c] += Σ_k x[t][k] · column k of row c for kTokens × kColumns vectors kept in registers.
// Never inlined: the registers are its own.
template <int kTokens>
__attribute__((noinline)) void tile(const float* x, int64_t stride, const float* panel,
                                    int64_t depth, float* sums) {
  Vec sum[kTokens][kColumns];
  for (int t = 0; t < kTokens; ++t) {
    for (int c = 0; c < kColumns; ++c) sum[t][c] = load(sums + t * kPanelRows + c * kWidth);
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      row[c] = load(panel + c * kWidth / kStrip * kStripFloats + c * kWidth % kStrip + k * kStrip);
    }
    for (int t = 0; t < kTokens; ++t) {
      const Vec factor = splat(x[t * stride + k]);
      for (int c = 0; c < kColumns; ++c) sum[t][c] += factor * row[c];
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int c = 0; c < kColumns; ++c) store(sums + t * kPanelRows + c * kWidth, sum[t][c]);
  }
}

void multiplyPanel(const float* x, int64_t stride, int64_t tokens, float* panel, int64_t depth,
                   float* sums) {
  for (int64_t c = 0; c < kPanelRows; c += kColumns * kWidth) {
    int64_t t = 0;
    const auto next = [&](auto size, auto function) {
      for (; t + size <= tokens; t += size) {
        function(x + t * stride, stride, columnOf(panel, c), depth, sums + t * kPanelRows + c);
      }
    };
    next(kBlockTokens, tile<kBlockTokens>);
    next(4, tile<4>);
    next(2, tile<2>);
    next(1, tile<1>);
  }
}

size_t manyFloats(int64_t tokens) {
  return static_cast<size_t>(kPanelFloats + tokens * kPanelRows);
}

template <typename T>
void panelProduct(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow,
                  float* scratch) {
  const int64_t tokens = endToken - firstToken, length = p.inFeatures;
  const int64_t count = std::min(kPanelRows, p.outFeatures - firstRow);
  float *panel = scratch, *sums = scratch + kPanelFloats;
  std::fill_n(sums, tokens * kPanelRows, 0.0f);
  for (int64_t k = 0; k < length; k += kDepth) {
    const int64_t depth = std::min(kDepth, length - k);
    if (p.blocks == nullptr) {
      pack(static_cast<const T*>(p.weight) + firstRow * length + k, length, count, depth, panel);
    } else {
      packBlocks(*p.blocks, firstRow, count, k, depth, panel);
    }
    multiplyPanel(p.x + firstToken * length + k, length, tokens, panel, depth, sums);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    writeRow<T>(p, firstToken + t, firstRow, count, sums + t * kPanelRows);
  }
}

void many(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow, float* scratch) {
  p.dataType == DataType::kFloat32 ? panelProduct<float>(p, firstToken, endToken, firstRow, scratch)
                                   : panelProduct<Half>(p, firstToken, endToken, firstRow, scratch);
}

void widen(const void* halves, int64_t count, float* out) {
  const Half* source = static_cast<const Half*>(halves);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, load(source + i));
  for (; i < count; ++i) out[i] = toFloat(source[i]);
}

constexpr lminf::cpu::Product kFloatProduct = {few, many, kPanelRows, fewFloats, manyFloats};

}  // namespace
