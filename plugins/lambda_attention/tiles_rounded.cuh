// Tiles of keys and values that lie in a ring as bytes.
//
// Bytes come in by cp.async, one tile ahead, with the scales of their rows, and become elements of
// T in one tile of keys and one of values; sinks, which are of T, are copied there. What that takes
// of shared memory is less than the two stages of a ring of T (tile_shapes.h).
#pragma once

#include "tiles.cuh"

namespace lminf {

// The scales of the rows of one key/value head, by slot.
struct RingScales {
  const float* keys;
  const float* values;
};

__device__ __forceinline__ RingScales scalesOf(const KernelArguments& a, std::int64_t pair) {
  return {a.presentKeyScale + pair * a.capacity, a.presentValueScale + pair * a.capacity};
}

template <class T, int D, int kWarps>
struct RoundedTiles {
  static constexpr int kKeys = tileKeys(D), kStride = D + kRowPadding;
  static constexpr int kTile = kKeys * kStride;      // elements of T
  static constexpr int kStageBytes = 2 * kKeys * D;  // keys, then values
  static constexpr int kStageScales = 2 * kKeys;     // of keys, then of values
  static_assert(2 * kTile * sizeof(T) + 2 * kStageBytes + 3 * kStageScales * sizeof(float) <=
                    4 * kTile * sizeof(T),
                "more than the stages of a ring of T");

  T* keys;  // shared; the values behind them
  unsigned char* bytes;
  float* scales;  // of the tile that is attended to, then of the stages

  __device__ __forceinline__ explicit RoundedTiles(T* shared)
      : keys(shared), bytes(reinterpret_cast<unsigned char*>(shared + 2 * kTile)),
        scales(reinterpret_cast<float*>(bytes + 2 * kStageBytes)) {}

  template <class Warp>
  __device__ __forceinline__ void walkSinks(Warp& warp, const KeyList<T>& list, int begin,
                                            int end) const {
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      copyTile<T, D, kWarps>(list, tile * kKeys, keys, keys + kTile);
      commitCopies();
      waitCopies<0>();
      syncBlock();
      attend(warp, tile, true, 0);
      syncBlock();
    }
  }

  template <class Warp, class Ring>
  __device__ __forceinline__ void walkRing(Warp& warp, const KeyList<Ring>& list,
                                           const RingScales& rows, int begin, int end,
                                           int firstRelative) const {
    copyBytes(list, rows, begin * kKeys, 0);
    commitCopies();
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) {
      const int stage = (tile - begin) % 2;
      if (tile + 1 < end) copyBytes(list, rows, (tile + 1) * kKeys, 1 - stage);
      commitCopies();
      waitCopies<1>();
      syncBlock();
      expandTile(stage);
      syncBlock();
      attend(warp, tile, false, firstRelative);
    }
    syncBlock();  // the next to write the tiles may be the store of the result
  }

  // Starts copying the bytes and scales of a tile. Behind the last key it is repeated.
  template <class Ring>
  __device__ __forceinline__ void copyBytes(const KeyList<Ring>& list, const RingScales& rows,
                                            int first, int stage) const {
    constexpr int kChunks = D / 16;
    unsigned char* to = bytes + stage * kStageBytes;
#pragma unroll 1
    for (int chunk = static_cast<int>(threadIdx.x); chunk < kKeys * kChunks; chunk += kWarps * 32) {
      const int row = chunk / kChunks, byte = chunk % kChunks * 16;
      const int from = list.slot(first + row) * D + byte;
      copyAsync16(to + row * D + byte, list.keys + from);
      copyAsync16(to + kKeys * D + row * D + byte, list.values + from);
    }
    float* stageScales = scales + (1 + stage) * kStageScales;
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x); row < kKeys; row += kWarps * 32) {
      const int slot = list.slot(first + row);
      copyAsync4(stageScales + row, rows.keys + slot);
      copyAsync4(stageScales + kKeys + row, rows.values + slot);
    }
  }

  // Bytes of a stage become keys and values of T, 8 at a time. Its scales are copied: the next
  // tile's may arrive there while slower warps still attend to this one.
  __device__ __forceinline__ void expandTile(int stage) const {
    constexpr int kChunks = D / 8;
    const unsigned char* from = bytes + stage * kStageBytes;
#pragma unroll 1
    for (int chunk = static_cast<int>(threadIdx.x); chunk < 2 * kKeys * kChunks;
         chunk += kWarps * 32) {
      const int row = chunk / kChunks, dim = chunk % kChunks * 8;
      std::uint32_t two[2];
      loadShared(two, from + row * D + dim);
      Packed<8> packed{{two[0], two[1], 0, 0}};
      expandBytes<T>(packed);
      storeWords<4>(keys + row * kStride + dim,
                    {{packed.word[0], packed.word[1], packed.word[2], packed.word[3]}});
    }
#pragma unroll 1
    for (int row = static_cast<int>(threadIdx.x); row < kStageScales; row += kWarps * 32) {
      scales[row] = scales[(1 + stage) * kStageScales + row];
    }
  }

  template <class Warp>
  __device__ __forceinline__ void attend(Warp& warp, int tile, bool isSink,
                                         int firstRelative) const {
    const int first = tile * kKeys, last = first + kKeys - 1;
    if (!warp.seesAny(first, last)) return;
    typename Warp::Products weights;
    warp.multiplyKeys(weights, keys);
    if (!isSink) warp.applyScales(weights, scales);
    warp.toLogits(weights, isSink, -firstRelative - first);
    if (!warp.seesAll(first, last)) warp.mask(weights, first);
    warp.softmax(weights);
    if (!isSink) warp.applyScales(weights, scales + kKeys);
    warp.multiplyValues(weights, keys + kTile);
  }
};

}  // namespace lminf
