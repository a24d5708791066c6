#include "plan.h"

#include <algorithm>

#include "tile_shapes.h"
#include "validate.h"

namespace lminf {
namespace {

// Writing and reading back one split's partial result costs about as much as this many tiles.
constexpr std::int64_t kSplitCostTiles = 2;
// What one multiprocessor of an H200 gets from memory (4.3 TB/s over 132, 32 bytes a nanosecond)
// while a warp waits once for memory (1 us), while a block starts and ends (2 us), and in a combine
// kernel (1.5 us). Estimates: the suite's step `choices` times every number of splits beside the
// plan's.
constexpr std::int64_t kTurnBytes = 32 * 1024;
constexpr std::int64_t kBlockBytes = 64 * 1024;
constexpr std::int64_t kCombineBytes = 48 * 1024;
// A split brings every warp of a block a tile of its own.
constexpr std::int64_t kMinTilesPerSplit = 4;
constexpr std::int64_t kMaxDecodeBlocks = 4096;
constexpr std::int64_t kMaxTileBlocks = 384;

bool takesHopper(const LambdaAttentionParams& p, const DeviceLimits& device) {
  return device.hopper && p.dataType != DataType::kFloat32 && !p.int8Cache &&
         isHopperHeadDim(static_cast<int>(p.headDim)) &&
         hopperSharedBytes(static_cast<int>(p.headDim)) <= device.sharedBytesPerBlock;
}

bool takesTall(const LambdaAttentionParams& p, const DeviceLimits& device) {
  return !p.int8Cache && p.headDim <= kLargestTallHeadDim &&
         tallSharedBytes(static_cast<int>(p.headDim)) <= device.sharedBytesPerBlock;
}

AttentionKernel chooseKernel(const LambdaAttentionParams& p, std::int64_t rows,
                             const DeviceLimits& device, KernelPreference preference) {
  if (p.dataType == DataType::kFloat32) return AttentionKernel::kSimple;
  const bool wanted = preference == KernelPreference::kHopper ||
                      (preference == KernelPreference::kByDevice && rows > 64);
  if (wanted && takesHopper(p, device)) return AttentionKernel::kTilesHopper;
  if (rows <= 8) return AttentionKernel::kDecode8;
  const bool large = p.headDim > kLargestDoubledHeadDim;
  if (rows <= 16 && !large) return AttentionKernel::kDecode16;
  if (preference == KernelPreference::kTall && takesTall(p, device)) {
    return AttentionKernel::kTilesTall;
  }
  return rows <= 64 || large ? AttentionKernel::kTiles64 : AttentionKernel::kTiles128;
}

int rowsPerBlock(AttentionKernel kernel) {
  switch (kernel) {
    case AttentionKernel::kSimple: return kSimpleWarps;
    case AttentionKernel::kDecode8: return 8;
    case AttentionKernel::kDecode16: return 16;
    case AttentionKernel::kTiles64: return 64;
    case AttentionKernel::kTiles128: return 128;
    case AttentionKernel::kTilesHopper: return kHopperRows;
    case AttentionKernel::kTilesTall: return kTallRows;
  }
  return 0;
}

int blocksPerMultiprocessor(const AttentionPlan& plan, int headDim, const DeviceLimits& device) {
  int blocks = 1;
  if (isDecode(plan.kernel)) blocks = decodeBlocksPerMultiprocessor(headDim, plan.rowsPerBlock / 8);
  if (plan.kernel == AttentionKernel::kTiles64 || plan.kernel == AttentionKernel::kTilesTall) {
    blocks = 2;
  }
  // The runtime keeps 1 KiB of shared memory for itself in every block.
  const std::size_t fit = device.sharedBytesPerMultiprocessor / (plan.sharedBytes + 1024);
  return std::max(1, std::min(blocks, static_cast<int>(std::min<std::size_t>(fit, 16))));
}

// Blocks that a split plan may have, which bounds the workspace for every batch size.
std::int64_t maxBlocks(AttentionKernel kernel) {
  return isDecode(kernel) ? kMaxDecodeBlocks : kMaxTileBlocks;
}

int threadsOf(const AttentionPlan& plan) {
  if (isDecode(plan.kernel)) return kDecodeWarps * 32;
  if (plan.kernel == AttentionKernel::kTilesHopper) return kHopperThreads;
  if (plan.kernel == AttentionKernel::kTilesTall) return kTallWarps * 32;
  return plan.rowsPerBlock / 16 * 32;
}

int keysPerTile(AttentionKernel kernel, int headDim) {
  if (isDecode(kernel)) return kDecodeKeys;
  return kernel == AttentionKernel::kTilesHopper ? kHopperKeys : tileKeys(headDim);
}

// The keys that one block walks over: its rows are steps of one head, at most S of them, and all
// that they see of the ring is the window of the first to the last.
std::int64_t keysOfBlock(const LambdaAttentionParams& p, const AttentionPlan& plan) {
  const std::int64_t steps = isDecode(plan.kernel)
                                 ? p.sequenceLength
                                 : std::min<std::int64_t>(p.sequenceLength, plan.rowsPerBlock);
  return std::min(p.capacity, std::min(p.windowSize, p.capacity) + steps - 1) + p.numSinkTokens;
}

// The splits, at most `limit`, with the smallest cost; the fewest of those.
template <class Cost>
int chooseSplits(std::int64_t limit, const Cost& cost) {
  std::int64_t best = 1;
  for (std::int64_t splits = 2; splits <= limit; ++splits) {
    if (cost(splits) < cost(best)) best = splits;
  }
  return static_cast<int>(best);
}

// A chunk is bound by arithmetic: waves of blocks, each of so many tiles.
std::int64_t chunkCost(std::int64_t blocks, std::int64_t tiles, std::int64_t slots,
                       std::int64_t splits) {
  const std::int64_t perBlock = ceilDiv(tiles, splits) + (splits > 1 ? kSplitCostTiles : 0);
  return ceilDiv(blocks * splits, slots) * perBlock;
}

// Decoding is bound by memory, whose bandwidth the blocks on a multiprocessor share: so it takes
// the bytes of the busiest one, or if that is more, the turns in which its warps wait for a tile
// each. In bytes that one multiprocessor gets from memory in the same time.
std::int64_t decodeCost(std::int64_t blocks, std::int64_t tiles, std::int64_t tileBytes,
                        const DeviceLimits& device, int resident, std::int64_t splits) {
  const std::int64_t most = ceilDiv<std::int64_t>(blocks * splits, device.multiprocessors);
  const std::int64_t perBlock = ceilDiv(tiles, splits);
  const std::int64_t waves = ceilDiv<std::int64_t>(most, resident);
  const std::int64_t turns = waves * ceilDiv<std::int64_t>(perBlock, kDecodeWarps);
  return std::max(most * perBlock * tileBytes, turns * kTurnBytes) + waves * kBlockBytes +
         (splits > 1 ? kCombineBytes : 0);
}

}  // namespace

bool isDecode(AttentionKernel kernel) {
  return kernel == AttentionKernel::kDecode8 || kernel == AttentionKernel::kDecode16;
}

bool isSupportedHeadDim(std::int64_t headDim) {
  return headDim == 32 || headDim == 64 || headDim == 80 || headDim == 96 || headDim == 128 ||
         headDim == 256;
}

std::size_t sharedBytes(AttentionKernel kernel, int headDim) {
  switch (kernel) {
    case AttentionKernel::kSimple: return 0;
    case AttentionKernel::kDecode8: return decodeSharedBytes(headDim, 1);
    case AttentionKernel::kDecode16: return decodeSharedBytes(headDim, 2);
    case AttentionKernel::kTiles64: return tilesSharedBytes(headDim, 64);
    case AttentionKernel::kTiles128: return tilesSharedBytes(headDim, 128);
    case AttentionKernel::kTilesHopper: return hopperSharedBytes(headDim);
    case AttentionKernel::kTilesTall: return tallSharedBytes(headDim);
  }
  return 0;
}

std::size_t partialBytes(const LambdaAttentionParams& p, int splits) {
  const auto rows = static_cast<std::size_t>(p.batchSize * p.numHeads * p.sequenceLength);
  return rows * static_cast<std::size_t>(p.headDim + 2) * sizeof(float) *
         static_cast<std::size_t>(splits);
}

std::size_t arrivalBytes(const LambdaAttentionParams& p) {
  return static_cast<std::size_t>(p.batchSize * p.numKvHeads) * sizeof(std::uint32_t);
}

std::size_t workspaceSize(const LambdaAttentionParams& p) {
  if (p.dataType == DataType::kFloat32 || !validateSettings(p).empty()) return 0;
  // Every smaller shape of the same layer must fit too, so each kernel that one of them could
  // run is counted with its most rows: rows per block times blocks, or 64 splits of all rows.
  const std::int64_t rows = p.numHeads / p.numKvHeads * p.sequenceLength;
  const std::int64_t decodeRows = std::min<std::int64_t>(rows, 16) * kMaxDecodeBlocks;
  const std::int64_t tileRows = rows > 8 ? std::min<std::int64_t>(rows, 128) * kMaxTileBlocks : 0;
  const std::int64_t allRows = p.batchSize * p.numHeads * p.sequenceLength * kMaxSplits;
  const std::int64_t most = std::min(std::max(decodeRows, tileRows), allRows);
  return static_cast<std::size_t>(most) * static_cast<std::size_t>(p.headDim + 2) * sizeof(float);
}

AttentionPlan planAttention(const LambdaAttentionParams& p, const DeviceLimits& device,
                            std::size_t workspaceBytes, KernelPreference preference) {
  const std::int64_t rows = p.numHeads / p.numKvHeads * p.sequenceLength;
  const int headDim = static_cast<int>(p.headDim);
  AttentionPlan plan;
  plan.kernel = chooseKernel(p, rows, device, preference);
  plan.rowsPerBlock = rowsPerBlock(plan.kernel);
  plan.sharedBytes = sharedBytes(plan.kernel, headDim);
  plan.splits = 1;
  if (plan.kernel == AttentionKernel::kSimple) {
    plan.threads = kSimpleWarps * 32;
    plan.keysPerTile = 1;
    plan.rowBlocks = static_cast<int>(
        ceilDiv<std::int64_t>(p.batchSize * p.numHeads * p.sequenceLength, kSimpleWarps));
    return plan;
  }
  plan.rowBlocks = static_cast<int>(ceilDiv<std::int64_t>(rows, plan.rowsPerBlock));
  plan.threads = threadsOf(plan);
  plan.keysPerTile = keysPerTile(plan.kernel, headDim);

  const std::int64_t blocks = p.batchSize * p.numKvHeads * plan.rowBlocks;
  const std::int64_t tiles = ceilDiv<std::int64_t>(keysOfBlock(p, plan), plan.keysPerTile);
  const std::int64_t leastTiles = isDecode(plan.kernel) ? kMinTilesPerSplit : 2;
  const std::int64_t fitting = static_cast<std::int64_t>(workspaceBytes / partialBytes(p, 1));
  const std::int64_t limit = std::min(
      {std::int64_t{kMaxSplits}, tiles / leastTiles, fitting, maxBlocks(plan.kernel) / blocks});
  const int resident = blocksPerMultiprocessor(plan, headDim, device);
  if (isDecode(plan.kernel)) {
    const std::int64_t elementBytes = p.int8Cache ? 1 : 2;
    const std::int64_t tileBytes = 2 * elementBytes * p.headDim * plan.keysPerTile;
    plan.splits = chooseSplits(limit, [&](std::int64_t splits) {
      return decodeCost(blocks, tiles, tileBytes, device, resident, splits);
    });
  } else {
    const std::int64_t slots = std::int64_t{device.multiprocessors} * resident;
    plan.splits = chooseSplits(
        limit, [&](std::int64_t splits) { return chunkCost(blocks, tiles, slots, splits); });
  }
  return plan;
}

}  // namespace lminf
