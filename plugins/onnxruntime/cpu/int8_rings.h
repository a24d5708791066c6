// Rings of int8 with a float scale for each token and key/value head: rounding and reading back.
//
// lminf_export/operator/reference_int8.py, `quantize`: scale = max |x| / 127, q = x / scale to the
// nearest integer, ties to even. Compiled once per instruction set.
#pragma once

#include <algorithm>

#include "rotate.h"
#include "simd.h"

namespace {

constexpr float kInt8Limit = 127.0f;
// Keys and values of a tile that are made floats at a time: they stay in the first-level cache.
constexpr int64_t kInt8Tile = 64;

// The nearest integer of −127 … 127, ties to even.
inline int8_t toInt8(float x) {
  const float inside = x >= -kInt8Limit ? std::min(x, kInt8Limit) : -kInt8Limit;
  constexpr float magic = 12582912.0f;  // 1.5·2²³: the sum has no room for a fraction
  return static_cast<int8_t>(static_cast<int32_t>((inside + magic) - magic));
}

// Rounds what `visitElements` visits, twice in the same order, and returns its scale.
template <typename VisitElements>
inline float quantize(VisitElements visitElements, int8_t* out) {
  float largest = 0.0f;
  visitElements([&](int64_t, float value) { largest = std::max(largest, std::fabs(value)); });
  const float scale = largest / kInt8Limit;
  const float divisor = scale == 0.0f ? 1.0f : scale;
  visitElements([&](int64_t i, float value) { out[i] = toInt8(value / divisor); });
  return scale;
}

// Of a key and the bias that stays out of the ring, null for none.
template <typename In>
inline float quantizeRotated(const Params& p, const In* x, const In* bias, const float* cos,
                             const float* sin, int8_t* out) {
  const auto rest = [&](int64_t i) { return toFloat(x[i]) - toFloat(bias[i]); };
  const auto whole = [&](int64_t i) { return toFloat(x[i]); };
  return quantize(
      [&](auto visit) {
        bias == nullptr ? visitRotated(p, whole, cos, sin, visit)
                        : visitRotated(p, rest, cos, sin, visit);
      },
      out);
}

template <typename In>
inline float quantizeRow(const In* x, int64_t dim, int8_t* out) {
  const auto elements = [&](auto visit) {
    for (int64_t i = 0; i < dim; ++i) visit(i, toFloat(x[i]));
  };
  return quantize(elements, out);
}

// out[k][d] = rows[k][d] · scales[k], (count, dim).
inline void dequantize(const int8_t* rows, const float* scales, int64_t count, int64_t dim,
                       float* out) {
  for (int64_t k = 0; k < count; ++k, rows += dim, out += dim) {
    const Vec scale = splat(scales[k]);
    int64_t d = 0;
    for (; d + kWidth <= dim; d += kWidth) store(out + d, load(rows + d) * scale);
    for (; d < dim; ++d) out[d] = static_cast<float>(rows[d]) * scales[k];
  }
}

}  // namespace
