// One warp of decode: loads of keys and values, products, softmax (decode.cuh says why so).
#pragma once

#include "ring.cuh"
#include "tile_shapes.h"

namespace lminf {

// One warp's state. The head dimension lies in blocks: for keys 32 dimensions, 8 in each lane of a
// quad; for values 64 dimensions, 8 for each of the 8 quads. What D = 80 and 96 leave over is a
// narrower last block ("rest"); the values of D = 32 are nothing but one.
template <class T, class Ring, int D, int kRowTiles>
struct DecodeWarp {
  static_assert(D <= kLargestDoubledHeadDim || D % 64 == 0, "large heads have whole blocks only");
  static constexpr int kKeyBlocks = D / 32, kKeyRest = D % 32 / 4;      // rest: 0 or 4 elements
  static constexpr int kValueBlocks = D / 64, kValueRest = D % 64 / 8;  // rest: 0, 2 or 4 elements
  static constexpr int kRows = kRowTiles * 8;
  static constexpr int kQueryStride = D + kRowPadding;
  static constexpr int kResultStride = D + kMergeRowPadding;

  const KernelArguments& a;
  int quad, inQuad;                     // lane = 4 * quad + inQuad
  std::int64_t sinkOffset, ringOffset;  // of this key/value head, in elements
  std::int64_t scaleOffset;             // the same of its scales
  int sinkCount, ringCount, firstSlot, sinkTiles;
  // Of rows 2 * inQuad and + 1: the last sink they see, the distance to ring key 0; -1 for padding.
  int lastSink[kRowTiles][2];
  int distance0[kRowTiles][2];
  float slope[kRowTiles][2];

  // Fragments. key[...][0] is key `quad` of the tile, key[...][1] key quad + 8.
  Packed<8> key[kKeyBlocks][2];
  Packed<kKeyRest ? kKeyRest : 2> keyRest[2];
  // Of a ring that rounds: the scales of keys quad and quad + 8, and of their values.
  static constexpr bool kRounded = isRounded<T, Ring>();
  float keyScale[2], valueScale[2];
  // Keys 2 * inQuad, + 1, + 8, + 9 of the tile.
  Packed<8> value[kValueBlocks ? kValueBlocks : 1][4];
  Packed<kValueRest ? kValueRest : 2> valueRest[4];
  // At D = 256 the query does not fit into registers beside keys and values: it stays shared.
  static constexpr bool kQueryShared = queryStaysShared(D);
  const T* queryRows;
  Packed<8> query[kRowTiles][kQueryShared ? 1 : kKeyBlocks];
  Packed<kKeyRest ? kKeyRest : 2> queryRest[kRowTiles];

  // Results: columns are rows 2 * inQuad and + 1 of each tile of query rows.
  float sum[kRowTiles][D / 16][4];
  float maximum[kRowTiles][2], total[kRowTiles][2];

  __device__ __forceinline__ explicit DecodeWarp(const KernelArguments& arguments)
      : a(arguments), quad(threadIdx.x % 32 / 4), inQuad(threadIdx.x % 4) {}

  // Where the rows of one kind of key lie: sinks are a ring that never wraps.
  template <class Element>
  struct Rows {
    const Element* start;
    int last, firstSlot, capacity;

    // Slot of a numbered key or value. Behind the last one it is repeated; the mask drops those.
    __device__ __forceinline__ int slot(int number) const {
      return ringSlot(firstSlot, smaller(number, last), capacity);
    }
    __device__ __forceinline__ const Element* row(int number) const {
      return start + slot(number) * D;
    }
  };

  __device__ __forceinline__ Rows<T> rowsOf(bool isSink, const void* sinks,
                                            const void* ring) const {
    return {isSink ? static_cast<const T*>(sinks) + sinkOffset
                   : static_cast<const T*>(ring) + ringOffset,
            (isSink ? sinkCount : ringCount) - 1, isSink ? 0 : firstSlot,
            isSink ? sinkCount : a.capacity.value};
  }
  __device__ __forceinline__ Rows<Ring> byteRows(const void* ring) const {
    return {static_cast<const Ring*>(ring) + ringOffset, ringCount - 1, firstSlot, a.capacity};
  }

  __device__ __forceinline__ int firstKey(int tile) const {
    return (tile < sinkTiles ? tile : tile - sinkTiles) * kDecodeKeys;
  }

  // Bytes stay as they are until they are multiplied; sinks are of T in every ring.
  __device__ __forceinline__ void loadKeys(int tile) {
    if constexpr (kRounded) {
      keyScale[0] = keyScale[1] = 1.0f;
      if (tile >= sinkTiles) {
        loadKeyBytes(tile);
        return;
      }
    }
    const Rows<T> rows = rowsOf(tile < sinkTiles, a.presentSinkKey, a.presentKey);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const T* row = rows.row(firstKey(tile) + quad + 8 * side);
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block) {
        key[block][side] = loadStreamed<8>(row + block * 32 + inQuad * 8);
      }
      if constexpr (kKeyRest > 0) {
        keyRest[side] = loadStreamed<kKeyRest>(row + kKeyBlocks * 32 + inQuad * kKeyRest);
      }
    }
  }

  __device__ __forceinline__ void loadKeyBytes(int tile) {
    const Rows<Ring> rows = byteRows(a.presentKey);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int number = firstKey(tile) + quad + 8 * side;
      const Ring* row = rows.row(number);
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block) {
        key[block][side] = loadStreamedBytes<8>(row + block * 32 + inQuad * 8);
      }
      if constexpr (kKeyRest > 0) {
        keyRest[side] = loadStreamedBytes<kKeyRest>(row + kKeyBlocks * 32 + inQuad * kKeyRest);
      }
      keyScale[side] = a.presentKeyScale[scaleOffset + rows.slot(number)];
    }
  }

  __device__ __forceinline__ void loadValueBytes(int tile) {
    const Rows<Ring> rows = byteRows(a.presentValue);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const Ring* row = rows.row(firstKey(tile) + 2 * inQuad + (part & 1) + (part & 2) * 4);
#pragma unroll
      for (int block = 0; block < kValueBlocks; ++block) {
        value[block][part] = loadStreamedBytes<8>(row + block * 64 + quad * 8);
      }
      if constexpr (kValueRest > 0) {
        valueRest[part] =
            loadStreamedBytes<kValueRest>(row + kValueBlocks * 64 + quad * kValueRest);
      }
    }
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      valueScale[side] =
          a.presentValueScale[scaleOffset + rows.slot(firstKey(tile) + quad + 8 * side)];
    }
  }

  // Bytes become elements of T, in the same registers.
  __device__ __forceinline__ void expandKeys() {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block) expandBytes<T>(key[block][side]);
      if constexpr (kKeyRest > 0) expandBytes<T>(keyRest[side]);
    }
  }
  __device__ __forceinline__ void expandValues() {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
#pragma unroll
      for (int block = 0; block < kValueBlocks; ++block) expandBytes<T>(value[block][part]);
      if constexpr (kValueRest > 0) expandBytes<T>(valueRest[part]);
    }
  }

  __device__ __forceinline__ void loadValues(int tile) {
    if constexpr (kRounded) {
      valueScale[0] = valueScale[1] = 1.0f;
      if (tile >= sinkTiles) {
        loadValueBytes(tile);
        return;
      }
    }
    const Rows<T> rows = rowsOf(tile < sinkTiles, a.presentSinkValue, a.presentValue);
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const T* row = rows.row(firstKey(tile) + 2 * inQuad + (part & 1) + (part & 2) * 4);
#pragma unroll
      for (int block = 0; block < kValueBlocks; ++block) {
        value[block][part] = loadStreamed<8>(row + block * 64 + quad * 8);
      }
      if constexpr (kValueRest > 0) {
        valueRest[part] = loadStreamed<kValueRest>(row + kValueBlocks * 64 + quad * kValueRest);
      }
    }
  }

  __device__ __forceinline__ const T* queryRow(int rowTile) const {
    return queryRows + (rowTile * 8 + quad) * kQueryStride;
  }

  // Takes the query fragments of one kind from shared rows.
  __device__ __forceinline__ void loadQuery(const T* rows) {
    queryRows = rows;
    if constexpr (!kQueryShared) {
#pragma unroll
      for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
        const T* row = queryRow(rowTile);
#pragma unroll
        for (int block = 0; block < kKeyBlocks; ++block) {
          loadShared(query[rowTile][block].word, row + block * 32 + inQuad * 8);
        }
        if constexpr (kKeyRest > 0) {
          loadShared(queryRest[rowTile].word, row + kKeyBlocks * 32 + inQuad * kKeyRest);
        }
      }
    }
  }

  // products[rowTile]: keys quad (elements 0, 1) and quad + 8 (2, 3) times rows 2 * inQuad, + 1.
  __device__ __forceinline__ void multiplyKeys(int tile, float (&products)[kRowTiles][4]) {
    if constexpr (kRounded) {
      if (tile >= sinkTiles) expandKeys();
    }
#pragma unroll
    for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
#pragma unroll
      for (int element = 0; element < 4; ++element) products[rowTile][element] = 0.0f;
#pragma unroll
      for (int block = 0; block < kKeyBlocks; ++block) {
        Packed<8> words;
        if constexpr (kQueryShared) {
          loadShared(words.word, queryRow(rowTile) + block * 32 + inQuad * 8);
        } else {
          words = query[rowTile][block];
        }
        multiplyPairs<4>(products[rowTile], key[block][0].word, key[block][1].word, words.word);
      }
      if constexpr (kKeyRest > 0) {
        multiplyPairs<2>(products[rowTile], keyRest[0].word, keyRest[1].word,
                         queryRest[rowTile].word);
      }
      if constexpr (kRounded) {
#pragma unroll
        for (int element = 0; element < 4; ++element) {
          products[rowTile][element] *= keyScale[element / 2];
        }
      }
    }
  }

  template <int words>
  static __device__ __forceinline__ void multiplyPairs(float (&product)[4],
                                                       const std::uint32_t* low,
                                                       const std::uint32_t* high,
                                                       const std::uint32_t* queryWord) {
#pragma unroll
    for (int word = 0; word < words; word += 2) {
      const std::uint32_t fragment[4] = {low[word], high[word], low[word + 1], high[word + 1]};
      multiplyAdd<T>(product, fragment, queryWord[word], queryWord[word + 1]);
    }
  }

  // Turns products into weights and rescales what has been summed.
  __device__ __forceinline__ void softmax(int tile, float (&weights)[4], int rowTile) {
    const bool isSink = tile < sinkTiles;
    const int first = firstKey(tile) + quad;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      float top = maximum[rowTile][column];
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int number = first + 8 * side;
        float& weight = weights[2 * side + column];
        const int distance = distance0[rowTile][column] - number;
        const bool seen = isSink ? number <= lastSink[rowTile][column]
                                 : distance >= 0 && distance < a.windowLimit;
        const float logit = scaledLogit(weight, a, slope[rowTile][column],
                                        isSink ? a.limitDistance : static_cast<float>(distance));
        weight = seen ? logit : -INFINITY;
        top = fmaxf(top, weight - weightShift<T, Ring>());
      }
      top = maximumOver(top, 4, 16);
      const float base = finiteMaximum(top);
      const float carried = exp2Fast(maximum[rowTile][column] - base);
      maximum[rowTile][column] = top;
      weights[column] = exp2Fast(weights[column] - base);
      weights[column + 2] = exp2Fast(weights[column + 2] - base);
      total[rowTile][column] =
          total[rowTile][column] * carried + weights[column] + weights[column + 2];
#pragma unroll
      for (int part = 0; part < D / 16; ++part) {
        sum[rowTile][part][column] *= carried;
        sum[rowTile][part][column + 2] *= carried;
      }
    }
  }

  // sum += values (as rows: dimensions) times weights (as columns: query rows).
  __device__ __forceinline__ void multiplyValues(int tile, float (&weights)[kRowTiles][4]) {
    if constexpr (kRounded) {
      if (tile >= sinkTiles) expandValues();
    }
    std::uint32_t weightWord[kRowTiles][2];
#pragma unroll
    for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
      float (&w)[4] = weights[rowTile];
      if constexpr (kRounded) {
#pragma unroll
        for (int element = 0; element < 4; ++element) w[element] *= valueScale[element / 2];
      }
      weightWord[rowTile][0] = transposeMatrix(packPair<T>(w[0], w[1]));
      weightWord[rowTile][1] = transposeMatrix(packPair<T>(w[2], w[3]));
    }
#pragma unroll
    for (int block = 0; block < kValueBlocks; ++block) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        addValues(block * 4 + word, value[block][0].word[word], value[block][1].word[word],
                  value[block][2].word[word], value[block][3].word[word], weightWord);
      }
    }
    if constexpr (kValueRest > 0) {
#pragma unroll
      for (int word = 0; word < kValueRest / 2; ++word) {
        addValues(kValueBlocks * 4 + word, valueRest[0].word[word], valueRest[1].word[word],
                  valueRest[2].word[word], valueRest[3].word[word], weightWord);
      }
    }
  }

  // Words of four keys, each two neighbouring dimensions, become rows `quad` and quad + 8.
  __device__ __forceinline__ void addValues(int part, std::uint32_t key0, std::uint32_t key1,
                                            std::uint32_t key8, std::uint32_t key9,
                                            const std::uint32_t (&weightWord)[kRowTiles][2]) {
    const std::uint32_t fragment[4] = {packLow(key0, key1), packHigh(key0, key1),
                                       packLow(key8, key9), packHigh(key8, key9)};
#pragma unroll
    for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
      multiplyAdd<T>(sum[rowTile][part], fragment, weightWord[rowTile][0], weightWord[rowTile][1]);
    }
  }

  // The first of the two neighbouring dimensions that sum[.][part] holds in this lane.
  __device__ __forceinline__ int dimensionOf(int part) const {
    if (part < kValueBlocks * 4) return part / 4 * 64 + quad * 8 + part % 4 * 2;
    return kValueBlocks * 64 + quad * kValueRest + (part - kValueBlocks * 4) * 2;
  }

  // Writes this warp's sums, maxima and totals: (kRows, kResultStride) floats, then 2 per row.
  // Only the first `rows` are real; the others are left as they are.
  __device__ __forceinline__ void storeResult(float* result, int rows) {
    float* stats = result + kRows * kResultStride;
#pragma unroll
    for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int row = rowTile * 8 + 2 * inQuad + column;
        const float rowTotal = sumOver(total[rowTile][column], 4, 16);
        if (row >= rows) continue;
#pragma unroll
        for (int part = 0; part < D / 16; ++part) {
          float* at = result + row * kResultStride + dimensionOf(part);
          at[0] = sum[rowTile][part][column];
          at[1] = sum[rowTile][part][column + 2];
        }
        if (quad == 0) {
          stats[2 * row] = maximum[rowTile][column];
          stats[2 * row + 1] = rowTotal;
        }
      }
    }
  }
};

}  // namespace lminf
