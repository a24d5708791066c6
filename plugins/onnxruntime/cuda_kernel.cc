#include "cuda_kernel.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <utility>

#include "lambda_attention.h"
#include "plan.h"
#include "validate.h"

namespace lminf {
namespace {

// Scratch memory in the order of the stream, from a pool of our own that keeps what it has: after
// the first steps nothing is asked of the driver, and a CUDA graph can capture it.
cudaError_t poolOfDevice(cudaMemPool_t* pool) {
  static std::mutex mutex;
  static std::map<int, cudaMemPool_t> pools;
  int device = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaMemPool_t& found = pools[device];
  if (found == nullptr) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    cudaError_t status = cudaMemPoolCreate(&found, &properties);
    if (status != cudaSuccess) return status;
    std::uint64_t keep = UINT64_MAX;
    status = cudaMemPoolSetAttribute(found, cudaMemPoolAttrReleaseThreshold, &keep);
    if (status != cudaSuccess) return status;
  }
  *pool = found;
  return cudaSuccess;
}

// The scratch memory of a stream. Its nodes run one after the other, so all share one block, which
// stays: a captured graph holds its address. It grows in steps that at least double, and what it
// outgrew stays, too, for graphs captured before.
struct Scratch {
  void* block = nullptr;
  std::size_t bytes = 0;
};

// Null where it would have to grow while a graph is captured.
cudaError_t scratchOfStream(std::size_t bytes, cudaStream_t stream, void** block) {
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, Scratch> scratches;
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const std::lock_guard<std::mutex> lock(mutex);
  Scratch& found = scratches[{device, stream}];
  if (found.bytes < bytes) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    status = cudaStreamIsCapturing(stream, &capture);
    if (status != cudaSuccess || capture != cudaStreamCaptureStatusNone) return status;
    const std::size_t larger = std::max(bytes, 2 * found.bytes);
    cudaMemPool_t pool = nullptr;
    status = poolOfDevice(&pool);
    if (status != cudaSuccess) return status;
    void* fresh = nullptr;
    status = cudaMallocFromPoolAsync(&fresh, larger, pool, stream);
    if (status != cudaSuccess) return status;
    found = {fresh, larger};
  }
  *block = found.block;
  return cudaSuccess;
}

// An allocation within a capture becomes part of the graph, and so does giving it back.
cudaError_t launchWithOwnScratch(const LambdaAttentionParams& params, std::size_t bytes,
                                 cudaStream_t stream) {
  cudaMemPool_t pool = nullptr;
  cudaError_t status = poolOfDevice(&pool);
  if (status != cudaSuccess) return status;
  void* workspace = nullptr;
  status = cudaMallocFromPoolAsync(&workspace, bytes, pool, stream);
  if (status != cudaSuccess) return status;
  status = launch(params, workspace, bytes, stream);
  const cudaError_t freed = cudaFreeAsync(workspace, stream);
  return status != cudaSuccess ? status : freed;
}

cudaError_t launchWithScratch(const LambdaAttentionParams& params, cudaStream_t stream) {
  const std::size_t bytes = workspaceSize(params);
  void* block = nullptr;
  if (bytes > 0) {
    const cudaError_t status = scratchOfStream(bytes, stream, &block);
    if (status != cudaSuccess) return status;
    if (block == nullptr) return launchWithOwnScratch(params, bytes, stream);
  }
  return launch(params, block, bytes, stream);
}

}  // namespace

abi::Status* CudaKernel::compute(abi::KernelContext* context) noexcept {
  try {
    LambdaAttentionParams params = layer_;
    if (abi::Status* wrong = readCall(api_, context, &params)) return wrong;
    if (params.batchSize == 0) return nullptr;
    if (params.numSinkTokens == 0 && !(params.presentSinkKey && params.presentSinkValue)) {
      params.presentSinkKey = params.presentSinkValue = nullptr;  // constants that are not read
    }
    // A smaller ring is one that the session grows before it wraps (docs/operator.md).
    params.growingRing = params.capacity < leastSlots(params.windowSize, params.sequenceLength);
    const std::string problem = validate(params);
    if (!problem.empty()) return invalid(api_, problem);
    void* stream = nullptr;
    if (abi::Status* wrong =
            abi::call<abi::kKernelContextGetGpuComputeStream>(api_, context, &stream)) {
      return wrong;
    }
    const cudaError_t status = launchWithScratch(params, static_cast<cudaStream_t>(stream));
    if (status == cudaSuccess) return nullptr;
    return invalid(api_, std::string("CUDA: ") + cudaGetErrorString(status));
  } catch (const std::exception& error) {
    return invalid(api_, error.what());
  }
}

}  // namespace lminf
