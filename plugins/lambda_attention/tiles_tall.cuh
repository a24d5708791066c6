// prefill with 32 query rows a warp: keys and values of a tile take turns in shared memory.
//
// ldmatrix of keys or values feeds four mma, twice as many as with 16 rows, so shared memory is
// read half as often. There is one tile of keys and one of values: values are on their way while
// the keys are multiplied, the next keys during the softmax and the sums. Two blocks fit on a
// multiprocessor; one computes while the other waits. Nearly all registers hold sums and products,
// so what the threads of a block have in common stays in shared memory, too.
#pragma once

#include "tiles.cuh"
#include "tiles_span.cuh"

namespace lminf {

// What the threads of a block have in common; of sinks, then of the ring.
template <class T>
struct TallBlock {
  RowGroup group;
  KeySpan span;
  std::int64_t past;
  int real;
  int begin[2];  // tiles
  int end[2];
  KeyList<T> list[2];
};

template <class T, int D>
__device__ __forceinline__ TallBlock<T> tallBlockOf(const KernelArguments& a) {
  static_assert(sizeof(TallBlock<T>) <= kTallBlockBytes && sizeof(SharedRow) == kTallRowBytes,
                "as the plan counts them");
  const RowGroup group(a, blockIdx.x, kTallRows);
  const std::int64_t past = a.pastLength[group.batch];
  const int real = realTokens(a.newLength[group.batch], a.sequenceLength);
  const std::int64_t pair = static_cast<std::int64_t>(group.batch) * a.numKvHeads + group.kvHead;
  const KeySpan span = spanOfBlock<kTallRows>(a, group, past, real);
  const int sinkTiles = ceilDiv(span.sinkCount, tileKeys(D));
  const int tiles = sinkTiles + ceilDiv(span.ringCount, tileKeys(D));
  const int split = static_cast<int>(blockIdx.y);
  const int begin = splitBegin(tiles, split, a.splits);
  const int end = splitBegin(tiles, split + 1, a.splits);
  return {group,
          span,
          past,
          real,
          {begin, larger(begin - sinkTiles, 0)},
          {smaller(end, sinkTiles), end - sinkTiles},
          {sinkList<T, D>(a, span, pair), ringList<T, D>(a, span, pair)}};
}

// The shared memory of a block.
template <class T, int D>
struct TallShared {
  static constexpr int kStride = D + kRowPadding;
  static constexpr bool kQueryShared = tallQueryStaysShared(D);

  T* queries;  // kTallRows rows; where registers hold them, the tiles take their place
  T* keys;
  T* values;
  SharedRow* rows;
  TallBlock<T>* block;

  __device__ __forceinline__ explicit TallShared(unsigned char* memory)
      : queries(reinterpret_cast<T*>(memory)),
        keys(queries + (kQueryShared ? kTallRows * kStride : 0)),
        values(keys + tileKeys(D) * kStride),
        rows(reinterpret_cast<SharedRow*>(memory + tallTileBytes(D))),
        block(reinterpret_cast<TallBlock<T>*>(rows + kTallRows)) {}
};

// Starts copying keys first ... first + kKeys - 1, or their values, to shared rows. Behind the last
// key it is repeated; the mask drops the repetitions. Most tiles are whole and lie in one piece.
template <class T, int D>
__device__ __forceinline__ void copyRowsOf(const KeyList<T>& list, const T* source, int first,
                                           T* rows) {
  constexpr int kKeys = tileKeys(D), kStride = D + kRowPadding;
  constexpr int kChunks = D / 8, kThreads = kTallWarps * 32, kCopies = kKeys * kChunks / kThreads;
  static_assert(kCopies * kThreads == kKeys * kChunks, "every thread copies as much");
  const int thread = threadAnew(), slot = list.slot(first);
  if (first + kKeys <= list.count && slot + kKeys <= list.capacity) {
    const T* from = source + slot * D + thread * 8;
#pragma unroll
    for (int copy = 0; copy < kCopies; ++copy) {
      const int chunk = thread + copy * kThreads;
      // The row of the first copy, and whole rows further, where the compiler can tell.
      const int row = kThreads % kChunks == 0 ? thread / kChunks + copy * (kThreads / kChunks)
                                              : chunk / kChunks;
      const int dim = (kThreads % kChunks == 0 ? thread : chunk) % kChunks * 8;
      copyAsync16(rows + row * kStride + dim, from + copy * kThreads * 8);
    }
  } else {
#pragma unroll 1
    for (int chunk = thread; chunk < kKeys * kChunks; chunk += kThreads) {
      const int row = chunk / kChunks, dim = chunk % kChunks * 8;
      copyAsync16(rows + row * kStride + dim, source + list.slot(first + row) * D + dim);
    }
  }
  commitCopies();
}

// Tells a warp which rows are its own, and each lane its part of them.
template <class T, int D, class Warp>
__device__ __forceinline__ int placeWarp(Warp& warp, const TallShared<T, D>& shared) {
  const int thread = threadAnew(), firstRow = thread / 32 * 16 * kTallRowTiles;
  warp.lane = thread % 32;
  warp.queryRows = shared.queries + firstRow * shared.kStride;
  warp.rows.first = shared.rows + firstRow + warp.lane / 4;
  return firstRow;
}

// Attends to the block's tiles of sinks (kind 0) or of the ring (1).
template <class T, int D, class Warp>
__device__ __forceinline__ void walkTilesInTurn(Warp& warp, const TallShared<T, D>& shared,
                                                int kind) {
  constexpr int kKeys = tileKeys(D);
  const TallBlock<T>& block = *shared.block;
  const int begin = block.begin[kind], end = block.end[kind];
  copyRowsOf<T, D>(block.list[kind], block.list[kind].keys, begin * kKeys, shared.keys);
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    const int first = tile * kKeys;
    typename Warp::Products weights;
    waitCopies<0>();
    syncBlock();
    copyRowsOf<T, D>(block.list[kind], block.list[kind].values, first, shared.values);
    placeWarp(warp, shared);
    warp.multiplyKeys(weights, shared.keys);
    waitCopies<0>();
    syncBlock();
    if (tile + 1 < end) {
      copyRowsOf<T, D>(block.list[kind], block.list[kind].keys, first + kKeys, shared.keys);
    }
    placeWarp(warp, shared);
    warp.toLogits(weights, kind == 0, -block.span.firstRelative - first);
    if (!warp.seesAll(first, first + kKeys - 1)) warp.mask(weights, first);
    warp.softmax(weights);
    warp.multiplyValues(weights, shared.values);
  }
  syncBlock();  // the next to write there may be the queries of the ring, or the result
}

// Writes what a lane needs to know of the warp's rows for one kind of key; `firstRow` of the warp.
template <class T>
__device__ __forceinline__ void setRows(const KernelArguments& a, const TallBlock<T>& block,
                                        int firstRow, int kind, int lane, SharedRow* rows) {
  const int row = firstRow + lane, step = row % a.sequenceLength;
  const bool exists = row < block.group.rows;
  const int sinks = visibleSinks(block.past + step, a.windowSize, a.numSinkTokens);
  const KeyRange range = !(exists && step < block.real) ? noKeys()
                         : kind == 0 ? KeyRange{0, sinks - 1}
                                     : visibleRingKeys(block.span, step, a.windowLimit);
  rows[lane] = {range, exists ? slopeOf(a, block.group.head(a, row)) : 0.0f, step};
  syncWarp();
}

// grid: (B * G * rowBlocks, splits).
template <class T, int D>
__global__ void __launch_bounds__(kTallWarps * 32, 1) tilesTallKernel(const KernelArguments a) {
  using Warp = TilesWarp<T, T, D, kTallWarps, kTallRowTiles>;
  const TallShared<T, D> shared(dynamicShared());
  if (threadIdx.x == 0) *shared.block = tallBlockOf<T, D>(a);
  syncBlock();

  const TallBlock<T>& block = *shared.block;
  Warp warp(a);
  warp.clearSums();
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    if (block.begin[kind] >= block.end[kind]) continue;
    const int warpRow = placeWarp(warp, shared);
    setRows(a, block, block.group.firstRow + warpRow, kind, warp.lane, shared.rows + warpRow);
    warp.shareRanges();
    rotateTileQueries<T, D, kTallWarps, kTallRowTiles>(a, block.group, kind == 0, shared.queries);
    syncBlock();
    warp.loadQuery();
    if (!Warp::kQueryShared) syncBlock();  // tiles of keys take the queries' place
    walkTilesInTurn(warp, shared, kind);
  }

#pragma unroll
  for (int side = 0; side < Warp::kSides; ++side) {
    warp.total[side] = sumOver(warp.total[side], 1, 2);
  }
  const int warpRow = placeWarp(warp, shared);
  const RowGroup group = block.group;
  const int firstRow = group.firstRow + warpRow;
  if (a.splits > 1) {
    storePartial<T, D>(a, group, warp, firstRow, static_cast<int>(blockIdx.y));
  } else {
    storeTile<T, D>(a, group, warp, firstRow, shared.queries + warpRow * shared.kStride);
  }
}

}  // namespace lminf
