// Writing a product's elements, with what is added to them.
#pragma once

#include <type_traits>

#include "linear.h"
#include "simd.h"

namespace {

using lminf::DataType;
using lminf::cpu::Linear;

template <typename T>
float addendAt(const Linear& p, int64_t token, int64_t row) {
  const T* addend = static_cast<const T*>(p.addend);
  return addend == nullptr ? 0.0f : toFloat(addend[token * p.addendStride + row]);
}

template <typename T>
void write(const Linear& p, int64_t token, int64_t row, float sum) {
  fromFloat(sum + addendAt<T>(p, token, row), static_cast<T*>(p.out) + token * p.outFeatures + row);
}

template <typename T>
void writeRow(const Linear& p, int64_t token, int64_t row, int64_t count, const float* sums) {
  if constexpr (std::is_same_v<T, float>) {
    float* out = static_cast<float*>(p.out) + token * p.outFeatures + row;
    const float* addend = static_cast<const float*>(p.addend);
    if (addend == nullptr) {
      std::memcpy(out, sums, count * sizeof(float));
      return;
    }
    addend += token * p.addendStride + row;
    for (int64_t r = 0; r < count; ++r) out[r] = sums[r] + addend[r];
  } else {
    for (int64_t r = 0; r < count; ++r) write<T>(p, token, row + r, sums[r]);
  }
}

}  // namespace
