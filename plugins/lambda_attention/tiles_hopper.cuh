// prefill on compute capability 9.0: tiles of keys as in tiles.cuh, products by whole warpgroups.
//
// A block takes 128 query rows of one key/value head. One warpgroup copies tiles of 128 keys and
// their values, two stages of each; two attend, 64 rows each. Their queries lie in shared memory
// twice, rotated for sinks and for the ring, so that sinks and ring are one list of tiles.
// What a warpgroup does while the tensor cores work for it is the softmax of the next tile:
//   products of tile t+1 and sums of tile t are started, products awaited, weights made, sums
//   awaited.
// The two take turns in starting, so that one's softmax falls into the other's products.
#pragma once

#include "device_hopper.cuh"
#include "hopper_matrix.h"
#include "hopper_shared.cuh"
#include "tiles.cuh"

namespace lminf {

// What one warpgroup that attends holds. Row 0, 1 of a lane: 16 warp + lane / 4, + 8.
template <class T, int D>
struct HopperWarpgroup {
  const KernelArguments& a;
  const RowGroup& group;
  const HopperShared<D>& shared;
  int number;  // 0 or 1
  int lane;
  int firstRow;  // of the warp, in the group

  float sum[D / 2];
  float products[kHopperKeys / 2];
  std::uint32_t weights[kHopperKeys / 4];
  float maximum[2], total[2], carried[2];
  int rowStep[2];
  float slope[2];
  bool isBiased;  // some row of the warp has a slope other than 0
  KeyRange range[2];
  KeyRange seenByAll;  // over the warp's rows

  __device__ __forceinline__ HopperWarpgroup(const KernelArguments& arguments, const RowGroup& rows,
                                             const HopperShared<D>& memory)
      : a(arguments), group(rows), shared(memory),
        number(static_cast<int>(threadIdx.x) / kWarpgroup - 1),
        lane(static_cast<int>(threadIdx.x) % 32),
        firstRow(rows.firstRow + static_cast<int>(threadIdx.x) / 32 * 16 - kWarpgroup / 2) {
#pragma unroll
    for (int index = 0; index < D / 2; ++index) sum[index] = 0.0f;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      rowStep[side] = row(side) % a.sequenceLength;
      slope[side] = row(side) < group.rows ? slopeOf(a, group.head(a, row(side))) : 0.0f;
      maximum[side] = -INFINITY;
      total[side] = 0.0f;
    }
    isBiased = maximumOver(fmaxf(fabsf(slope[0]), fabsf(slope[1])), 1, 16) > 0.0f;
  }

  __device__ __forceinline__ int row(int side) const { return firstRow + lane / 4 + 8 * side; }

  // What the rows see of one kind of key.
  __device__ __forceinline__ void setRanges(bool isSink, const KeySpan& span, std::int64_t past,
                                            int real) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const bool sees = row(side) < group.rows && rowStep[side] < real;
      const int sinks = visibleSinks(past + rowStep[side], a.windowSize, a.numSinkTokens);
      range[side] = !sees    ? noKeys()
                    : isSink ? KeyRange{0, sinks - 1}
                             : visibleRingKeys(span, rowStep[side], a.windowLimit);
    }
    seenByAll = {larger(range[0].low, range[1].low), smaller(range[0].high, range[1].high)};
#pragma unroll
    for (int mask = 4; mask <= 16; mask <<= 1) {
      seenByAll.low = larger(seenByAll.low, shuffleXor(seenByAll.low, mask));
      seenByAll.high = smaller(seenByAll.high, shuffleXor(seenByAll.high, mask));
    }
  }

  // Starts the products of the queries with a stage's keys.
  __device__ __forceinline__ void startProducts(const Stage& stage, bool isSink) {
    waitAt(shared.keysFull(stage.place), stage.parity);
    fenceShared();
    const std::uint64_t query = describeDimensions(sharedAddress(shared.query(number, isSink)));
    const std::uint64_t keys = describeDimensions(sharedAddress(shared.keys(stage.place)));
    fenceProducts();
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      multiplyShared<T>(products, advanced(query, dimensionStep(step, kWarpgroupRows)),
                        advanced(keys, dimensionStep(step, kHopperKeys)), step > 0);
    }
    commitProducts();
  }

  // Starts adding the weights times a stage's values.
  __device__ __forceinline__ void startSums(const Stage& stage) {
    waitAt(shared.valuesFull(stage.place), stage.parity);
    fenceShared();
    const std::uint64_t values =
        describeRows(sharedAddress(shared.values(stage.place)), kHopperKeys);
    fenceProducts();
#pragma unroll
    for (int step = 0; step < kHopperKeys / 16; ++step) {
      multiplyRegisters<T>(sum, weights + 4 * step, advanced(values, rowStepBytes(step)));
    }
    commitProducts();
  }

  // Says that the warp has read a stage.
  __device__ __forceinline__ void release(Barrier* empty) const {
    if (lane == 0) arriveAt(empty);
  }

  // Caps and biases; the products are logits afterwards, in units of log2.
  __device__ __forceinline__ void toLogits(bool isSink, int distance0) {
    if (a.softcap > 0.0f) {
#pragma unroll
      for (int index = 0; index < kHopperKeys / 2; ++index) {
        products[index] = softCapped(products[index] * a.scale, a.softcap) * kLog2E;
      }
    } else {
      const float scale = a.scale * kLog2E;
#pragma unroll
      for (int index = 0; index < kHopperKeys / 2; ++index) products[index] *= scale;
    }
    if (!isBiased) return;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const float bias = slope[side] * kLog2E;
      const float nearest = static_cast<float>(rowStep[side] + distance0 - lane % 4 * 2);
#pragma unroll
      for (int index = 0; index < kHopperKeys / 4; ++index) {
        const int column = index / 2 * 8 + index % 2;
        const float distance = isSink ? a.limitDistance : nearest - static_cast<float>(column);
        products[index / 2 * 4 + 2 * side + index % 2] -= bias * distance;
      }
    }
  }

  __device__ __forceinline__ void mask(int firstKey) {
    const int first = firstKey + lane % 4 * 2;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int low = range[side].low - first, high = range[side].high - first;
#pragma unroll
      for (int index = 0; index < kHopperKeys / 4; ++index) {
        const int column = index / 2 * 8 + index % 2;
        if (column < low || column > high) {
          products[index / 2 * 4 + 2 * side + index % 2] = -INFINITY;
        }
      }
    }
  }

  // Products become weights in float32; what the sums are to be multiplied by is put down.
  __device__ __forceinline__ void makeWeights(bool isSink, int firstKey, int distance0) {
    float factor = a.scale * kLog2E;
    if (a.softcap > 0.0f || isBiased || !(a.scale > 0.0f)) {
      toLogits(isSink, distance0);
      factor = 1.0f;
    }
    if (firstKey < seenByAll.low || firstKey + kHopperKeys - 1 > seenByAll.high) mask(firstKey);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      float tops[4], added[4] = {};  // chains of a quarter of the length
#pragma unroll
      for (int index = 0; index < kHopperKeys / 4; ++index) {
        const float product = products[index / 2 * 4 + 2 * side + index % 2];
        float& top = tops[index % 4];
        top = index < 4 ? product : fmaxf(top, product);
      }
      const float ofTile = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
      const float top = fmaxf(maximum[side], maximumOver(ofTile, 1, 2) * factor);
      const float base = finiteMaximum(top);
      carried[side] = exp2Fast(maximum[side] - base);
      maximum[side] = top;
#pragma unroll
      for (int index = 0; index < kHopperKeys / 4; ++index) {
        float& weight = products[index / 2 * 4 + 2 * side + index % 2];
        weight = exp2Fast(weight * factor - base);
        added[index % 4] += weight;
      }
      total[side] = total[side] * carried[side] + ((added[0] + added[1]) + (added[2] + added[3]));
    }
  }

  // The weights as the operand of the next sums: a lane's elements of two column tiles are its
  // fragment of 16 keys.
  __device__ __forceinline__ void packWeights() {
#pragma unroll
    for (int index = 0; index < kHopperKeys / 4; ++index) {
      weights[index] = packPair<T>(products[2 * index], products[2 * index + 1]);
    }
  }

  __device__ __forceinline__ void rescale() {
#pragma unroll
    for (int index = 0; index < D / 2; ++index) sum[index] *= carried[index / 2 % 2];
  }

  // Attends to tiles begin ... end - 1, of which those below sinkTiles are sinks.
  __device__ __forceinline__ void walk(const KeySpan& span, std::int64_t past, int real,
                                       int sinkTiles, int begin, int end) {
    bool isSink = begin < sinkTiles;
    setRanges(isSink, span, past, real);
    Stage keys, values;
    startProducts(keys, isSink);
    waitProducts<0>(products);
    release(shared.keysEmpty(keys.place));
    weigh(begin, isSink, span, sinkTiles);
    packWeights();
#pragma unroll 1
    for (int tile = begin + 1; tile < end; ++tile) {
      keys.advance();
      isSink = tile < sinkTiles;
      awaitTurn();
      startProducts(keys, isSink);
      startSums(values);
      endTurn(tile + 1 == end);
      if (tile == sinkTiles) setRanges(false, span, past, real);
      waitProducts<1>(products);
      release(shared.keysEmpty(keys.place));
      weigh(tile, isSink, span, sinkTiles);
      finishBefore(total[0] + total[1]);  // the weights, while the sums are under way
      waitProducts<0>(sum, weights);
      release(shared.valuesEmpty(values.place));
      values.advance();
      rescale();
      packWeights();
    }
    startSums(values);
    waitProducts<0>(sum, weights);
  }

  __device__ __forceinline__ void weigh(int tile, bool isSink, const KeySpan& span, int sinkTiles) {
    const int firstKey = (isSink ? tile : tile - sinkTiles) * kHopperKeys;
    makeWeights(isSink, firstKey, -span.firstRelative - firstKey);
  }

  // The first warpgroup starts first; both start as often.
  __device__ __forceinline__ void awaitTurn() const {
    syncNumbered(kTurnBarrier + number, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void endTurn(bool last) const {
    if (number == 0 || !last) arriveNumbered(kTurnBarrier + 1 - number, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void giveFirstTurn() const {
    if (number == 1) arriveNumbered(kTurnBarrier, 2 * kWarpgroup);
  }

  // Waits for the four warps of this warpgroup.
  __device__ __forceinline__ void meet() const { syncNumbered(kMeetBarrier + number, kWarpgroup); }
};

// Writes a warpgroup's rows of output through its queries' place, 16 bytes at a time.
template <class T, int D>
__device__ __forceinline__ void storeTile(const HopperWarpgroup<T, D>& warpgroup) {
  const KernelArguments& a = warpgroup.a;
  const RowGroup& group = warpgroup.group;
  unsigned char* staged = warpgroup.shared.query(warpgroup.number, false);
  const int lane = warpgroup.lane;
  const int firstOfWarp = static_cast<int>(threadIdx.x) / 32 % 4 * 16;
  warpgroup.meet();  // nobody multiplies the queries any more
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = warpgroup.row(side);
    const float factor =
        row < group.rows
            ? softmaxFactor(a, group.head(a, row), warpgroup.maximum[side], warpgroup.total[side])
            : 0.0f;
#pragma unroll
    for (int tile = 0; tile < D / 8; ++tile) {
      const float* sum = warpgroup.sum + 4 * tile + 2 * side;
      const int to = chunkOffset(firstOfWarp + lane / 4 + 8 * side, tile, kWarpgroupRows);
      storeWords<1>(staged + to + lane % 4 * 4, {{packPair<T>(sum[0] * factor, sum[1] * factor)}});
    }
  }
  syncWarp();
  T* output = static_cast<T*>(a.output) + (group.offset + warpgroup.firstRow) * D;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    const int index = step * 32 + lane, row = index / (D / 8), chunk = index % (D / 8);
    if (warpgroup.firstRow + row >= group.rows) break;
    Words<4> words;
    loadShared(words.word, staged + chunkOffset(firstOfWarp + row, chunk, kWarpgroupRows));
    storeWords<4>(output + row * D + chunk * 8, words);
  }
}

// Writes a warpgroup's rows of one split: sums, maxima and totals as they are.
template <class T, int D>
__device__ __forceinline__ void storePartial(const HopperWarpgroup<T, D>& warpgroup, int split) {
  const KernelArguments& a = warpgroup.a;
  const std::int64_t allRows =
      static_cast<std::int64_t>(a.batchSize) * a.numKvHeads * a.group * a.sequenceLength;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int row = warpgroup.row(side);
    if (row >= warpgroup.group.rows) continue;
    const std::int64_t part = split * allRows + warpgroup.group.offset + row;
    float* to = a.partialOutput + part * D + warpgroup.lane % 4 * 2;
#pragma unroll
    for (int tile = 0; tile < D / 8; ++tile) {
      to[tile * 8] = warpgroup.sum[4 * tile + 2 * side];
      to[tile * 8 + 1] = warpgroup.sum[4 * tile + 2 * side + 1];
    }
    if (warpgroup.lane % 4 == 0) {
      a.partialStats[part * 2] = warpgroup.maximum[side];
      a.partialStats[part * 2 + 1] = warpgroup.total[side];
    }
  }
}

}  // namespace lminf
