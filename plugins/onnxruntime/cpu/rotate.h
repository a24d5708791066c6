// Rotation by one row of cos and sin. Compiled once per instruction set.
#pragma once

#include "attention.h"
#include "simd.h"

namespace {

using lminf::cpu::Params;

// Calls visit(i, value) for every element of x, where x[i] is at(i), rotated by one row of cos and
// sin.
template <typename At, typename Visit>
inline void visitRotated(const Params& p, At at, const float* cos, const float* sin, Visit visit) {
  const int64_t half = p.rotaryDim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const int64_t first = p.rotaryInterleaved != 0 ? 2 * i : i,
                  second = p.rotaryInterleaved != 0 ? 2 * i + 1 : i + half;
    const float a = at(first), b = at(second);
    visit(first, a * cos[i] - b * sin[i]);
    visit(second, b * cos[i] + a * sin[i]);
  }
  for (int64_t i = p.rotaryDim; i < p.headDim; ++i) visit(i, at(i));
}

// out[i] = x rotated by one row of cos and sin, times factor.
template <typename In, typename Out>
void rotate(const Params& p, const In* x, const float* cos, const float* sin, float factor,
            Out* out) {
  visitRotated(
      p, [&](int64_t i) { return toFloat(x[i]); }, cos, sin,
      [&](int64_t i, float value) { fromFloat(value * factor, out + i); });
}

}  // namespace
