// prefill, one warp of a tile: 16 or 32 query rows, their products, softmax and sums.
#pragma once

#include "ring.cuh"
#include "tile_shapes.h"

namespace lminf {

// What a lane needs to know of its rows lane / 4 + 8 * side: the keys of one kind that a row sees,
// its step, and the slope of its head. In registers:
template <int kSides>
struct HeldRows {
  KeyRange ranges[kSides];
  float slopes[kSides];
  int steps[kSides];

  __device__ __forceinline__ KeyRange range(int side) const { return ranges[side]; }
  __device__ __forceinline__ float slope(int side) const { return slopes[side]; }
  __device__ __forceinline__ int step(int side) const { return steps[side]; }
};

// And in shared memory, where the sums of 32 rows leave no registers for it.
struct alignas(16) SharedRow {
  KeyRange range;
  float slope;
  int step;
};
struct SharedRows {
  SharedRow* first;  // row lane / 4 of the warp

  __device__ __forceinline__ KeyRange range(int side) const { return first[8 * side].range; }
  __device__ __forceinline__ float slope(int side) const { return first[8 * side].slope; }
  __device__ __forceinline__ int step(int side) const { return first[8 * side].step; }
};

template <int kRowTiles>
struct RowsOf {
  using Type = SharedRows;
};
template <>
struct RowsOf<1> {
  using Type = HeldRows<2>;
};

template <class T, class Ring, int D, int kWarps, int kRowTiles>
struct TilesWarp {
  static constexpr int kKeys = tileKeys(D);
  static constexpr int kStride = D + kRowPadding;
  static constexpr int kSteps = D / 16;         // of the product over dimensions
  static constexpr int kSides = 2 * kRowTiles;  // rows of a lane: lane / 4 + 8 * side
  static constexpr bool kQueryShared =
      kRowTiles > 1 ? tallQueryStaysShared(D) : queryStaysShared(D);
  static constexpr int kHeldSteps = kQueryShared ? 1 : kSteps;  // of which registers hold the query
  // Of the warp's rows and the keys of a tile: products, then logits, then weights.
  using Products = float[kRowTiles][kKeys / 8][4];

  const KernelArguments& a;
  int lane;
  std::uint32_t query[kHeldSteps][kRowTiles][4];
  const T* queryRows;  // shared, this warp's rows
  // Elements as the m16n8 accumulator has them: the first two are of one side, the others of the
  // next.
  float sum[kRowTiles][D / 8][4];
  float maximum[kSides], total[kSides];
  typename RowsOf<kRowTiles>::Type rows;
  KeyRange seenByAll, seenByAny;  // over the warp's rows

  __device__ __forceinline__ explicit TilesWarp(const KernelArguments& arguments)
      : a(arguments), lane(threadIdx.x % 32) {}

  __device__ __forceinline__ void clearSums() {
#pragma unroll
    for (int index = 0; index < kRowTiles * D / 2; ++index) {
      sum[index / (D / 2)][index / 4 % (D / 8)][index % 4] = 0.0f;
    }
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      maximum[side] = -INFINITY;
      total[side] = 0.0f;
    }
  }

  __device__ __forceinline__ void loadQuery() {
    if constexpr (!kQueryShared) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) loadQueryStep(query[step], step);
    }
  }

  __device__ __forceinline__ void loadQueryStep(std::uint32_t (&word)[kRowTiles][4],
                                                int step) const {
#pragma unroll
    for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
      const int row = rowTile * 16 + lane % 16;
      loadMatrices(word[rowTile], queryRows + row * kStride + step * 16 + lane / 16 * 8);
    }
  }

  __device__ __forceinline__ void shareRanges() {
    seenByAll = seenByAny = rows.range(0);
#pragma unroll
    for (int side = 1; side < kSides; ++side) {
      const KeyRange range = rows.range(side);
      seenByAll.low = larger(seenByAll.low, range.low);
      seenByAll.high = smaller(seenByAll.high, range.high);
      seenByAny.low = smaller(seenByAny.low, range.low);
      seenByAny.high = larger(seenByAny.high, range.high);
    }
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
  __device__ __forceinline__ void applyScales(Products& elements, const float* scales) const {
#pragma unroll
    for (int tile = 0; tile < kKeys / 8; ++tile) {
#pragma unroll
      for (int index = 0; index < 4 * kRowTiles; ++index) {
        elements[index / 4][tile][index % 4] *= scales[tile * 8 + lane % 4 * 2 + index % 2];
      }
    }
  }

  // products[.][tile] = query rows times keys tile * 8 ... + 7. A fragment of keys is loaded once
  // for all rows of the warp.
  __device__ __forceinline__ void multiplyKeys(Products& products, const T* keys) {
#pragma unroll
    for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
#pragma unroll
      for (int index = 0; index < kKeys / 2; ++index) {
        products[rowTile][index / 4][index % 4] = 0.0f;
      }
    }
    const int keyInPair = lane / 16 * 8 + lane % 8, half = lane / 8 % 2 * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      std::uint32_t loaded[kRowTiles][4];
      if constexpr (kQueryShared) loadQueryStep(loaded, step);
      std::uint32_t (&fragment)[kRowTiles][4] = kQueryShared ? loaded : query[step % kHeldSteps];
#pragma unroll
      for (int pair = 0; pair < kKeys / 16; ++pair) {
        std::uint32_t word[4];
        loadMatrices(word, keys + (pair * 16 + keyInPair) * kStride + step * 16 + half);
#pragma unroll
        for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
          multiplyAdd<T>(products[rowTile][2 * pair], fragment[rowTile], word[0], word[1]);
          multiplyAdd<T>(products[rowTile][2 * pair + 1], fragment[rowTile], word[2], word[3]);
        }
      }
    }
  }

  // Products become logits in units of log2; `distance0` is the distance of key 0 of the tile from
  // step 0, or unused for sinks.
  __device__ __forceinline__ void toLogits(Products& products, bool isSink, int distance0) const {
#pragma unroll
    for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
      scaleProducts(products[rowTile]);
    }
    if (a.alibiSlopes == nullptr) return;
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      const float bias = rows.slope(side) * kLog2E;
      if (bias == 0.0f) continue;
      const float nearest = static_cast<float>(rows.step(side) + distance0 - lane % 4 * 2);
#pragma unroll
      for (int tile = 0; tile < kKeys / 8; ++tile) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const float distance = isSink ? a.limitDistance : nearest - (tile * 8 + column);
          products[side / 2][tile][side % 2 * 2 + column] -= bias * distance;
        }
      }
    }
  }

  __device__ __forceinline__ void scaleProducts(float (&products)[kKeys / 8][4]) const {
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
  }

  __device__ __forceinline__ void mask(Products& logits, int firstKey) const {
#pragma unroll
    for (int tile = 0; tile < kKeys / 8; ++tile) {
#pragma unroll
      for (int index = 0; index < 4 * kRowTiles; ++index) {
        const int number = firstKey + tile * 8 + lane % 4 * 2 + index % 2;
        const KeyRange range = rows.range(index / 2);
        if (number < range.low || number > range.high) {
          logits[index / 4][tile][index % 4] = -INFINITY;
        }
      }
    }
  }

  // Logits become weights; what has been summed is rescaled. Totals stay per lane until the end.
  __device__ __forceinline__ void softmax(Products& products) {
#pragma unroll
    for (int side = 0; side < kSides; ++side) {
      float (&logits)[kKeys / 8][4] = products[side / 2];
      const int first = side % 2 * 2;
      float top = maximum[side];
#pragma unroll
      for (int tile = 0; tile < kKeys / 8; ++tile) {
        top = fmaxf(top,
                    fmaxf(logits[tile][first], logits[tile][first + 1]) - weightShift<T, Ring>());
      }
      top = maximumOver(top, 1, 2);
      const float base = finiteMaximum(top);
      const float carried = exp2Fast(maximum[side] - base);
      maximum[side] = top;
      float added = 0.0f;
#pragma unroll
      for (int index = 0; index < kKeys / 4; ++index) {
        float& weight = logits[index / 2][first + index % 2];
        weight = exp2Fast(weight - base);
        added += weight;
      }
      total[side] = total[side] * carried + added;
      // A maximum seldom moves after a few tiles. The branch also keeps sides apart: with more of
      // them, temporaries of all at once would not fit into registers.
      if (kRowTiles > 1 && carried == 1.0f) continue;
#pragma unroll
      for (int tile = 0; tile < D / 8; ++tile) {
        sum[side / 2][tile][first] *= carried;
        sum[side / 2][tile][first + 1] *= carried;
      }
    }
  }

  // sum += weights times values. A fragment of values is loaded once for all rows of the warp.
  __device__ __forceinline__ void multiplyValues(const Products& weights, const T* values) {
    const int keyInStep = lane % 16, half = lane / 16 * 8;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      std::uint32_t fragment[kRowTiles][4];
#pragma unroll
      for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
        const float (&low)[4] = weights[rowTile][2 * step];
        const float (&high)[4] = weights[rowTile][2 * step + 1];
        fragment[rowTile][0] = packPair<T>(low[0], low[1]);
        fragment[rowTile][1] = packPair<T>(low[2], low[3]);
        fragment[rowTile][2] = packPair<T>(high[0], high[1]);
        fragment[rowTile][3] = packPair<T>(high[2], high[3]);
      }
#pragma unroll
      for (int pair = 0; pair < D / 16; ++pair) {
        std::uint32_t word[4];
        loadMatricesTransposed(word, values + (step * 16 + keyInStep) * kStride + pair * 16 + half);
#pragma unroll
        for (int rowTile = 0; rowTile < kRowTiles; ++rowTile) {
          multiplyAdd<T>(sum[rowTile][2 * pair], fragment[rowTile], word[0], word[1]);
          multiplyAdd<T>(sum[rowTile][2 * pair + 1], fragment[rowTile], word[2], word[3]);
        }
      }
    }
  }
};

}  // namespace lminf
