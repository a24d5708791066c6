// The kernel of tiles: sinks first, then the ring.
#pragma once

#include "tiles.cuh"
#include "tiles_rounded.cuh"
#include "tiles_span.cuh"

namespace lminf {

// grid: (B * G * rowBlocks, splits).
template <class T, class Ring, int D, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 1) tilesKernel(const KernelArguments a) {
  using Warp = TilesWarp<T, Ring, D, kWarps, 1>;
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
  T* stages = Warp::kQueryShared ? shared + kRows * kStride : shared;
  Warp warp(a);
  warp.queryRows = shared + warpNumber * 16 * kStride;
  warp.clearSums();
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = firstRow + warp.lane / 4 + 8 * side;
    warp.rows.steps[side] = row % a.sequenceLength;
    warp.rows.slopes[side] = row < group.rows ? slopeOf(a, group.head(a, row)) : 0.0f;
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
          firstRow + warp.lane / 4 + 8 * side < group.rows && warp.rows.steps[side] < real;
      const int sinks = visibleSinks(past + warp.rows.steps[side], a.windowSize, a.numSinkTokens);
      warp.rows.ranges[side] = !sees ? noKeys()
                               : isSink
                                   ? KeyRange{0, sinks - 1}
                                   : visibleRingKeys(span, warp.rows.steps[side], a.windowLimit);
    }
    warp.shareRanges();
    rotateTileQueries<T, D, kWarps, 1>(a, group, isSink, shared);
    syncBlock();
    warp.loadQuery();
    if (!Warp::kQueryShared) syncBlock();  // tiles of keys take the queries' place
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
      walkTiles<T, D, kWarps>(warp, list, from, to, isSink, span.firstRelative, stages);
    }
  }

#pragma unroll
  for (int side = 0; side < 2; ++side) warp.total[side] = sumOver(warp.total[side], 1, 2);
  if (a.splits > 1) {
    storePartial<T, D>(a, group, warp, firstRow, split);
  } else {
    storeTile<T, D>(a, group, warp, firstRow, shared + warpNumber * 16 * kStride);
  }
}

}  // namespace lminf
