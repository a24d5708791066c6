// Queries of a block of tiles_hopper.cuh: rotated into shared memory, once for each kind of key.
#pragma once

#include "hopper_shared.cuh"

namespace lminf {

// Which kinds of key a block walks over.
struct KeyKinds {
  bool sinks;
  bool ring;
};

// Eight elements of a row, and what turns them.
template <class T>
__device__ __forceinline__ float elementOf(const std::uint32_t (&words)[4], int index);
template <>
__device__ __forceinline__ float elementOf<Half>(const std::uint32_t (&words)[4], int index) {
  return halfToFloat(static_cast<std::uint16_t>(words[index / 2] >> 16 * (index % 2)));
}
template <>
__device__ __forceinline__ float elementOf<Bfloat16>(const std::uint32_t (&words)[4], int index) {
  const std::uint32_t word = words[index / 2];
  return bitsToFloat(index % 2 == 0 ? word << 16 : word & 0xffff0000u);
}

struct Angles {
  std::uint32_t cos[2][4], sin[2][4];

  __device__ __forceinline__ void load(const float* cosRow, const float* sinRow, int pair) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      loadGlobal16(cos[half], cosRow + pair + 4 * half);
      loadGlobal16(sin[half], sinRow + pair + 4 * half);
    }
  }
};

// Elements `pair` ... + 7 of a row and their partners D / 2 further on, turned and stored.
template <class T, int D>
__device__ __forceinline__ void storeTurned(const std::uint32_t (&low)[4],
                                            const std::uint32_t (&high)[4], const Angles& angles,
                                            unsigned char* target, int row, int chunk) {
  Words<4> turned[2];
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float result[2][2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int index = 2 * word + side;
      const float cos = bitsToFloat(angles.cos[index / 4][index % 4]);
      const float sin = bitsToFloat(angles.sin[index / 4][index % 4]);
      const float first = elementOf<T>(low, index), second = elementOf<T>(high, index);
      result[0][side] = first * cos - second * sin;
      result[1][side] = second * cos + first * sin;
    }
    turned[0].word[word] = packPair<T>(result[0][0], result[0][1]);
    turned[1].word[word] = packPair<T>(result[1][0], result[1][1]);
  }
  storeShared16(target + chunkOffset(row, chunk, kWarpgroupRows), turned[0]);
  storeShared16(target + chunkOffset(row, chunk + D / 16, kWarpgroupRows), turned[1]);
}

// All dimensions turned by halves: rows come in 16 bytes at a time, several under way.
template <class T, int D>
__device__ __forceinline__ void rotateHalves(const KernelArguments& a, const RowGroup& group,
                                             const HopperShared<D>& shared, int warpgroup,
                                             KeyKinds kinds) {
  constexpr int kPairs = D / 16, kRowsAtOnce = kWarpgroup / kPairs;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroup;
  const int chunk = thread % kPairs, pair = chunk * 8;
  const int firstRow = group.firstRow + warpgroup * kWarpgroupRows;
  const T* query = static_cast<const T*>(a.query) + (group.offset + firstRow) * D + pair;
  const std::int64_t table = cosRow(a, group.batch, 0);
  Angles limit;
  if (kinds.sinks) limit.load(a.limitCos, a.limitSin, pair);
#pragma unroll 2
  for (int pass = 0; pass < kWarpgroupRows / kRowsAtOnce; ++pass) {
    const int row = thread / kPairs + pass * kRowsAtOnce;
    std::uint32_t low[4] = {}, high[4] = {};
    Angles own{};
    if (firstRow + row < group.rows) {
      const std::int64_t angles =
          table + static_cast<std::int64_t>((firstRow + row) % a.sequenceLength) * (D / 2);
      loadGlobal16(low, query + row * D);
      loadGlobal16(high, query + row * D + D / 2);
      if (kinds.ring) own.load(a.cos + angles, a.sin + angles, pair);
    }
    if (kinds.ring) {
      storeTurned<T, D>(low, high, own, shared.query(warpgroup, false), row, chunk);
    }
    if (kinds.sinks) {
      storeTurned<T, D>(low, high, limit, shared.query(warpgroup, true), row, chunk);
    }
  }
}

// Any rotation, 8 dimensions at a time.
template <class T, int D>
__device__ __forceinline__ void rotateElements(const KernelArguments& a, const RowGroup& group,
                                               int warpgroup, bool isSink, unsigned char* target) {
  constexpr int kChunks = D / 8;
  const int firstRow = group.firstRow + warpgroup * kWarpgroupRows;
  const T* query = static_cast<const T*>(a.query) + (group.offset + firstRow) * D;
  const float* cosRows = isSink ? a.limitCos : a.cos + cosRow(a, group.batch, 0);
  const float* sinRows = isSink ? a.limitSin : a.sin + cosRow(a, group.batch, 0);
  const int pairs = isSink ? 0 : a.rotaryDim / 2;  // every row turns by the limit's one row
#pragma unroll 1
  for (int index = static_cast<int>(threadIdx.x) % kWarpgroup; index < kWarpgroupRows * kChunks;
       index += kWarpgroup) {
    const int row = index / kChunks, chunk = index % kChunks;
    Words<4> words{};
    if (firstRow + row < group.rows) {
      const std::int64_t table =
          static_cast<std::int64_t>((firstRow + row) % a.sequenceLength) * pairs;
      RotaryElement<T> loaded[8];
#pragma unroll
      for (int element = 0; element < 8; ++element) {
        loaded[element].load(query + row * D, chunk * 8 + element, cosRows + table, sinRows + table,
                             a.rotaryDim, a.rotaryInterleaved);
      }
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        words.word[word] = packPair<T>(loaded[2 * word].rotated(), loaded[2 * word + 1].rotated());
      }
    }
    storeShared16(target + chunkOffset(row, chunk, kWarpgroupRows), words);
  }
}

// Rotates the 64 query rows of one warpgroup, by its threads.
template <class T, int D>
__device__ __forceinline__ void rotateHopperQueries(const KernelArguments& a, const RowGroup& group,
                                                    const HopperShared<D>& shared, int warpgroup,
                                                    KeyKinds kinds) {
  const auto tables =
      reinterpret_cast<std::uintptr_t>(a.cos) | reinterpret_cast<std::uintptr_t>(a.sin) |
      reinterpret_cast<std::uintptr_t>(a.limitCos) | reinterpret_cast<std::uintptr_t>(a.limitSin);
  if (a.rotaryDim == D && !a.rotaryInterleaved && tables % 16 == 0) {
    rotateHalves<T, D>(a, group, shared, warpgroup, kinds);
    return;
  }
#pragma unroll 1
  for (int kind = 0; kind < 2; ++kind) {
    const bool isSink = kind == 0;
    if (!(isSink ? kinds.sinks : kinds.ring)) continue;
    rotateElements<T, D>(a, group, warpgroup, isSink, shared.query(warpgroup, isSink));
  }
}

}  // namespace lminf
