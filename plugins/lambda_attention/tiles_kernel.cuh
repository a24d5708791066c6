// The kernel of tiles: what a block's rows see, sinks first, then the ring.
#pragma once

#include "tiles.cuh"
#include "tiles_rounded.cuh"

namespace lminf {

// What a block's rows can see: the steps of its rows are contiguous if they belong to one head.
template <int kRows>
__device__ __forceinline__ KeySpan spanOfBlock(const KernelArguments& a, const RowGroup& group,
                                               std::int64_t past, int real) {
  const int lastRow = smaller(group.firstRow + kRows, group.rows) - 1;
  const bool oneHead = group.firstRow / a.sequenceLength == lastRow / a.sequenceLength;
  const int firstStep = oneHead ? group.firstRow % a.sequenceLength : 0;
  const int lastStep = oneHead ? lastRow % a.sequenceLength : a.sequenceLength - 1;
  return keySpan(past, real, firstStep, lastStep, a.windowSize, a.numSinkTokens, a.capacity);
}

// grid: (B * G * rowBlocks, splits).
template <class T, class Ring, int D, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 1) tilesKernel(const KernelArguments a) {
  constexpr int kRows = kWarps * 16, kKeys = tileKeys(D), kStride = D + kRowPadding;
  const int warpNumber = static_cast<int>(threadIdx.x / 32);
  const RowGroup group(a, blockIdx.x, kRows);
  const int firstRow = group.firstRow + warpNumber * 16;
  const std::int64_t past = a.pastLength[group.batch];
  const int real = realTokens(a.newLength[group.batch], a.sequenceLength);
  const std::int64_t pair = static_cast<std::int64_t>(group.batch) * a.numKvHeads + group.kvHead;
  const KeySpan span = spanOfBlock<kRows>(a, group, past, real);
  const int sinkTiles = ceilDiv(span.sinkCount, kKeys);
  const int tiles = sinkTiles + ceilDiv(span.ringCount, kKeys);
  const int split = static_cast<int>(blockIdx.y);
  const int begin = splitBegin(tiles, split, a.splits);
  const int end = splitBegin(tiles, split + 1, a.splits);

  T* shared = reinterpret_cast<T*>(dynamicShared());
  T* stages = queryStaysShared(D) ? shared + kRows * kStride : shared;
  TilesWarp<T, Ring, D, kWarps> warp(a);
  warp.queryRows = shared + warpNumber * 16 * kStride;
#pragma unroll
  for (int index = 0; index < D / 2; ++index) warp.sum[index / 4][index % 4] = 0.0f;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = firstRow + warp.lane / 4 + 8 * side;
    warp.rowStep[side] = row % a.sequenceLength;
    warp.slope[side] = row < group.rows ? slopeOf(a, group.head(a, row)) : 0.0f;
    warp.maximum[side] = -INFINITY;
    warp.total[side] = 0.0f;
  }

#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    const bool isSink = kind == 0;
    const int from = isSink ? begin : larger(begin - sinkTiles, 0);
    const int to = isSink ? smaller(end, sinkTiles) : end - sinkTiles;
    if (from >= to) continue;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const bool sees =
          firstRow + warp.lane / 4 + 8 * side < group.rows && warp.rowStep[side] < real;
      const int sinks = visibleSinks(past + warp.rowStep[side], a.windowSize, a.numSinkTokens);
      warp.range[side] = !sees    ? noKeys()
                         : isSink ? KeyRange{0, sinks - 1}
                                  : visibleRingKeys(span, warp.rowStep[side], a.windowLimit);
    }
    warp.shareRanges();
    rotateTileQueries<T, D, kWarps>(a, group, isSink, shared);
    syncBlock();
    warp.loadQuery();
    if (!queryStaysShared(D)) syncBlock();  // tiles of keys take the queries' place
    if constexpr (isRounded<T, Ring>()) {
      const RoundedTiles<T, D, kWarps> tilesOf(stages);
      if (isSink) {
        tilesOf.walkSinks(warp, sinkList<T, D>(a, span, pair), from, to);
      } else {
        tilesOf.walkRing(warp, ringList<Ring, D>(a, span, pair), scalesOf(a, pair), from, to,
                         span.firstRelative);
      }
    } else {
      const KeyList<T> list =
          isSink ? sinkList<T, D>(a, span, pair) : ringList<T, D>(a, span, pair);
      walkTiles<T, Ring, D, kWarps>(warp, list, from, to, isSink, span.firstRelative, stages);
    }
  }

#pragma unroll
  for (int side = 0; side < 2; ++side) warp.total[side] = sumOver(warp.total[side], 1, 2);
  if (a.splits > 1) {
    storePartial<T, Ring, D, kWarps>(a, group, warp, firstRow, split);
  } else {
    storeTile<T, Ring, D, kWarps>(a, group, warp, firstRow, shared + warpNumber * 16 * kStride);
  }
}

}  // namespace lminf
