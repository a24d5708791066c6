// The arithmetic of products with weights, compiled once per instruction set.
#pragma once

#include <algorithm>

#include "ask.h"
#include "dequantize.h"
#include "linear.h"
#include "linear_output.h"
#include "simd.h"
#include "token_groups.h"

namespace {

// Sums kept in registers: tokens × weight rows.
constexpr int kMostTokens = kWidth == 16 ? 6 : 3;
constexpr int kRows = 4;
// How far ahead weights are asked for.
constexpr int64_t kAheadBytes = 4096;
// Many tokens: columns at a time, so that those of some tokens and rows are in the first-level
// cache, and bytes of a panel of rows, which are in the second.
constexpr int64_t kDepth = 1024;
constexpr int64_t kPanelBytes = int64_t{256} << 10, kLeastPanel = 8, kMostPanel = 64;

// Four weight rows; of those behind the last one of a weight the last one stands in.
template <typename W>
struct FourRows {
  const W* row[kRows];

  FourRows(const W* first, int64_t stride, int64_t count) {
    for (int64_t r = 0; r < kRows; ++r) row[r] = first + std::min(r, count - 1) * stride;
  }
};

// sums[t][r] += x[t] · rows[r] over some columns, lane by lane: column k belongs to lane k mod
// kWidth, and a lane's products are added in the order of the columns. That and `sumsOf` is the
// order of every sum, however many tokens and rows are computed together. Never inlined: the
// registers are its own. kAsked: vectors of weights, from `ahead` on, that each step asks for.
template <int kTokens, int kTogether, int kAsked, typename W>
__attribute__((noinline)) void tile(const float* x, int64_t xStride, const FourRows<W>& rows,
                                    int64_t depth, const char* ahead, bool starts, float* sums) {
  for (int first = 0; first < kRows; first += kTogether) {
    const W* row[kTogether];
    for (int r = 0; r < kTogether; ++r) row[r] = rows.row[first + r];
    Vec sum[kTokens][kTogether] = {};
    if (!starts) {
      for (int t = 0; t < kTokens; ++t) {
        for (int r = 0; r < kTogether; ++r) {
          sum[t][r] = load(sums + (t * kRows + first + r) * kWidth);
        }
      }
    }
    for (int64_t k = 0; k < depth; k += kWidth) {
      constexpr int kBytes = kAsked * kWidth * static_cast<int>(sizeof(W));
      for (int byte = 0; byte < kBytes; byte += 64) {
        kAsked == 1 ? askFor(ahead + byte) : __builtin_prefetch(ahead + byte, 0, 3);
      }
      ahead += kBytes;
      Vec weight[kTogether];
      for (int r = 0; r < kTogether; ++r) weight[r] = load(row[r] + k);
      for (int t = 0; t < kTokens; ++t) {
        const Vec part = load(x + t * xStride + k);
        for (int r = 0; r < kTogether; ++r) sum[t][r] = multiplyAdd(part, weight[r], sum[t][r]);
      }
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int r = 0; r < kTogether; ++r) {
        store(sums + (t * kRows + first + r) * kWidth, sum[t][r]);
      }
    }
  }
}

// The same for any number of columns: what no vector divides comes last, with zeros behind it.
template <int kTokens, int kTogether, int kAsked, typename W>
inline void meet(const float* x, int64_t xStride, const FourRows<W>& rows, int64_t depth,
                 const char* ahead, bool starts, float* sums) {
  const int64_t whole = depth / kWidth * kWidth, rest = depth - whole;
  tile<kTokens, kTogether, kAsked>(x, xStride, rows, whole, ahead, starts, sums);
  if (rest == 0) return;
  float lastX[kTokens * kWidth] = {};
  W last[kRows * kWidth] = {};
  for (int t = 0; t < kTokens; ++t) {
    std::copy_n(x + t * xStride + whole, rest, lastX + t * kWidth);
  }
  for (int r = 0; r < kRows; ++r) std::copy_n(rows.row[r] + whole, rest, last + r * kWidth);
  tile<kTokens, kTogether, 0>(lastX, kWidth, FourRows<W>(last, kWidth, kRows), kWidth, nullptr,
                              false, sums);
}

inline Vec4 finish(const float* sums) {
  return sumsOf(load(sums), load(sums + kWidth), load(sums + 2 * kWidth), load(sums + 3 * kWidth));
}

// --- few tokens ---------------------------------------------------------------------------------

// Four rows meet all tokens before the next four are streamed, which are asked for meanwhile.
template <typename W, typename T>
inline void streamFour(const Linear& p, const W* rows, int64_t stride, int64_t row, int64_t count) {
  const FourRows<W> four(rows, stride, count);
  const char* here = reinterpret_cast<const char*>(rows);
  const int64_t next = kRows * stride * static_cast<int64_t>(sizeof(W));
  alignas(64) float sums[kMostTokens * kRows * kWidth];
  forTokenGroups<kMostTokens>(0, p.tokens, [&](auto size, int64_t token) {
    const auto run = [&](auto together, auto asked, const char* ahead) {
      meet<size, together, asked>(p.x + token * p.inFeatures, p.inFeatures, four, p.inFeatures,
                                  ahead, true, sums);
    };
    constexpr std::integral_constant<int, kRows> all{};
    if constexpr (size == 1) {
      // A single token takes row after row, as memory streams best.
      run(std::integral_constant<int, 1>{}, std::integral_constant<int, 1>{}, here + kAheadBytes);
    } else if (p.tokens == size) {
      run(all, std::integral_constant<int, 4>{}, here + next);
    } else if (token < 2 * size) {  // the first groups ask for a half each
      run(all, std::integral_constant<int, 2>{}, here + next + (token == 0 ? 0 : next / 2));
    } else {
      run(all, std::integral_constant<int, 0>{}, nullptr);
    }
    for (int t = 0; t < size; ++t) {
      const Vec4 found = finish(sums + t * kRows * kWidth);
      float written[kRows];
      std::memcpy(written, &found, sizeof written);
      writeRow<T>(p, token + t, row, count, written);
    }
  });
}

template <typename T>
void streamRows(const Linear& p, int64_t firstRow, int64_t endRow, float* scratch) {
  for (int64_t row = firstRow; row < endRow; row += kRows) {
    const int64_t count = std::min<int64_t>(kRows, endRow - row);
    if (p.blocks == nullptr) {
      const T* rows = static_cast<const T*>(p.weight) + row * p.inFeatures;
      streamFour<T, T>(p, rows, p.inFeatures, row, count);
    } else {
      const int64_t stride = p.blocks->perRow * p.blocks->size;
      dequantizeRows(*p.blocks, row, count, 0, p.blocks->perRow, scratch, stride);
      streamFour<float, T>(p, scratch, stride, row, count);
    }
  }
}

void few(const Linear& p, int64_t firstRow, int64_t endRow, float* scratch) {
  p.dataType == DataType::kFloat32 ? streamRows<float>(p, firstRow, endRow, scratch)
                                   : streamRows<Half>(p, firstRow, endRow, scratch);
}

int64_t fewRows(const Linear&) { return kRows; }

size_t fewFloats(const Linear& p) {
  return p.blocks == nullptr ? 0 : static_cast<size_t>(kRows * p.blocks->perRow * p.blocks->size);
}

// --- many tokens --------------------------------------------------------------------------------

// Columns of a panel's row, padding included.
inline int64_t panelStride(const Linear& p) {
  return p.blocks == nullptr ? p.inFeatures : p.blocks->perRow * p.blocks->size;
}

int64_t panelRows(const Linear& p) {
  const int64_t bytes = std::max<int64_t>(panelStride(p), 1) * 4;
  return std::min(std::max(kPanelBytes / bytes / kRows * kRows, kLeastPanel), kMostPanel);
}

// Floats of a dequantised panel.
inline int64_t panelFloats(const Linear& p) {
  return p.blocks == nullptr ? 0 : (panelRows(p) * panelStride(p) + 15) / 16 * 16;
}

size_t manyFloats(const Linear& p) {
  return static_cast<size_t>(panelFloats(p) + kMostPanel * kMostTokens * kWidth);
}

template <typename W, typename T>
void panelProduct(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow,
                  const W* panel, float* sums) {
  const int64_t stride = panelStride(p), rows = std::min(panelRows(p), p.outFeatures - firstRow);
  forTokenGroups<kMostTokens>(firstToken, endToken, [&](auto size, int64_t token) {
    constexpr int kFloats = size * kRows * kWidth;
    int64_t k = 0;
    do {
      const int64_t depth = std::min(kDepth, p.inFeatures - k);
      for (int64_t r = 0; r < rows; r += kRows) {
        const FourRows<W> four(panel + r * stride + k, stride, rows - r);
        meet<size, kRows, 0>(p.x + token * p.inFeatures + k, p.inFeatures, four, depth, nullptr,
                             k == 0, sums + r / kRows * kFloats);
      }
      k += depth;
    } while (k < p.inFeatures);
    for (int t = 0; t < size; ++t) {
      float all[kMostPanel];
      for (int64_t r = 0; r < rows; r += kRows) {
        const Vec4 found = finish(sums + r / kRows * kFloats + t * kRows * kWidth);
        std::memcpy(all + r, &found, sizeof found);
      }
      writeRow<T>(p, token + t, firstRow, rows, all);
    }
  });
}

template <typename T>
void panelTokens(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow,
                 float* scratch) {
  if (p.blocks == nullptr) {
    const T* rows = static_cast<const T*>(p.weight) + firstRow * p.inFeatures;
    return panelProduct<T, T>(p, firstToken, endToken, firstRow, rows, scratch);
  }
  const int64_t rows = std::min(panelRows(p), p.outFeatures - firstRow);
  dequantizeRows(*p.blocks, firstRow, rows, 0, p.blocks->perRow, scratch, panelStride(p));
  panelProduct<float, T>(p, firstToken, endToken, firstRow, scratch, scratch + panelFloats(p));
}

void many(const Linear& p, int64_t firstToken, int64_t endToken, int64_t firstRow, float* scratch) {
  p.dataType == DataType::kFloat32 ? panelTokens<float>(p, firstToken, endToken, firstRow, scratch)
                                   : panelTokens<Half>(p, firstToken, endToken, firstRow, scratch);
}

void widen(const void* halves, int64_t count, float* out) {
  const Half* source = static_cast<const Half*>(halves);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, load(source + i));
  for (; i < count; ++i) out[i] = toFloat(source[i]);
}

constexpr lminf::cpu::Product kFloatProduct = {few,       many,      fewRows,
                                               panelRows, fewFloats, manyFloats};

}  // namespace
