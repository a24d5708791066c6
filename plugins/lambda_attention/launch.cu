#include "lambda_attention.h"

#include <cstdint>

#include "kernels.h"
#include "ring.cuh"
#include "tile_shapes.h"
#include "validate.h"

namespace lminf {
namespace {

std::size_t ringElementBytes(const LambdaAttentionParams& p) {
  if (p.int8Cache) return 1;
  return p.dataType == DataType::kFloat32 ? 4 : 2;
}

KernelArguments argumentsOf(const LambdaAttentionParams& p) {
  KernelArguments a{};
  static_cast<Tensors&>(a) = p;
  a.windowSize = p.windowSize;
  a.batchSize = static_cast<int>(p.batchSize);
  a.numKvHeads = divisorOf(static_cast<int>(p.numKvHeads));
  a.group = static_cast<int>(p.numHeads / p.numKvHeads);
  a.sequenceLength = divisorOf(static_cast<int>(p.sequenceLength));
  a.capacity = divisorOf(static_cast<int>(p.capacity));
  a.numSinkTokens = static_cast<int>(p.numSinkTokens);
  a.sinkSlots = larger(a.numSinkTokens, 1);
  a.sinkBatch = p.sinkBatchSize == 0 ? a.batchSize : static_cast<int>(p.sinkBatchSize);
  a.windowLimit = static_cast<int>(smaller<std::int64_t>(p.windowSize, kLargestWindow));
  a.rotaryDim = static_cast<int>(p.rotaryDim);
  a.rotaryInterleaved = p.rotaryInterleaved != 0;
  a.copySinkKey = p.presentSinkKey != nullptr && p.presentSinkKey != p.pastSinkKey;
  a.copySinkValue = p.presentSinkValue != nullptr && p.presentSinkValue != p.pastSinkValue;
  // Without sink tokens a shared constant may stand on both sides: it stays as it is.
  a.writeSinks = p.numSinkTokens > 0 || (a.copySinkKey && a.copySinkValue);
  a.scale = p.scale;
  a.softcap = p.softcap;
  a.limitDistance = static_cast<float>(p.distanceLimit);
  return a;
}

// The driver whose CUDA graphs know of kernels that start early: CUDA 12.3 introduced such edges.
constexpr int kGraphsKnowEarlyStart = 12030;

cudaError_t mayStartEarly(const DeviceLimits& limits, bool& may) {
  may = false;
  if (limits.computeCapability < kWaitingCode) return cudaSuccess;
  int driver = 0;
  const cudaError_t status = cudaDriverGetVersion(&driver);
  may = driver >= kGraphsKnowEarlyStart;
  return status;
}

// Copies the past of a cache of `rowBytes` a slot where the present is another.
cudaError_t copySlots(const void* past, void* present, const LambdaAttentionParams& p,
                      std::size_t rowBytes, cudaStream_t stream) {
  if (past == present) return cudaSuccess;
  const std::size_t rows =
      static_cast<std::size_t>(p.batchSize * p.numKvHeads) * static_cast<std::size_t>(p.capacity);
  return cudaMemcpyAsync(present, past, rows * rowBytes, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t copyRings(const LambdaAttentionParams& p, cudaStream_t stream) {
  const std::size_t row = static_cast<std::size_t>(p.headDim) * ringElementBytes(p);
  cudaError_t status = copySlots(p.pastKey, p.presentKey, p, row, stream);
  if (status == cudaSuccess) status = copySlots(p.pastValue, p.presentValue, p, row, stream);
  if (status != cudaSuccess || !p.int8Cache) return status;
  status = copySlots(p.pastKeyScale, p.presentKeyScale, p, sizeof(float), stream);
  if (status != cudaSuccess) return status;
  return copySlots(p.pastValueScale, p.presentValueScale, p, sizeof(float), stream);
}

// Whether this library holds kTilesHopper.
constexpr bool hasHopper() {
#if defined(LMINF_HOPPER)
  return true;
#else
  return false;
#endif
}

cudaError_t readLimits(DeviceLimits& limits) {
  int device = 0, multiprocessors = 0, perBlock = 0, perMultiprocessor = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&perBlock, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&perMultiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                  device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  limits.computeCapability = 10 * major + minor;
  limits.multiprocessors = multiprocessors;
  limits.sharedBytesPerBlock = static_cast<std::size_t>(perBlock);
  limits.sharedBytesPerMultiprocessor = static_cast<std::size_t>(perMultiprocessor);
  limits.hopper = hasHopper() && limits.computeCapability == 90;
  return status;
}

template <class T, class Ring>
cudaError_t enqueueChunk(const KernelArguments& a, const AttentionPlan& plan, int headDim,
                         cudaStream_t stream) {
  if constexpr (!isRounded<T, Ring>()) {
#if defined(LMINF_HOPPER)
    if (plan.kernel == AttentionKernel::kTilesHopper) {
      return enqueueTilesHopper<T>(a, plan, headDim, stream);
    }
#endif
    if (plan.kernel == AttentionKernel::kTilesTall) {
      return enqueueTilesTall<T>(a, plan, headDim, stream);
    }
  }
  return enqueueTiles<T, Ring>(a, plan, headDim, stream);
}

template <class T, class Ring>
cudaError_t attend(const KernelArguments& a, const AttentionPlan& plan, int headDim,
                   cudaStream_t stream) {
  const bool isDecode = lminf::isDecode(plan.kernel);
  const cudaError_t status = isDecode ? enqueueDecode<T, Ring>(a, plan, headDim, stream)
                                      : enqueueChunk<T, Ring>(a, plan, headDim, stream);
  if (status != cudaSuccess || plan.splits == 1 || a.arrivals != nullptr) return status;
  return enqueueCombine<T>(a, headDim, a.startsEarly && isDecode, stream);
}

template <class Ring>
cudaError_t runSimple(const KernelArguments& a, const AttentionPlan& plan, int headDim,
                      cudaStream_t stream) {
  const cudaError_t status = enqueueAppend<float, Ring>(a, headDim, stream);
  return status != cudaSuccess ? status : enqueueSimple<Ring>(a, plan, headDim, stream);
}

template <class T, class Ring>
cudaError_t runTensorCores(const KernelArguments& a, const AttentionPlan& plan, int headDim,
                           cudaStream_t stream) {
  const cudaError_t status =
      a.appendsInDecode ? cudaSuccess : enqueueAppend<T, Ring>(a, headDim, stream);
  return status != cudaSuccess ? status : attend<T, Ring>(a, plan, headDim, stream);
}

cudaError_t appendAndAttend(const KernelArguments& a, const AttentionPlan& plan,
                            const LambdaAttentionParams& p, cudaStream_t stream) {
  const int headDim = static_cast<int>(p.headDim);
  switch (p.dataType) {
    case DataType::kFloat32:
      return p.int8Cache ? runSimple<Int8>(a, plan, headDim, stream)
                         : runSimple<float>(a, plan, headDim, stream);
    case DataType::kFloat16:
      return p.int8Cache ? runTensorCores<Half, Int8>(a, plan, headDim, stream)
                         : runTensorCores<Half, Half>(a, plan, headDim, stream);
    case DataType::kBfloat16:
      return p.int8Cache ? runTensorCores<Bfloat16, Int8>(a, plan, headDim, stream)
                         : runTensorCores<Bfloat16, Bfloat16>(a, plan, headDim, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch(const LambdaAttentionParams& params, void* workspace, std::size_t workspaceBytes,
                   cudaStream_t stream) {
  return launchWith(params, LaunchChoices{}, workspace, workspaceBytes, stream);
}

cudaError_t launchWith(const LambdaAttentionParams& params, const LaunchChoices& choices,
                       void* workspace, std::size_t workspaceBytes, cudaStream_t stream) {
  if (!validate(params).empty()) return cudaErrorInvalidValue;
  if (reinterpret_cast<std::uintptr_t>(workspace) % 16 != 0) return cudaErrorInvalidValue;
  if (reinterpret_cast<std::uintptr_t>(choices.arrivals) % sizeof(std::uint32_t) != 0) {
    return cudaErrorInvalidValue;
  }
  if (workspace == nullptr) workspaceBytes = 0;
  DeviceLimits limits;
  cudaError_t status = readLimits(limits);
  if (status != cudaSuccess) return status;
  AttentionPlan plan = planAttention(params, limits, workspaceBytes, choices.preference);
  if (choices.splits > 0) {
    const bool fits = choices.splits <= kMaxSplits && plan.kernel != AttentionKernel::kSimple &&
                      partialBytes(params, choices.splits) <= workspaceBytes;
    if (!fits) return cudaErrorInvalidValue;
    plan.splits = choices.splits;
  }
  if (plan.sharedBytes > limits.sharedBytesPerBlock) return cudaErrorInvalidConfiguration;
  bool startsEarly = false;
  status = mayStartEarly(limits, startsEarly);
  if (status != cudaSuccess) return status;

  KernelArguments arguments = argumentsOf(params);
  arguments.rowBlocks = divisorOf(plan.rowBlocks);
  arguments.splits = divisorOf(plan.splits);
  arguments.startsEarly = choices.startsEarly && startsEarly;
  // A single token is no query's sink yet, and its slot is in one block's tile.
  arguments.appendsInDecode = choices.appendsInDecode && isDecode(plan.kernel) &&
                              params.sequenceLength == 1 && !arguments.copySinkKey &&
                              !arguments.copySinkValue;
  const std::int64_t partialRows =
      params.batchSize * params.numHeads * params.sequenceLength * plan.splits;
  arguments.partialOutput = static_cast<float*>(workspace);
  arguments.partialStats = arguments.partialOutput + partialRows * params.headDim;
  const bool combinesInDecode = isDecode(plan.kernel) && plan.splits > 1;
  arguments.arrivals = combinesInDecode ? choices.arrivals : nullptr;

  status = copyRings(params, stream);
  if (status != cudaSuccess) return status;
  return appendAndAttend(arguments, plan, params, stream);
}

}  // namespace lminf
