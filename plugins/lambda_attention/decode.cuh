// decode: few query rows, many keys. Split-K flash decoding on tensor cores without shared memory.
//
// The product is turned around: keys are the 16 rows of the mma, query rows its 8 columns, so up to
// 8 query heads of a group cost what one costs and each key is loaded once for all of them. Keys
// and values go from global memory straight into mma fragments. That works because a dot product
// does not care in which order its dimensions come, nor a sum over keys: each lane takes 16
// contiguous bytes and calls them the dimensions its fragment holds, and the query is read with the
// same renaming. docs/kernels.md draws it.
//
// Every warp runs alone over its tiles of 16 keys: nothing to wait for, loads of the next keys
// and this tile's values are under way while it computes.
#pragma once

#include "append.cuh"
#include "combine_last.cuh"
#include "decode_warp.cuh"

namespace lminf {

// Adds up the warps' results of one block and writes output, or one split's part of it.
template <class T, int D, int kRows>
__device__ __forceinline__ void mergeWarps(const KernelArguments& a, const RowGroup& group,
                                           const float* results, int split) {
  constexpr int kStride = D + kMergeRowPadding;
  constexpr int kResult = kRows * (kStride + 2);
  const std::int64_t allRows =
      static_cast<std::int64_t>(a.batchSize) * a.numKvHeads * a.group * a.sequenceLength;
  const int rows = smaller(kRows, group.rows - group.firstRow);
  for (int element = static_cast<int>(threadIdx.x); element < rows * D;
       element += kDecodeWarps * 32) {
    const int row = element / D, dim = element % D;
    float maximum = -INFINITY;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      maximum = fmaxf(maximum, results[warp * kResult + kRows * kStride + 2 * row]);
    }
    const float top = finiteMaximum(maximum);
    float sum = 0.0f, total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      const float* result = results + warp * kResult;
      const float weight = exp2Fast(result[kRows * kStride + 2 * row] - top);
      sum += weight * result[row * kStride + dim];
      total += weight * result[kRows * kStride + 2 * row + 1];
    }
    const std::int64_t at = group.offset + group.firstRow + row;
    if (a.splits == 1) {
      const float factor = softmaxFactor(a, group.head(a, group.firstRow + row), maximum, total);
      static_cast<T*>(a.output)[at * D + dim] = fromFloat<T>(sum * factor);
      continue;
    }
    const std::int64_t part = split * allRows + at;
    a.partialOutput[part * D + dim] = sum;
    if (dim == 0) {
      a.partialStats[part * 2] = maximum;
      a.partialStats[part * 2 + 1] = total;
    }
  }
}

// A part of the block's query rows on its way to shared memory, rotated for each kind of key. A
// thread keeps to one dimension of its rows, so that it finds the dimension's partner once.
template <class T, int D, int kRows>
struct QueryPart {
  static constexpr int kThreads = kDecodeWarps * 32;
  static constexpr int kColumns = smaller(D, kThreads);
  static constexpr int kRowsAtOnce = kThreads / kColumns;
  static constexpr int kOwn = kRows / kRowsAtOnce;                // rows of a thread
  static constexpr int kAtOnce = D > 128 ? 4 : smaller(kOwn, 8);  // beside the keys under way
  static constexpr int kBatches = kOwn / kAtOnce;
  static constexpr int kParts = D / kColumns * kBatches;

  T element[kAtOnce], partner[kAtOnce];
  float cos[kAtOnce], sin[kAtOnce];
  float limitCos, limitSin, sign;

  static __device__ __forceinline__ bool takesPart() {
    return static_cast<int>(threadIdx.x) < kColumns * kRowsAtOnce;
  }
  static __device__ __forceinline__ int dimension(int part) {
    return static_cast<int>(threadIdx.x) % kColumns + part / kBatches * kColumns;
  }
  static __device__ __forceinline__ int row(int part, int index) {
    const int own = part % kBatches * kAtOnce + index;
    return static_cast<int>(threadIdx.x) / kColumns + own * kRowsAtOnce;
  }

  __device__ __forceinline__ void load(const KernelArguments& a, const RowGroup& group, int part) {
    const int dim = dimension(part), rows = smaller(kRows, group.rows - group.firstRow);
    const T* query = static_cast<const T*>(a.query) + (group.offset + group.firstRow) * D;
    const bool turns = dim < a.rotaryDim;
    const RotaryPair pair = rotaryPair(dim, a.rotaryDim, a.rotaryInterleaved);
    sign = pair.sign;
    limitCos = turns ? a.limitCos[pair.pair] : 1.0f;
    limitSin = turns ? a.limitSin[pair.pair] : -0.0f;
#pragma unroll
    for (int index = 0; index < kAtOnce; ++index) {
      const int at = row(part, index);
      element[index] = partner[index] = T{};
      cos[index] = 1.0f;
      sin[index] = -0.0f;
      if (!takesPart() || at >= rows) continue;
      element[index] = query[at * D + dim];
      if (!turns) continue;
      const std::int64_t table =
          cosRow(a, group.batch, (group.firstRow + at) % a.sequenceLength) + pair.pair;
      partner[index] = query[at * D + pair.partner];
      cos[index] = a.cos[table];
      sin[index] = a.sin[table];
    }
  }

  __device__ __forceinline__ void store(int part, T* sinkRows, T* ringRows) const {
    constexpr int kStride = D + kRowPadding;
    if (!takesPart()) return;
#pragma unroll
    for (int index = 0; index < kAtOnce; ++index) {
      const int to = row(part, index) * kStride + dimension(part);
      const float own = toFloat(element[index]), other = sign * toFloat(partner[index]);
      sinkRows[to] = fromFloat<T>(own * limitCos + other * limitSin);
      ringRows[to] = fromFloat<T>(own * cos[index] + other * sin[index]);
    }
  }
};

// grid: (B * G * rowBlocks, splits).
template <class T, class Ring, int D, int kRowTiles>
__global__ void __launch_bounds__(kDecodeWarps * 32, decodeBlocksPerMultiprocessor(D, kRowTiles))
    decodeKernel(const KernelArguments a) {
  constexpr int kRows = kRowTiles * 8;
  // Rings of bytes leave no registers for values a tile ahead, beside what bytes become.
  constexpr bool kValuesAhead = !isRounded<T, Ring>();
  const int warpNumber = static_cast<int>(threadIdx.x / 32);
  const RowGroup group(a, blockIdx.x, kRows);
  const std::int64_t past = a.pastLength[group.batch];
  const int real = realTokens(a.newLength[group.batch], a.sequenceLength);
  // Where this kernel appends, the blocks of the last split do: they read the new key's tile, if
  // anybody does (splitBegin). No other block looks at that slot.
  const int split = static_cast<int>(blockIdx.y);
  const bool appends = a.appendsInDecode && split == a.splits - 1;
  const std::int64_t pair = static_cast<std::int64_t>(group.batch) * a.numKvHeads + group.kvHead;

  DecodeWarp<T, Ring, D, kRowTiles> warp(a);
  warp.sinkOffset = pair * a.sinkSlots * D;
  warp.scaleOffset = pair * a.capacity;
  warp.ringOffset = pair * a.capacity * D;
  const KeySpan span =
      keySpan(past, real, 0, a.sequenceLength - 1, a.windowSize, a.numSinkTokens, a.capacity);
  warp.sinkCount = span.sinkCount;
  warp.ringCount = span.ringCount;
  warp.firstSlot = span.firstSlot;
  warp.sinkTiles = ceilDiv(span.sinkCount, kDecodeKeys);
  const int tiles = warp.sinkTiles + ceilDiv(span.ringCount, kDecodeKeys);
  const int begin = splitBegin(tiles, split, a.splits);
  const int end = splitBegin(tiles, split + 1, a.splits);
  int tile = begin + warpNumber;
  letNextStart();
  if (!a.appendsInDecode) waitForPrevious();
  // The first keys and values are on their way while the query is rotated; not the new ones.
  const bool early = tile < end && !(appends && tile == tiles - 1);
  if (early) {
    warp.loadKeys(tile);
    if constexpr (kValuesAhead) warp.loadValues(tile);
  }
  if (appends && warpNumber == kDecodeWarps - 1) {
    appendToken<T, Ring, D>(a, group.batch, group.kvHead, 0, static_cast<int>(threadIdx.x % 32));
  }

#pragma unroll
  for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int row = group.firstRow + rowTile * 8 + 2 * warp.inQuad + column;
      const int step = row % a.sequenceLength;
      const bool sees = row < group.rows && step < real;
      warp.distance0[rowTile][column] = sees ? step - span.firstRelative : -1;
      warp.slope[rowTile][column] = row < group.rows ? slopeOf(a, group.head(a, row)) : 0.0f;
      warp.lastSink[rowTile][column] =
          sees ? visibleSinks(past + step, a.windowSize, a.numSinkTokens) - 1 : -1;
      warp.maximum[rowTile][column] = -INFINITY;
      warp.total[rowTile][column] = 0.0f;
    }
#pragma unroll
    for (int part = 0; part < D / 16; ++part) {
#pragma unroll
      for (int element = 0; element < 4; ++element) warp.sum[rowTile][part][element] = 0.0f;
    }
  }

  T* sinkRows = reinterpret_cast<T*>(dynamicShared());
  T* ringRows = sinkRows + kRows * (D + kRowPadding);
#pragma unroll 1
  for (int part = 0; part < QueryPart<T, D, kRows>::kParts; ++part) {
    QueryPart<T, D, kRows> queries;
    queries.load(a, group, part);
    queries.store(part, sinkRows, ringRows);
  }
  syncBlock();

  if (tile < end && !early) {
    warp.loadKeys(tile);
    if constexpr (kValuesAhead) warp.loadValues(tile);
  }
  bool holdsSinkQuery = tile < warp.sinkTiles;
  warp.loadQuery(holdsSinkQuery ? sinkRows : ringRows);
  while (tile < end) {
    if (holdsSinkQuery && tile >= warp.sinkTiles) {
      holdsSinkQuery = false;
      warp.loadQuery(ringRows);
    }
    const int next = tile + kDecodeWarps;
    float weights[kRowTiles][4];
    if constexpr (!kValuesAhead) warp.loadValues(tile);
    warp.multiplyKeys(tile, weights);
    if (next < end) warp.loadKeys(next);
#pragma unroll
    for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
      warp.softmax(tile, weights[rowTile], rowTile);
    }
    warp.multiplyValues(tile, weights);
    if constexpr (kValuesAhead) {
      if (next < end) warp.loadValues(next);
    }
    tile = next;
  }

  syncBlock();  // the results take the place of the queries
  float* results = reinterpret_cast<float*>(dynamicShared());
  constexpr int kResult = kRows * (D + kMergeRowPadding + 2);
  // At D = 256 no register is left that would remember through the loop how many rows are real.
  const int stored = queryStaysShared(D) ? kRows : group.rows - group.firstRow;
  warp.storeResult(results + warpNumber * kResult, stored);
  syncBlock();
  // The group is made again, twice, rather than remembered: at D = 256 no register is left through
  // the loop for what both have in common.
  mergeWarps<T, D, kRows>(a, RowGroup(a, blockIdx.x, kRows), results, split);
  if (a.arrivals != nullptr) {
    combineInLastBlock<T, D, kRows>(a, RowGroup(a, blockIdx.x, kRows));
  }
}

}  // namespace lminf
