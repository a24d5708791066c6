// combine: the splits of every query row become its output.
#pragma once

#include "row.cuh"
#include "tile_shapes.h"

namespace lminf {

// One block takes one query row; its warps share out the splits and load all at once, and their
// sums meet in shared memory.
template <class T, int D>
__global__ void __launch_bounds__(kCombineWarps * 32) combineKernel(const KernelArguments a) {
  constexpr int kParts = (D + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const std::int64_t row = blockIdx.x;
  const int numHeads = a.numKvHeads * a.group;
  const std::int64_t rows = static_cast<std::int64_t>(a.batchSize) * numHeads * a.sequenceLength;

  waitForPrevious();
  float splitMaximum[kCombineSplits], splitTotal[kCombineSplits], part[kCombineSplits][kParts];
#pragma unroll
  for (int index = 0; index < kCombineSplits; ++index) {
    const int split = warp + index * kCombineWarps;
    splitMaximum[index] = -INFINITY;
    splitTotal[index] = 0.0f;
#pragma unroll
    for (int step = 0; step < kParts; ++step) part[index][step] = 0.0f;
    if (split >= a.splits) continue;
    const std::int64_t at = split * rows + row;
    splitMaximum[index] = a.partialStats[at * 2];
    splitTotal[index] = a.partialStats[at * 2 + 1];
#pragma unroll
    for (int step = 0; step < kParts; ++step) {
      const int dim = step * 32 + lane;
      if (dim < D) part[index][step] = a.partialOutput[at * D + dim];
    }
  }
  float maximum = -INFINITY;
#pragma unroll
  for (int index = 0; index < kCombineSplits; ++index) {
    maximum = fmaxf(maximum, splitMaximum[index]);
  }
  const float ownTop = finiteMaximum(maximum);
  float total = 0.0f;
  float sum[kParts];
#pragma unroll
  for (int step = 0; step < kParts; ++step) sum[step] = 0.0f;
#pragma unroll
  for (int index = 0; index < kCombineSplits; ++index) {
    const float weight = exp2Fast(splitMaximum[index] - ownTop);
    total += weight * splitTotal[index];
#pragma unroll
    for (int step = 0; step < kParts; ++step) sum[step] += weight * part[index][step];
  }

  // Of every warp: maximum, total, D sums.
  float* maxima = reinterpret_cast<float*>(dynamicShared());
  float* totals = maxima + kCombineWarps;
  float* sums = totals + kCombineWarps;
  if (lane == 0) {
    maxima[warp] = maximum;
    totals[warp] = total;
  }
#pragma unroll
  for (int step = 0; step < kParts; ++step) {
    const int dim = step * 32 + lane;
    if (dim < D) sums[warp * D + dim] = sum[step];
  }
  syncBlock();
  maximum = -INFINITY;
#pragma unroll
  for (int other = 0; other < kCombineWarps; ++other) maximum = fmaxf(maximum, maxima[other]);
  const float top = finiteMaximum(maximum);
  float weights[kCombineWarps];
  total = 0.0f;
#pragma unroll
  for (int other = 0; other < kCombineWarps; ++other) {
    weights[other] = exp2Fast(maxima[other] - top);
    total += weights[other] * totals[other];
  }
  const int head = static_cast<int>(blockIdx.x) / a.sequenceLength % numHeads;
  const float factor = softmaxFactor(a, head, maximum, total);
  T* output = static_cast<T*>(a.output) + row * D;
  for (int dim = static_cast<int>(threadIdx.x); dim < D; dim += kCombineWarps * 32) {
    float all = 0.0f;
#pragma unroll
    for (int other = 0; other < kCombineWarps; ++other) {
      all += weights[other] * sums[other * D + dim];
    }
    output[dim] = fromFloat<T>(all * factor);
  }
}

}  // namespace lminf
