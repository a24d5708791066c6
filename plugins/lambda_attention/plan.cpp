#include "plan.h"

#include <algorithm>

#include "tile_shapes.h"
#include "validate.h"

namespace lminf {
namespace {

// Writing and reading back one split's partial result costs about as much as this many tiles.
constexpr std::int64_t kSplitCostTiles = 2;
// A split brings every warp of a block a tile of its own.
constexpr std::int64_t kMinTilesPerSplit = 4;
constexpr std::int64_t kMaxDecodeBlocks = 4096;
constexpr std::int64_t kMaxTileBlocks = 384;

bool takesHopper(const LambdaAttentionParams& p, const DeviceLimits& device) {
  return device.hopper && p.dataType != DataType::kFloat32 && !p.int8Cache &&
         isHopperHeadDim(static_cast<int>(p.headDim)) &&
         hopperSharedBytes(static_cast<int>(p.headDim)) <= device.sharedBytesPerBlock;
}

AttentionKernel chooseKernel(const LambdaAttentionParams& p, std::int64_t rows,
                             const DeviceLimits& device, KernelPreference preference) {
  if (p.dataType == DataType::kFloat32) return AttentionKernel::kSimple;
  const bool wanted = preference == KernelPreference::kHopper ||
                      (preference == KernelPreference::kFastest && rows > 64);
  if (wanted && takesHopper(p, device)) return AttentionKernel::kTilesHopper;
  if (rows <= 8) return AttentionKernel::kDecode8;
  const bool large = p.headDim > kLargestDoubledHeadDim;
  if (rows <= 16 && !large) return AttentionKernel::kDecode16;
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
  }
  return 0;
}

int blocksPerMultiprocessor(const AttentionPlan& plan, int headDim, const DeviceLimits& device) {
  int blocks = 1;
  if (isDecode(plan.kernel)) blocks = decodeBlocksPerMultiprocessor(headDim, plan.rowsPerBlock / 8);
  if (plan.kernel == AttentionKernel::kTiles64) blocks = 2;
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
  return plan.kernel == AttentionKernel::kTilesHopper ? kHopperThreads
                                                      : plan.rowsPerBlock / 16 * 32;
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

int chooseSplits(std::int64_t blocks, std::int64_t tiles, std::int64_t slots, std::int64_t limit) {
  int best = 1;
  std::int64_t bestCost = ceilDiv(blocks, slots) * tiles;
  for (std::int64_t splits = 2; splits <= limit; ++splits) {
    const std::int64_t cost =
        ceilDiv(blocks * splits, slots) * (ceilDiv(tiles, splits) + kSplitCostTiles);
    if (cost < bestCost) {
      bestCost = cost;
      best = static_cast<int>(splits);
    }
  }
  return best;
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
  }
  return 0;
}

std::size_t partialBytes(const LambdaAttentionParams& p, int splits) {
  const auto rows = static_cast<std::size_t>(p.batchSize * p.numHeads * p.sequenceLength);
  return rows * static_cast<std::size_t>(p.headDim + 2) * sizeof(float) *
         static_cast<std::size_t>(splits);
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
  const std::int64_t slots =
      std::int64_t{device.multiprocessors} * blocksPerMultiprocessor(plan, headDim, device);
  plan.splits = chooseSplits(blocks, tiles, slots, limit);
  return plan;
}

}  // namespace lminf
