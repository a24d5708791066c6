// Defines enqueueTilesHopper for one type: include and instantiate.
#pragma once

#include "hopper_queries.cuh"
#include "kernels.h"
#include "tiles_hopper.cuh"
#include "tiles_span.cuh"

namespace lminf {

// grid: (B * G * rowBlocks, splits).
template <class T, int D>
__global__ void __launch_bounds__(kHopperThreads, 1) tilesHopperKernel(const KernelArguments a) {
  const RowGroup group(a, blockIdx.x, kHopperRows);
  const std::int64_t past = a.pastLength[group.batch];
  const int real = realTokens(a.newLength[group.batch], a.sequenceLength);
  const KeySpan span = spanOfBlock<kHopperRows>(a, group, past, real);
  const int sinkTiles = ceilDiv(span.sinkCount, kHopperKeys);
  const int tiles = sinkTiles + ceilDiv(span.ringCount, kHopperKeys);
  const int split = static_cast<int>(blockIdx.y);
  const int begin = splitBegin(tiles, split, a.splits);
  const int end = splitBegin(tiles, split + 1, a.splits);

  const HopperShared<D> shared(dynamicShared());
  if (threadIdx.x == 0) shared.initBarriers();
  syncBlock();
  if (threadIdx.x < kWarpgroup) {
    giveRegisters<kHopperCopyRegisters>();
    const std::int64_t pair = static_cast<std::int64_t>(group.batch) * a.numKvHeads + group.kvHead;
    if (begin < end) {
      const HopperLists<T> lists{sinkList<T, D>(a, span, pair), ringList<T, D>(a, span, pair),
                                 sinkTiles};
      copyTiles<T, D>(shared, lists, begin, end);
    }
  } else {
    takeRegisters<kHopperAttendRegisters>();
    HopperWarpgroup<T, D> warpgroup(a, group, shared);
    if (begin < end) {
      if (begin + 1 < end) warpgroup.giveFirstTurn();
      rotateHopperQueries<T, D>(a, group, shared, warpgroup.number,
                                {begin<sinkTiles, end> sinkTiles});
      warpgroup.meet();
      warpgroup.walk(span, past, real, sinkTiles, begin, end);
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      warpgroup.total[side] = sumOver(warpgroup.total[side], 1, 2);
    }
    if (a.splits > 1) {
      storePartial(warpgroup, split);
    } else {
      storeTile(warpgroup);
    }
  }
}

template <class T>
cudaError_t enqueueTilesHopper(const KernelArguments& arguments, const AttentionPlan& plan,
                               int headDim, cudaStream_t stream) {
  const LaunchShape shape = shapeOf(arguments, plan);
  switch (headDim) {
    case 64: return enqueue(tilesHopperKernel<T, 64>, shape, stream, arguments);
    case 128: return enqueue(tilesHopperKernel<T, 128>, shape, stream, arguments);
    default: return cudaErrorInvalidValue;  // the plan takes another kernel there
  }
}

}  // namespace lminf
