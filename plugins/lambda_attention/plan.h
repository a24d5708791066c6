// Which kernel runs, on which grid, with how many splits: a pure function of the sizes, so that it
// can be tested without a device and does not read lengths (a captured graph stays valid).
#pragma once

#include <cstddef>
#include <cstdint>

#include "../operator/params.h"

namespace lminf {

enum class AttentionKernel : std::int32_t {
  kSimple = 0,       // float32: one warp per query row
  kDecode8 = 1,      // up to 8 query rows per key/value head
  kDecode16 = 2,     // up to 16
  kTiles64 = 3,      // tiles of 64 query rows, keys through shared memory
  kTiles128 = 4,     // tiles of 128
  kTilesHopper = 5,  // tiles of 128 on compute capability 9.0
  kTilesTall = 6,    // tiles of 128, a warp takes 32 rows and not 16
};

// Which kernels may be chosen, for measurements and tests.
enum class KernelPreference : std::int32_t {
  kPortable = 0,  // only those that every device runs
  kByDevice = 1,  // and those of the device, where the shape is theirs
  kHopper = 2,    // kTilesHopper for any number of rows, where device and layer allow it
  kTall = 3,      // kTilesTall for more rows than decode takes, where device and layer allow it
};
// kTilesHopper and kTilesTall have run in the emulation only: they are not chosen until a device
// has run and timed them (gpu.md).
constexpr KernelPreference kDefaultPreference = KernelPreference::kPortable;

struct DeviceLimits {
  int computeCapability = 90;
  int multiprocessors = 132;
  std::size_t sharedBytesPerBlock = 101376;  // opt-in maximum; the smallest is that of sm_86/89
  std::size_t sharedBytesPerMultiprocessor = 102400;
  bool hopper = false;  // compute capability 9.0, and the library holds code for sm_90a
};

struct AttentionPlan {
  AttentionKernel kernel = AttentionKernel::kSimple;
  int rowsPerBlock = 0;  // query rows a block takes
  int rowBlocks = 0;     // blocks that share one key/value head
  int splits = 0;        // parts the keys of a row are split into; 1 means no combine kernel
  int threads = 0;
  int keysPerTile = 0;
  std::size_t sharedBytes = 0;
};

bool isDecode(AttentionKernel kernel);

bool isSupportedHeadDim(std::int64_t headDim);

// Dynamic shared memory of a kernel, bytes.
std::size_t sharedBytes(AttentionKernel kernel, int headDim);

// Bytes that `splits` parts of every query row take: D + 2 floats each.
std::size_t partialBytes(const LambdaAttentionParams& params, int splits);

// Bytes of LaunchChoices::arrivals: a counter for each key/value head of each row of the batch.
std::size_t arrivalBytes(const LambdaAttentionParams& params);

// Bytes of scratch memory `launch` can make use of. Grows with every size, so the answer for the
// largest shapes of a profile covers the smaller ones. Needs no device. With less memory (even
// none) launch still computes the same, with fewer splits of the keys, more slowly.
std::size_t workspaceSize(const LambdaAttentionParams& params);

// The plan of valid params. Splits are chosen so that the last wave of blocks is not a small
// rest, and fit into workspaceBytes.
AttentionPlan planAttention(const LambdaAttentionParams& params, const DeviceLimits& device,
                            std::size_t workspaceBytes,
                            KernelPreference preference = kDefaultPreference);

}  // namespace lminf
