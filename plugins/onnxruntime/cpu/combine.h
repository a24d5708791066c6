// Merging the results of pieces that differ only in their keys. Compiled once per instruction set.
#pragma once

#include <algorithm>

#include "scratch.h"

namespace {

using lminf::DataType;
using lminf::cpu::Item;

// Below any logit, and finite: what was never seen has weight exp(kHidden − maximum) = 0.
constexpr float kHidden = -1e30f;

template <typename T>
void combineRows(const Params& p, const Item* items, size_t count) {
  const Item& item = items[0];
  const int64_t dim = paddedDim(p), rows = item.numSteps * group(p);
  for (int64_t r = 0; r < rows; ++r) {
    float top = kHidden, sum = 0.0f;
    for (size_t i = 0; i < count; ++i) top = std::max(top, items[i].partial[rows * dim + r]);
    float weights[lminf::cpu::kMaxSplits];
    for (size_t i = 0; i < count; ++i) {
      weights[i] = expNonPositive(splat(items[i].partial[rows * dim + r] - top))[0];
      sum += weights[i] * items[i].partial[rows * (dim + 1) + r];
    }
    const int64_t head = item.kvHead * group(p) + r % group(p);
    const int64_t step = item.firstStep + r / group(p);
    T* out = static_cast<T*>(p.output) +
             ((item.batch * p.numHeads + head) * p.sequenceLength + step) * p.headDim;
    for (int64_t d = 0; d < p.headDim; d += kWidth) {
      Vec value = {};
      for (size_t i = 0; i < count; ++i) {
        value = multiplyAdd(splat(weights[i]), load(items[i].partial + r * dim + d), value);
      }
      value /= sum;
      const int64_t some = std::min<int64_t>(kWidth, p.headDim - d);
      for (int64_t j = 0; j < some; ++j) fromFloat(value[j], out + d + j);
    }
  }
}

void combine(const Params& p, const Item* items, size_t count) {
  p.dataType == DataType::kFloat32 ? combineRows<float>(p, items, count)
                                   : combineRows<Half>(p, items, count);
}

}  // namespace
