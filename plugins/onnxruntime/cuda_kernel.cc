#include "cuda_kernel.h"

#include <cuda_runtime_api.h>

#include <exception>
#include <map>
#include <mutex>

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

cudaError_t launchWithScratch(const LambdaAttentionParams& params, cudaStream_t stream) {
  const std::size_t bytes = workspaceSize(params);
  if (bytes == 0) return launch(params, nullptr, 0, stream);
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
