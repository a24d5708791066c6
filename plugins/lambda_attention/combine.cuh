// combine: the splits of every query row become its output.
#pragma once

#include "row.cuh"
#include "tile_shapes.h"

namespace lminf {

// One block takes one query row; its warps share out the splits, so that few loads wait for each
// other, and their sums meet in shared memory.
template <class T, int D>
__global__ void __launch_bounds__(kCombineWarps * 32) combineKernel(const KernelArguments a) {
  constexpr int kParts = (D + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const std::int64_t row = blockIdx.x;
  const int numHeads = a.numKvHeads * a.group;
  const std::int64_t rows = static_cast<std::int64_t>(a.batchSize) * numHeads * a.sequenceLength;

  float maximum = -INFINITY;
  for (int split = lane; split < a.splits; split += 32) {
    maximum = fmaxf(maximum, a.partialStats[(split * rows + row) * 2]);
  }
  maximum = maximumOver(maximum, 1, 16);
  const float top = finiteMaximum(maximum);

  float total = 0.0f;
  float sum[kParts];
#pragma unroll
  for (int index = 0; index < kParts; ++index) sum[index] = 0.0f;
#pragma unroll 4
  for (int split = warp; split < a.splits; split += kCombineWarps) {
    const std::int64_t part = split * rows + row;
    const float weight = exp2Fast(a.partialStats[part * 2] - top);
    total += weight * a.partialStats[part * 2 + 1];
#pragma unroll
    for (int index = 0; index < kParts; ++index) {
      const int dim = index * 32 + lane;
      if (dim < D) sum[index] += weight * a.partialOutput[part * D + dim];
    }
  }

  float* totals = reinterpret_cast<float*>(dynamicShared());
  float* sums = totals + kCombineWarps;
  if (lane == 0) totals[warp] = total;
#pragma unroll
  for (int index = 0; index < kParts; ++index) {
    const int dim = index * 32 + lane;
    if (dim < D) sums[warp * D + dim] = sum[index];
  }
  syncBlock();
  total = 0.0f;
#pragma unroll
  for (int other = 0; other < kCombineWarps; ++other) total += totals[other];
  const int head = static_cast<int>(row / a.sequenceLength % numHeads);
  const float factor = softmaxFactor(a, head, maximum, total);
  T* output = static_cast<T*>(a.output) + row * D;
  for (int dim = static_cast<int>(threadIdx.x); dim < D; dim += kCombineWarps * 32) {
    float all = 0.0f;
#pragma unroll
    for (int other = 0; other < kCombineWarps; ++other) all += sums[other * D + dim];
    output[dim] = fromFloat<T>(all * factor);
  }
}

}  // namespace lminf
