// Products of matrices in blocks of registers. Compiled once per instruction set.
#pragma once

#include "simd.h"

namespace {

constexpr int64_t kFewRows = 3;  // up to here a row of values is taken whole, not in columns

// out[r][n] (+)= Σ_k a[r][k] · b[k][n] for kRows × kColumns vectors kept in registers. Never
// inlined: the registers are its own.
template <int kRows, int kColumns, bool kAccumulate, typename T>
__attribute__((noinline)) void productBlock(const float* a, int64_t aStride, const T* b,
                                            int64_t bStride, int64_t depth, float* out,
                                            int64_t outStride) {
  Vec sum[kRows][kColumns];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) {
      sum[r][c] = kAccumulate ? load(out + r * outStride + c * kWidth) : Vec{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kColumns];
    for (int c = 0; c < kColumns; ++c) row[c] = load(b + k * bStride + c * kWidth);
    for (int r = 0; r < kRows; ++r) {
      const Vec factor = splat(a[r * aStride + k]);
      for (int c = 0; c < kColumns; ++c) sum[r][c] += factor * row[c];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c) store(out + r * outStride + c * kWidth, sum[r][c]);
  }
}

template <int kColumns, bool kAccumulate, typename T>
void productColumns(const float* a, int64_t aStride, int64_t rows, const T* b, int64_t bStride,
                    int64_t depth, float* out, int64_t outStride) {
  int64_t r = 0;
  const auto next = [&](auto size, auto function) {
    for (; r + size <= rows; r += size) {
      function(a + r * aStride, aStride, b, bStride, depth, out + r * outStride, outStride);
    }
  };
  if constexpr (kColumns <= 4) {
    next(6, productBlock<6, kColumns, kAccumulate, T>);
    next(4, productBlock<4, kColumns, kAccumulate, T>);
  }
  next(3, productBlock<3, kColumns, kAccumulate, T>);
  next(2, productBlock<2, kColumns, kAccumulate, T>);
  next(1, productBlock<1, kColumns, kAccumulate, T>);
}

// The same for any width that is a multiple of the vector's.
template <bool kAccumulate, typename T>
void product(const float* a, int64_t aStride, int64_t rows, const T* b, int64_t bStride,
             int64_t depth, float* out, int64_t outStride, int64_t width) {
  int64_t n = 0;
  const auto next = [&](auto columns, auto function) {
    for (; n + columns * kWidth <= width; n += columns * kWidth) {
      function(a, aStride, rows, b + n, bStride, depth, out + n, outStride);
    }
  };
  if constexpr (kWidth == 16) {  // 6 × 4 sums in 32 registers, 6 × 2 in 16
    if (rows <= kFewRows) next(8, productColumns<8, kAccumulate, T>);
    next(4, productColumns<4, kAccumulate, T>);
    next(3, productColumns<3, kAccumulate, T>);
  }
  next(2, productColumns<2, kAccumulate, T>);
  next(1, productColumns<1, kAccumulate, T>);
}

}  // namespace
