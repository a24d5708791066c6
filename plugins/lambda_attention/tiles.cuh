// prefill: many query rows. Flash attention on tensor cores, keys and values through shared memory.
//
// A block takes 16 query rows per warp of one key/value head (query heads of a group and steps lie
// in one list of rows, so a short chunk of a large group fills a tile too) and walks over the keys
// that these rows can see, sinks first, then the ring by position. Tiles of keys come in by
// cp.async, one ahead. A tile that a warp's rows see in full skips the mask; one they do not see at
// all is skipped. A ring that rounds comes in as bytes and becomes tiles of T in shared memory
// (tiles_rounded.cuh); from there on everything is the same but for the scales.
#pragma once

#include "ring.cuh"
#include "tile_shapes.h"

namespace lminf {

template <class T, class Ring, int D, int kWarps>
struct TilesWarp {
  static constexpr int kKeys = tileKeys(D);
  static constexpr int kStride = D + kRowPadding;
  static constexpr int kSteps = D / 16;  // of the product over dimensions
  static constexpr bool kQueryShared = queryStaysShared(D);

  const KernelArguments& a;
  int lane;
  std::uint32_t query[kQueryShared ? 1 : kSteps][4];
  const T* queryRows;  // shared, this warp's 16 rows
  // Rows lane / 4 and lane / 4 + 8; columns as the m16n8 accumulator has them.
  float sum[D / 8][4];
  float maximum[2], total[2];
  KeyRange range[2];
  float slope[2];
  int rowStep[2];
  KeyRange seenByAll, seenByAny;  // over the warp's rows

  __device__ __forceinline__ explicit TilesWarp(const KernelArguments& arguments)
      : a(arguments), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void loadQuery() {
    if constexpr (!kQueryShared) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) loadQueryStep(query[step], step);
    }
  }

  __device__ __forceinline__ void loadQueryStep(std::uint32_t (&word)[4], int step) const {
    loadMatrices(word, queryRows + lane % 16 * kStride + step * 16 + lane / 16 * 8);
  }

  __device__ __forceinline__ void shareRanges() {
    seenByAll = {larger(range[0].low, range[1].low), smaller(range[0].high, range[1].high)};
    seenByAny = {smaller(range[0].low, range[1].low), larger(range[0].high, range[1].high)};
    for (int mask = 4; mask <= 16; mask <<= 1) {
      seenByAll.low = larger(seenByAll.low, shuffleXor(seenByAll.low, mask));
      seenByAll.high = smaller(seenByAll.high, shuffleXor(seenByAll.high, mask));
      seenByAny.low = smaller(seenByAny.low, shuffleXor(seenByAny.low, mask));
      seenByAny.high = larger(seenByAny.high, shuffleXor(seenByAny.high, mask));
    }
  }

  // Whether some row of the warp sees one of these keys, and whether all rows see all of them.
  __device__ __forceinline__ bool seesAny(int first, int last) const {
    return first <= seenByAny.high && last >= seenByAny.low;
  }
  __device__ __forceinline__ bool seesAll(int first, int last) const {
    return first >= seenByAll.low && last <= seenByAll.high;
  }

  // Products with keys, or weights of values, times the scales of the rows of a tile.
  __device__ __forceinline__ void applyScales(float (&elements)[kKeys / 8][4],
                                              const float* scales) const {
#pragma unroll
    for (int tile = 0; tile < kKeys / 8; ++tile) {
#pragma unroll
      for (int element = 0; element < 4; ++element) {
        elements[tile][element] *= scales[tile * 8 + lane % 4 * 2 + element % 2];
      }
    }
  }

  // products[tile] = query rows times keys tile * 8 ... + 7.
  __device__ __forceinline__ void multiplyKeys(float (&products)[kKeys / 8][4], const T* keys) {
#pragma unroll
    for (int index = 0; index < kKeys / 2; ++index) products[index / 4][index % 4] = 0.0f;
    const int keyInPair = lane / 16 * 8 + lane % 8, half = lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t fragment[4];
      if constexpr (kQueryShared) loadQueryStep(fragment, step);
#pragma unroll
      for (int pair = 0; pair < kKeys / 16; ++pair) {
        std::uint32_t word[4];
        loadMatrices(word, keys + (pair * 16 + keyInPair) * kStride + step * 16 + half);
        if constexpr (kQueryShared) {
          multiplyAdd<T>(products[2 * pair], fragment, word[0], word[1]);
          multiplyAdd<T>(products[2 * pair + 1], fragment, word[2], word[3]);
        } else {
          multiplyAdd<T>(products[2 * pair], query[step], word[0], word[1]);
          multiplyAdd<T>(products[2 * pair + 1], query[step], word[2], word[3]);
        }
      }
    }
  }

  // Products become logits in units of log2; `distance0` is the distance of key 0 of the tile from
  // step 0, or unused for sinks.
  __device__ __forceinline__ void toLogits(float (&products)[kKeys / 8][4], bool isSink,
                                           int distance0) const {
    if (a.softcap > 0.0f) {
#pragma unroll
      for (int index = 0; index < kKeys / 2; ++index) {
        float& element = products[index / 4][index % 4];
        element = softCapped(element * a.scale, a.softcap) * kLog2E;
      }
    } else {
      const float scale = a.scale * kLog2E;
#pragma unroll
      for (int index = 0; index < kKeys / 2; ++index) products[index / 4][index % 4] *= scale;
    }
    if (a.alibiSlopes == nullptr) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float bias = slope[side] * kLog2E;
      if (bias == 0.0f) continue;
      const float nearest = static_cast<float>(rowStep[side] + distance0 - lane % 4 * 2);
#pragma unroll
      for (int tile = 0; tile < kKeys / 8; ++tile) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float distance = isSink ? a.limitDistance : nearest - (tile * 8 + column);
          products[tile][2 * side + column] -= bias * distance;
        }
      }
    }
  }

  __device__ __forceinline__ void mask(float (&logits)[kKeys / 8][4], int firstKey) const {
#pragma unroll
    for (int tile = 0; tile < kKeys / 8; ++tile) {
#pragma unroll
      for (int element = 0; element < 4; ++element) {
        const int number = firstKey + tile * 8 + lane % 4 * 2 + element % 2;
        const KeyRange seen = range[element / 2];
        if (number < seen.low || number > seen.high) logits[tile][element] = -INFINITY;
      }
    }
  }

  // Logits become weights; what has been summed is rescaled. Totals stay per lane until the end.
  __device__ __forceinline__ void softmax(float (&logits)[kKeys / 8][4]) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float top = maximum[side];
#pragma unroll
      for (int tile = 0; tile < kKeys / 8; ++tile) {
        top = fmaxf(top, fmaxf(logits[tile][2 * side], logits[tile][2 * side + 1]) -
                             weightShift<T, Ring>());
      }
      top = maximumOver(top, 1, 2);
      const float base = finiteMaximum(top);
      const float carried = exp2Fast(maximum[side] - base);
      maximum[side] = top;
      float added = 0.0f;
#pragma unroll
      for (int index = 0; index < kKeys / 4; ++index) {
        float& weight = logits[index / 2][2 * side + index % 2];
        weight = exp2Fast(weight - base);
        added += weight;
      }
      total[side] = total[side] * carried + added;
#pragma unroll
      for (int tile = 0; tile < D / 8; ++tile) {
        sum[tile][2 * side] *= carried;
        sum[tile][2 * side + 1] *= carried;
      }
    }
  }

  // sum += weights times values.
  __device__ __forceinline__ void multiplyValues(const float (&weights)[kKeys / 8][4],
                                                 const T* values) {
    const int keyInStep = lane % 16, half = lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      const float (&low)[4] = weights[2 * step];
      const float (&high)[4] = weights[2 * step + 1];
      const std::uint32_t fragment[4] = {packPair<T>(low[0], low[1]), packPair<T>(low[2], low[3]),
                                         packPair<T>(high[0], high[1]),
                                         packPair<T>(high[2], high[3])};
#pragma unroll
      for (int pair = 0; pair < D / 16; ++pair) {
        std::uint32_t word[4];
        loadMatricesTransposed(word, values + (step * 16 + keyInStep) * kStride + pair * 16 + half);
        multiplyAdd<T>(sum[2 * pair], fragment, word[0], word[1]);
        multiplyAdd<T>(sum[2 * pair + 1], fragment, word[2], word[3]);
      }
    }
  }
};

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
template <class T, int D, int kWarps>
__device__ __forceinline__ void rotateTileQueries(const KernelArguments& a, const RowGroup& group,
                                                  bool isSink, T* rows) {
  constexpr int kStride = D + kRowPadding, kRows = kWarps * 16, kChunks = D / 8;
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
template <class T, class Ring, int D, int kWarps>
__device__ __forceinline__ void walkTiles(TilesWarp<T, Ring, D, kWarps>& warp,
                                          const KeyList<T>& list, int begin, int end, bool isSink,
                                          int firstRelative, T* stages) {
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
      float weights[kKeys / 8][4];
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
template <class T, class Ring, int D, int kWarps>
__device__ __forceinline__ void storeTile(const KernelArguments& a, const RowGroup& group,
                                          const TilesWarp<T, Ring, D, kWarps>& warp, int firstRow,
                                          T* staged) {
  constexpr int kStride = D + kRowPadding;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = firstRow + warp.lane / 4 + 8 * side;
    const float factor = row < group.rows ? softmaxFactor(a, group.head(a, row), warp.maximum[side],
                                                          warp.total[side])
                                          : 0.0f;
    T* to = staged + (warp.lane / 4 + 8 * side) * kStride + warp.lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < D / 8; ++tile) {
      const std::uint32_t word =
          packPair<T>(warp.sum[tile][2 * side] * factor, warp.sum[tile][2 * side + 1] * factor);
      storeWords<1>(to + tile * 8, {{word}});
    }
  }
  syncWarp();
  T* output = static_cast<T*>(a.output) + (group.offset + firstRow) * D;
  for (int chunk = warp.lane; chunk < 16 * (D / 8); chunk += 32) {
    const int row = chunk / (D / 8), dim = chunk % (D / 8) * 8;
    if (firstRow + row >= group.rows) break;
    Words<4> words;
    loadShared(words.word, staged + row * kStride + dim);
    storeWords<4>(output + row * D + dim, words);
  }
}

// Writes the warp's rows of one split: sums, maxima and totals as they are.
template <class T, class Ring, int D, int kWarps>
__device__ __forceinline__ void storePartial(const KernelArguments& a, const RowGroup& group,
                                             const TilesWarp<T, Ring, D, kWarps>& warp,
                                             int firstRow, int split) {
  const std::int64_t allRows =
      static_cast<std::int64_t>(a.batchSize) * a.numKvHeads * a.group * a.sequenceLength;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = firstRow + warp.lane / 4 + 8 * side;
    if (row >= group.rows) continue;
    const std::int64_t part = split * allRows + group.offset + row;
    float* to = a.partialOutput + part * D + warp.lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < D / 8; ++tile) {
      to[tile * 8] = warp.sum[tile][2 * side];
      to[tile * 8 + 1] = warp.sum[tile][2 * side + 1];
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
