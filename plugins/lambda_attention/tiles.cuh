// prefill: many query rows. Flash attention on tensor cores, keys and values through shared memory.
//
// A block takes 16 or 32 query rows per warp of one key/value head (query heads of a group and
// steps lie in one list of rows, so a short chunk of a large group fills a tile too) and walks over
// the keys that these rows can see, sinks first, then the ring by position. Tiles of keys come in
// by cp.async, one ahead. A tile that a warp's rows see in full skips the mask; one they do not see
// at all is skipped. A ring that rounds comes in as bytes and becomes tiles of T in shared memory
// (tiles_rounded.cuh); from there on everything is the same but for the scales.
#pragma once

#include "tiles_warp.cuh"

namespace lminf {

// A list of keys (sinks, or ring) as one block walks over it.
template <class Element>
struct KeyList {
  const Element* keys;
  const Element* values;
  int count;
  int firstSlot;
  int capacity;

  __device__ __forceinline__ int slot(int number) const {
    return ringSlot(firstSlot, smaller(number, count - 1), capacity);
  }
};

// Starts copying keys first ... first + kKeys - 1 and their values to shared rows. Behind the last
// key it is repeated; the mask drops the repetitions.
template <class T, int D, int kWarps>
__device__ __forceinline__ void copyTile(const KeyList<T>& list, int first, T* keys, T* values) {
  constexpr int kKeys = tileKeys(D), kStride = D + kRowPadding, kChunks = D / 8;
  for (int chunk = static_cast<int>(threadIdx.x); chunk < kKeys * kChunks; chunk += kWarps * 32) {
    const int row = chunk / kChunks, dim = chunk % kChunks * 8;
    const int from = list.slot(first + row) * D + dim;
    copyAsync16(keys + row * kStride + dim, list.keys + from);
    copyAsync16(values + row * kStride + dim, list.values + from);
  }
}

// Rotates the block's query rows for one kind of key into shared rows, 8 dimensions at a time.
template <class T, int D, int kWarps, int kRowTiles>
__device__ __forceinline__ void rotateTileQueries(const KernelArguments& a, const RowGroup& group,
                                                  bool isSink, T* rows) {
  constexpr int kStride = D + kRowPadding, kRows = kWarps * 16 * kRowTiles, kChunks = D / 8;
  const T* query = static_cast<const T*>(a.query) + (group.offset + group.firstRow) * D;
  const int count = smaller(kRows, group.rows - group.firstRow);
  const float* cosRows = isSink ? a.limitCos : a.cos + cosRow(a, group.batch, 0);
  const float* sinRows = isSink ? a.limitSin : a.sin + cosRow(a, group.batch, 0);
  const int pairs = isSink ? 0 : a.rotaryDim / 2;  // every row turns by the limit's one row
#pragma unroll 1
  for (int chunk = static_cast<int>(threadIdx.x); chunk < kRows * kChunks; chunk += kWarps * 32) {
    const int row = chunk / kChunks, dim = chunk % kChunks * 8;
    Words<4> words{};
    if (row < count) {
      const T* source = query + row * D;
      const std::int64_t table =
          static_cast<std::int64_t>((group.firstRow + row) % a.sequenceLength) * pairs;
      RotaryElement<T> loaded[8];
#pragma unroll
      for (int element = 0; element < 8; ++element) {
        loaded[element].load(source, dim + element, cosRows + table, sinRows + table, a.rotaryDim,
                             a.rotaryInterleaved);
      }
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        words.word[word] = packPair<T>(loaded[2 * word].rotated(), loaded[2 * word + 1].rotated());
      }
    }
    storeWords<4>(rows + row * kStride + dim, words);
  }
}

// Attends to tiles begin ... end - 1 of one list of keys.
template <class T, int D, int kWarps, class Warp>
__device__ __forceinline__ void walkTiles(Warp& warp, const KeyList<T>& list, int begin, int end,
                                          bool isSink, int firstRelative, T* stages) {
  constexpr int kKeys = tileKeys(D), kTile = kKeys * (D + kRowPadding);
  copyTile<T, D, kWarps>(list, begin * kKeys, stages, stages + kTile);
  commitCopies();
  for (int tile = begin; tile < end; ++tile) {
    T* keys = stages + (tile - begin) % 2 * 2 * kTile;
    if (tile + 1 < end) {
      T* next = stages + (tile + 1 - begin) % 2 * 2 * kTile;
      copyTile<T, D, kWarps>(list, (tile + 1) * kKeys, next, next + kTile);
    }
    commitCopies();
    waitCopies<1>();
    syncBlock();
    const int first = tile * kKeys, last = first + kKeys - 1;
    if (warp.seesAny(first, last)) {
      typename Warp::Products weights;
      warp.multiplyKeys(weights, keys);
      warp.toLogits(weights, isSink, -firstRelative - first);
      if (!warp.seesAll(first, last)) warp.mask(weights, first);
      warp.softmax(weights);
      warp.multiplyValues(weights, keys + kTile);
    }
    syncBlock();
  }
}

// Writes the warp's rows of output through shared memory, 16 bytes at a time.
template <class T, int D, class Warp>
__device__ __forceinline__ void storeTile(const KernelArguments& a, const RowGroup& group,
                                          const Warp& warp, int firstRow, T* staged) {
  constexpr int kStride = D + kRowPadding;
#pragma unroll
  for (int side = 0; side < Warp::kSides; ++side) {
    const int row = firstRow + warp.lane / 4 + 8 * side;
    const float factor = row < group.rows ? softmaxFactor(a, group.head(a, row), warp.maximum[side],
                                                          warp.total[side])
                                          : 0.0f;
    T* to = staged + (warp.lane / 4 + 8 * side) * kStride + warp.lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < D / 8; ++tile) {
      const float (&sum)[4] = warp.sum[side / 2][tile];
      const int first = side % 2 * 2;
      const std::uint32_t word = packPair<T>(sum[first] * factor, sum[first + 1] * factor);
      storeWords<1>(to + tile * 8, {{word}});
    }
  }
  syncWarp();
  T* output = static_cast<T*>(a.output) + (group.offset + firstRow) * D;
  for (int chunk = warp.lane; chunk < 8 * Warp::kSides * (D / 8); chunk += 32) {
    const int row = chunk / (D / 8), dim = chunk % (D / 8) * 8;
    if (firstRow + row >= group.rows) break;
    Words<4> words;
    loadShared(words.word, staged + row * kStride + dim);
    storeWords<4>(output + row * D + dim, words);
  }
}

// Writes the warp's rows of one split: sums, maxima and totals as they are.
template <class T, int D, class Warp>
__device__ __forceinline__ void storePartial(const KernelArguments& a, const RowGroup& group,
                                             const Warp& warp, int firstRow, int split) {
  const std::int64_t allRows =
      static_cast<std::int64_t>(a.batchSize) * a.numKvHeads * a.group * a.sequenceLength;
#pragma unroll
  for (int side = 0; side < Warp::kSides; ++side) {
    const int row = firstRow + warp.lane / 4 + 8 * side;
    if (row >= group.rows) continue;
    const std::int64_t part = split * allRows + group.offset + row;
    float* to = a.partialOutput + part * D + warp.lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < D / 8; ++tile) {
      to[tile * 8] = warp.sum[side / 2][tile][side % 2 * 2];
      to[tile * 8 + 1] = warp.sum[side / 2][tile][side % 2 * 2 + 1];
    }
    if (warp.lane % 4 == 0) {
      a.partialStats[part * 2] = warp.maximum[side];
      a.partialStats[part * 2 + 1] = warp.total[side];
    }
  }
}

// The sinks that some row of a block sees, and its keys in the ring.
template <class T, int D>
__device__ __forceinline__ KeyList<T> sinkList(const KernelArguments& a, const KeySpan& span,
                                               std::int64_t pair) {
  const std::int64_t head = pair * a.sinkSlots * D;
  return {static_cast<const T*>(a.presentSinkKey) + head,
          static_cast<const T*>(a.presentSinkValue) + head, span.sinkCount, 0, a.sinkSlots};
}
template <class Ring, int D>
__device__ __forceinline__ KeyList<Ring> ringList(const KernelArguments& a, const KeySpan& span,
                                                  std::int64_t pair) {
  const std::int64_t head = pair * a.capacity * D;
  return {static_cast<const Ring*>(a.presentKey) + head,
          static_cast<const Ring*>(a.presentValue) + head, span.ringCount, span.firstSlot,
          a.capacity};
}

}  // namespace lminf
