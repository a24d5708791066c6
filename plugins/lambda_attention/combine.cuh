// combine: the splits of every query row become its output.
#pragma once

#include "row.cuh"
#include "tile_shapes.h"

namespace lminf {

// One warp takes one query row. Lanes first share out the splits' maxima and totals, then the
// dimensions; the splits' sums are read once, coalesced.
template <class T, int D>
__global__ void __launch_bounds__(kCombineWarps * 32) combineKernel(const KernelArguments a) {
  constexpr int kParts = (D + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t row =
      static_cast<std::int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / 32;
  const int numHeads = a.numKvHeads * a.group;
  const std::int64_t rows = static_cast<std::int64_t>(a.batchSize) * numHeads * a.sequenceLength;
  if (row >= rows) return;

  float maximum = -INFINITY;
  for (int split = lane; split < a.splits; split += 32) {
    maximum = fmaxf(maximum, a.partialStats[(split * rows + row) * 2]);
  }
  maximum = maximumOver(maximum, 1, 16);
  const float top = finiteMaximum(maximum);

  float total = 0.0f;
  float sum[kParts] = {};
  for (int split = 0; split < a.splits; ++split) {
    const std::int64_t part = split * rows + row;
    const float weight = exp2Fast(a.partialStats[part * 2] - top);
    total += weight * a.partialStats[part * 2 + 1];
    for (int index = 0; index < kParts; ++index) {
      const int dim = index * 32 + lane;
      if (dim < D) sum[index] += weight * a.partialOutput[part * D + dim];
    }
  }
  const int head = static_cast<int>(row / a.sequenceLength % numHeads);
  const float factor = softmaxFactor(a, head, maximum, total);
  T* output = static_cast<T*>(a.output) + row * D;
  for (int index = 0; index < kParts; ++index) {
    const int dim = index * 32 + lane;
    if (dim < D) output[dim] = fromFloat<T>(sum[index] * factor);
  }
}

}  // namespace lminf
