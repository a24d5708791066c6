// Products of a few rows with keys and values that stream from memory once, in the order it holds
// them. Compiled once per instruction set.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "ask.h"
#include "simd.h"

namespace {

constexpr int64_t kNearKeys = 16;  // so many keys stay in the first-level cache
constexpr int64_t kPairBytes = 256;

// How far ahead keys and values are asked for.
constexpr int64_t kAheadBytes = 4096;

template <typename T>
inline void askAhead(const T* p) {
  askFor(reinterpret_cast<const char*>(p) + kAheadBytes);
}

// Calls function(n, first row) for groups of n = 4, 3, 2 or 1 rows; n is a constant.
template <typename Function>
void forRowGroups(int64_t rows, Function function) {
  int64_t r = 0;
  const auto next = [&](auto size) {
    for (; r + size <= rows; r += size) function(size, r);
  };
  next(std::integral_constant<int, 4>{});
  next(std::integral_constant<int, 3>{});
  next(std::integral_constant<int, 2>{});
  next(std::integral_constant<int, 1>{});
}

// logits[r][k] = query[r] · key[k] for kRows rows: each loaded piece of a key meets all of them.
template <int kRows, typename T>
void dotRows(const float* query, int64_t dim, const T* key, int64_t keyStride, int64_t count,
             float* logits, int64_t stride) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    const T* base = key + k * keyStride;
    Vec sum[kRows][4] = {};
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // key after key, as they lie in memory
      for (int64_t d = 0; d < dim; d += kWidth) {
        askAhead(base + i * keyStride + d);
        const Vec part = load(base + i * keyStride + d);
        for (int r = 0; r < kRows; ++r) sum[r][i] += load(query + r * dim + d) * part;
      }
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec4 four = sumsOf(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
      std::memcpy(logits + r * stride + k, &four, sizeof four);
    }
  }
  for (; k < count; ++k) {
    for (int r = 0; r < kRows; ++r) {
      Vec sum = {};
      for (int64_t d = 0; d < dim; d += kWidth) {
        sum += load(query + r * dim + d) * load(key + k * keyStride + d);
      }
      logits[r * stride + k] = sumOf(sum);
    }
  }
}

// The same for any few rows. Keys come from memory once: a few of them meet all groups of rows
// while they are in the first-level cache.
template <typename T>
void dots(const float* query, int64_t rows, int64_t dim, const T* key, int64_t keyStride,
          int64_t count, float* logits, int64_t stride) {
  for (int64_t k = 0; k < count; k += kNearKeys) {
    const int64_t some = std::min(kNearKeys, count - k);
    forRowGroups(rows, [&](auto size, int64_t r) {
      dotRows<size>(query + r * dim, dim, key + k * keyStride, keyStride, some,
                    logits + r * stride + k, stride);
    });
  }
}

// out[r] += Σ_k weights[r][k] · value[k], kKeys keys at a time: their weights stay in registers,
// the sums do not.
template <int kRows, int kKeys, typename T>
void addValues(const float* weights, int64_t stride, const T* value, int64_t dim, int64_t count,
               float* out) {
  for (int64_t k = 0; k < count; k += kKeys) {
    Vec weight[kRows][kKeys];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kKeys; ++i) weight[r][i] = splat(weights[r * stride + k + i]);
    }
    for (int64_t d = 0; d < dim; d += kWidth) {
      Vec part[kKeys];
      for (int i = 0; i < kKeys; ++i) {
        askAhead(value + (k + i) * dim + d);
        part[i] = load(value + (k + i) * dim + d);
      }
      for (int r = 0; r < kRows; ++r) {
        Vec sum = load(out + r * dim + d);
        for (int i = 0; i < kKeys; ++i) sum += weight[r][i] * part[i];
        store(out + r * dim + d, sum);
      }
    }
  }
}

// The values of a tile for a few rows, in the order memory holds them. Memory streams best row
// after row; short rows may be read in pairs, which halves the traffic of the sums.
template <typename T>
void weighValues(const float* weights, int64_t stride, int64_t rows, const T* value, int64_t dim,
                 int64_t count, float* out) {
  const bool inPairs = dim * static_cast<int64_t>(sizeof(T)) <= kPairBytes;
  for (int64_t k = 0; k < count; k += kNearKeys) {
    const int64_t some = std::min(kNearKeys, count - k), paired = inPairs ? some / 2 * 2 : 0;
    forRowGroups(rows, [&](auto size, int64_t r) {
      const float* own = weights + r * stride + k;
      const T* from = value + k * dim;
      addValues<size, 2>(own, stride, from, dim, paired, out + r * dim);
      addValues<size, 1>(own + paired, stride, from + paired * dim, dim, some - paired,
                         out + r * dim);
    });
  }
}

}  // namespace
