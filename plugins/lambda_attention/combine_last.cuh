// The splits of decode become outputs in the block that ends last, instead of in a kernel of their
// own (combine.cuh): one launch less, for a counter that somebody keeps.
#pragma once

#include "row.cuh"
#include "tile_shapes.h"

namespace lminf {

struct alignas(16) FourFloats {
  float value[4];
};

// Of each row and split the factor of its sums: its share of the softmax over all splits, and what
// makes a mean of a sum; 0 behind the last split. A warp takes a row, a lane two splits.
template <int kRows>
__device__ __forceinline__ void weighSplits(const KernelArguments& a, const RowGroup& group,
                                            int rows, std::int64_t allRows, float* weights) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  for (int row = warp; row < rows; row += kDecodeWarps) {
    float maximum[2], total[2];
#pragma unroll
    for (int index = 0; index < 2; ++index) {
      const int split = lane + 32 * index;
      const bool exists = split < a.splits;
      const float* stats =
          a.partialStats + 2 * (split * allRows + group.offset + group.firstRow + row);
      maximum[index] = exists ? stats[0] : -INFINITY;
      total[index] = exists ? stats[1] : 0.0f;
    }
    const float top = maximumOver(fmaxf(maximum[0], maximum[1]), 1, 16);
    const float base = finiteMaximum(top);
    const float weight[2] = {exp2Fast(maximum[0] - base), exp2Fast(maximum[1] - base)};
    const float sum = sumOver(weight[0] * total[0] + weight[1] * total[1], 1, 16);
    const float factor = softmaxFactor(a, group.head(a, group.firstRow + row), top, sum);
    weights[row * kMaxSplits + lane] = weight[0] * factor;
    weights[row * kMaxSplits + lane + 32] = weight[1] * factor;
  }
}

// Behind the block's parts in memory: counts the block, and in the last of a row's blocks makes
// outputs of all parts. Takes the block's shared memory.
template <class T, int D, int kRows>
__device__ __forceinline__ void combineInLastBlock(const KernelArguments& a,
                                                   const RowGroup& group) {
  constexpr int kChunks = D / 4, kAtOnce = 8;
  static_assert(kMaxSplits == 64, "a lane weighs two splits");
  static_assert(kMaxSplits % kAtOnce == 0, "all weights at once have a place");
  static_assert((kRows * kMaxSplits + 1) * sizeof(float) <= decodeSharedBytes(D, kRows / 8),
                "the weights do not fit into what decode has");
  float* weights = reinterpret_cast<float*>(dynamicShared());
  int& isLast = *reinterpret_cast<int*>(weights + kRows * kMaxSplits);
  syncBlock();  // parts are written, results in shared memory are read
  if (threadIdx.x == 0) isLast = arriveLast(a.arrivals + blockIdx.x, a.splits);
  syncBlock();
  if (isLast == 0) return;

  const int rows = smaller(kRows, group.rows - group.firstRow);
  const std::int64_t allRows =
      static_cast<std::int64_t>(a.batchSize) * a.numKvHeads * a.group * a.sequenceLength;
  weighSplits<kRows>(a, group, rows, allRows, weights);
  syncBlock();
  for (int chunk = static_cast<int>(threadIdx.x); chunk < rows * kChunks;
       chunk += kDecodeWarps * 32) {
    const int row = chunk / kChunks;
    const std::int64_t at = (group.offset + group.firstRow + row) * D + chunk % kChunks * 4;
    float sum[4] = {};
#pragma unroll 1
    for (int first = 0; first < a.splits; first += kAtOnce) {
      FourFloats part[kAtOnce];
#pragma unroll
      for (int index = 0; index < kAtOnce; ++index) {
        part[index] = {};
        if (first + index >= a.splits) continue;
        part[index] = *reinterpret_cast<const FourFloats*>(a.partialOutput +
                                                           (first + index) * allRows * D + at);
      }
#pragma unroll
      for (int index = 0; index < kAtOnce; ++index) {
        const float weight = weights[row * kMaxSplits + first + index];
#pragma unroll
        for (int element = 0; element < 4; ++element) {
          sum[element] += weight * part[index].value[element];
        }
      }
    }
    storeWords<2>(static_cast<T*>(a.output) + at,
                  {{packPair<T>(sum[0], sum[1]), packPair<T>(sum[2], sum[3])}});
  }
}

}  // namespace lminf
