#include "cuda_kernel.h"

#include <cuda_runtime_api.h>

#include <exception>
#include <map>
#include <mutex>

#include "lambda_attention.h"

namespace lminf {
namespace {

DataType dataTypeOf(abi::ElementType element) {
  if (element == abi::kFloat16) return DataType::kFloat16;
  return element == abi::kBFloat16 ? DataType::kBfloat16 : DataType::kFloat32;
}

LambdaAttentionParams paramsOf(const Call& call, const Attributes& a, abi::ElementType element) {
  const Shape &query = call.shapes[kQuery], &ring = call.shapes[kPastKey];
  const auto floats = [&](Input i) { return static_cast<const float*>(call.inputs[i]); };
  const auto integers = [&](Input i) { return static_cast<const int64_t*>(call.inputs[i]); };
  LambdaAttentionParams p;
  p.query = call.inputs[kQuery], p.key = call.inputs[kKey], p.value = call.inputs[kValue];
  p.pastKey = call.inputs[kPastKey], p.pastValue = call.inputs[kPastValue];
  p.pastSinkKey = call.inputs[kPastSinkKey], p.pastSinkValue = call.inputs[kPastSinkValue];
  p.pastLength = integers(kPastLength), p.newLength = integers(kNewLength);
  p.queryPosition = integers(kQueryPosition), p.slotPosition = integers(kSlotPosition);
  p.cos = floats(kCos), p.sin = floats(kSin);
  p.limitCos = floats(kLimitCos), p.limitSin = floats(kLimitSin);
  p.alibiSlopes = floats(kAlibiSlopes), p.sinkLogits = floats(kSinkLogits);
  p.output = call.outputs[kOutput];
  p.presentKey = call.outputs[kPresentKey], p.presentValue = call.outputs[kPresentValue];
  p.presentSinkKey = call.outputs[kPresentSinkKey];
  p.presentSinkValue = call.outputs[kPresentSinkValue];
  if (a.numSinkTokens == 0 && !(p.presentSinkKey && p.presentSinkValue)) {
    p.presentSinkKey = p.presentSinkValue = nullptr;  // nobody asked for the constants
  }
  p.dataType = dataTypeOf(element);
  p.batchSize = query[0], p.numHeads = query[1], p.numKvHeads = ring[1];
  p.sequenceLength = query[2], p.capacity = ring[2], p.headDim = query[3];
  p.sinkBatchSize = call.shapes[kPastSinkKey][0];
  p.numSinkTokens = a.numSinkTokens, p.windowSize = a.windowSize;
  p.distanceLimit = a.distanceLimit, p.rotaryDim = a.rotaryDim;
  p.rotaryInterleaved = a.rotaryInterleaved != 0, p.scale = a.scale, p.softcap = a.softcap;
  // A smaller ring is one that the session grows before it wraps (docs/operator.md).
  p.growingRing = p.capacity < p.windowSize + p.sequenceLength - 1;
  return p;
}

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
    Call call;
    if (abi::Status* wrong = readCall(api_, context, attributes_, &call)) return wrong;
    if (call.shapes[kQuery][0] == 0) return nullptr;
    const LambdaAttentionParams params = paramsOf(call, attributes_, element_);
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
