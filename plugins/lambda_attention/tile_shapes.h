// Sizes that kernels and the planner must agree on.
#pragma once

#include <cstddef>

#include "arithmetic.h"

namespace lminf {

constexpr int kAppendWarps = 4;
constexpr int kSimpleWarps = 4;
// Combine: a warp takes at most 8 of the at most 64 splits, all of whose loads are under way at
// once.
constexpr int kCombineWarps = 8;
constexpr int kCombineSplits = 8;
constexpr int kMaxSplits = kCombineWarps * kCombineSplits;

// Decode: every warp takes tiles of 16 keys on its own; partial results meet in shared memory.
constexpr int kDecodeWarps = 4;
constexpr int kDecodeKeys = 16;
// Head dimensions above this leave no registers for 16 query rows.
constexpr int kLargestDoubledHeadDim = 128;
// Rows become an odd number of 16-byte units long, so that eight of them meet no bank twice.
constexpr int kRowPadding = 8;  // elements of a 16-bit type
// The lanes that store results hold rows 2 apart and dimensions 8 or 4 apart: an odd stride sends
// them to 16 banks, of which each is met twice.
constexpr int kMergeRowPadding = 1;  // floats

LMINF_HD constexpr int decodeBlocksPerMultiprocessor(int headDim, int rowTiles) {
  if (headDim == 32) return 4;
  return headDim > 128 ? 2 : (rowTiles > 1 && headDim > 64 ? 2 : 3);
}

LMINF_HD constexpr std::size_t decodeSharedBytes(int headDim, int rowTiles) {
  // First both rotated queries, later one float result per warp.
  const std::size_t rows = static_cast<std::size_t>(rowTiles) * 8;
  const std::size_t queries = 2 * rows * static_cast<std::size_t>(headDim + kRowPadding) * 2;
  const std::size_t results =
      kDecodeWarps * rows * static_cast<std::size_t>(headDim + kMergeRowPadding + 2) * 4;
  return queries > results ? queries : results;
}

// Tiles of query rows: keys and values pass through shared memory in two stages.
LMINF_HD constexpr int tileKeys(int headDim) { return headDim > 128 ? 32 : 64; }

// At D = 256 the query does not fit into registers beside the result and stays in shared memory.
LMINF_HD constexpr bool queryStaysShared(int headDim) { return headDim > 128; }

LMINF_HD constexpr std::size_t tilesSharedBytes(int headDim, int rows) {
  const std::size_t row = static_cast<std::size_t>(headDim + kRowPadding) * 2;
  const std::size_t query = static_cast<std::size_t>(rows) * row;
  const std::size_t stages = 4 * static_cast<std::size_t>(tileKeys(headDim)) * row;
  return queryStaysShared(headDim) ? query + stages : (query > stages ? query : stages);
}

// 32 query rows a warp: one tile of keys and one of values, which take turns.
constexpr int kTallWarps = 4;
constexpr int kTallRowTiles = 2;
constexpr int kTallRows = kTallWarps * kTallRowTiles * 16;
constexpr std::size_t kTallRowBytes = 16;     // what a lane needs to know of a row
constexpr std::size_t kTallBlockBytes = 144;  // what the threads of a block have in common
// Above this the sums of 32 rows alone would take all registers.
constexpr int kLargestTallHeadDim = 128;

LMINF_HD constexpr bool tallQueryStaysShared(int headDim) { return headDim > 80; }

// Queries and tiles, or one after the other; other shared memory follows.
LMINF_HD constexpr std::size_t tallTileBytes(int headDim) {
  const std::size_t row = static_cast<std::size_t>(headDim + kRowPadding) * 2;
  const std::size_t query = kTallRows * row;
  const std::size_t tiles = 2 * static_cast<std::size_t>(tileKeys(headDim)) * row;
  return tallQueryStaysShared(headDim) ? query + tiles : (query > tiles ? query : tiles);
}

LMINF_HD constexpr std::size_t tallSharedBytes(int headDim) {
  return tallTileBytes(headDim) + kTallRows * kTallRowBytes + kTallBlockBytes;
}

// Compute capability 9.0: one warpgroup copies, two attend to 64 rows each.
constexpr int kHopperRows = 128;
constexpr int kHopperKeys = 128;
constexpr int kHopperStages = 2;
constexpr int kHopperThreads = 384;
// 128 * 40 + 256 * 232 registers are all that 384 threads of 168 have.
constexpr int kHopperCopyRegisters = 40;
constexpr int kHopperAttendRegisters = 232;

LMINF_HD constexpr bool isHopperHeadDim(int headDim) { return headDim == 64 || headDim == 128; }

LMINF_HD constexpr std::size_t hopperSharedBytes(int headDim) {
  // Queries twice, stages of keys and values, barriers, and what aligns all of it.
  const std::size_t row = static_cast<std::size_t>(headDim) * 2;
  return 2 * kHopperRows * row + 2 * kHopperStages * kHopperKeys * row + 4 * kHopperStages * 8 +
         1024;
}

}  // namespace lminf
