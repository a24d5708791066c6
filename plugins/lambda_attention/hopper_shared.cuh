// Shared memory of the kernel of tiles_hopper.cuh, and the copies into it.
#pragma once

#include "device_hopper.cuh"
#include "hopper_matrix.h"
#include "tiles.cuh"

namespace lminf {

constexpr int kWarpgroup = 128;  // threads
constexpr int kWarpgroupRows = 64;
// Numbered barriers; 0 is that of the block.
constexpr int kMeetBarrier = 1;  // and 2: the warps of one warpgroup
constexpr int kTurnBarrier = 3;  // and 4: whose turn it is to start products

// Which stage a tile is in, and the parity of the phase in which it is full.
struct Stage {
  int place = 0;
  std::uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++place == kHopperStages) {
      place = 0;
      parity ^= 1u;
    }
  }
};

template <int D>
struct HopperShared {
  static constexpr int kQueryBytes = kWarpgroupRows * D * 2;
  static constexpr int kTileBytes = kHopperKeys * D * 2;

  unsigned char* start;

  __device__ __forceinline__ explicit HopperShared(unsigned char* shared)
      : start(shared + (kPatternBytes - sharedAddress(shared) % kPatternBytes) % kPatternBytes) {}

  // Queries of one warpgroup, rotated for one kind of key.
  __device__ __forceinline__ unsigned char* query(int warpgroup, bool isSink) const {
    return start + (2 * warpgroup + (isSink ? 1 : 0)) * kQueryBytes;
  }
  __device__ __forceinline__ unsigned char* keys(int place) const {
    return start + 4 * kQueryBytes + place * kTileBytes;
  }
  __device__ __forceinline__ unsigned char* values(int place) const {
    return keys(kHopperStages + place);
  }
  __device__ __forceinline__ Barrier* barriers() const {
    return reinterpret_cast<Barrier*>(keys(2 * kHopperStages));
  }
  __device__ __forceinline__ Barrier* keysFull(int place) const { return barriers() + place; }
  __device__ __forceinline__ Barrier* valuesFull(int place) const {
    return barriers() + kHopperStages + place;
  }
  __device__ __forceinline__ Barrier* keysEmpty(int place) const {
    return barriers() + 2 * kHopperStages + place;
  }
  __device__ __forceinline__ Barrier* valuesEmpty(int place) const {
    return barriers() + 3 * kHopperStages + place;
  }

  // By one thread; the others use the barriers behind a barrier of the block.
  __device__ __forceinline__ void initBarriers() const {
    for (int place = 0; place < kHopperStages; ++place) {
      initBarrier(keysFull(place), kWarpgroup);
      initBarrier(valuesFull(place), kWarpgroup);
      initBarrier(keysEmpty(place), 2 * kWarpgroup / 32);
      initBarrier(valuesEmpty(place), 2 * kWarpgroup / 32);
    }
  }
};

// What the copying warpgroup reads: keys and values of the sinks, then of the ring.
template <class T>
struct HopperLists {
  KeyList<T> sinks;
  KeyList<T> ring;
  int sinkTiles;

  __device__ __forceinline__ KeyList<T> listOf(int tile) const {
    const bool isSink = tile < sinkTiles;
    return {isSink ? sinks.keys : ring.keys, isSink ? sinks.values : ring.values,
            isSink ? sinks.count : ring.count, isSink ? sinks.firstSlot : ring.firstSlot,
            isSink ? sinks.capacity : ring.capacity};
  }
  __device__ __forceinline__ int firstKey(int tile) const {
    return (tile < sinkTiles ? tile : tile - sinkTiles) * kHopperKeys;
  }
};

// Starts copying rows first ... first + kHopperKeys - 1 of a list, by one warpgroup. Behind the
// last key it is repeated; the mask drops the repetitions.
template <class T, int D>
__device__ __forceinline__ void copyRows(const KeyList<T>& list, const T* source, int first,
                                         unsigned char* target) {
  constexpr int kChunks = D / 8, kRowsAtOnce = kWarpgroup / kChunks;
  static_assert(kRowsAtOnce % 8 == 0, "a thread's rows would not lie alike");
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int row = thread / kChunks, chunk = thread % kChunks;
  unsigned char* to = target + chunkOffset(row, chunk, kHopperKeys);
  const T* from = source + chunk * 8;
  const int firstSlot = ringSlot(list.firstSlot, first, list.capacity);
  if (first + kHopperKeys <= list.count && firstSlot + kHopperKeys <= list.capacity) {
    from += (firstSlot + row) * D;
#pragma unroll
    for (int pass = 0; pass < kChunks; ++pass) {
      copyAsync16(to + pass * kRowsAtOnce * kPartBytes, from + pass * kRowsAtOnce * D);
    }
    return;
  }
#pragma unroll 4
  for (int pass = 0; pass < kChunks; ++pass) {
    copyAsync16(to + pass * kRowsAtOnce * kPartBytes,
                from + list.slot(first + row + pass * kRowsAtOnce) * D);
  }
}

// The copying warpgroup: tiles begin ... end - 1, a tile's values behind the next tile's keys, as
// they are used.
template <class T, int D>
__device__ __forceinline__ void copyTiles(const HopperShared<D>& shared,
                                          const HopperLists<T>& lists, int begin, int end) {
  Stage keys, values;
#pragma unroll 1
  for (int tile = begin; tile <= end; ++tile) {
    if (tile < end) {
      const KeyList<T> list = lists.listOf(tile);
      waitAt(shared.keysEmpty(keys.place), keys.parity ^ 1u);
      copyRows<T, D>(list, list.keys, lists.firstKey(tile), shared.keys(keys.place));
      arriveWithCopies(shared.keysFull(keys.place));
      keys.advance();
    }
    if (tile > begin) {
      const KeyList<T> list = lists.listOf(tile - 1);
      waitAt(shared.valuesEmpty(values.place), values.parity ^ 1u);
      copyRows<T, D>(list, list.values, lists.firstKey(tile - 1), shared.values(values.place));
      arriveWithCopies(shared.valuesFull(values.place));
      values.advance();
    }
  }
}

}  // namespace lminf
