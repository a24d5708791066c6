// The operator on onnxruntime's CUDA execution provider, by the kernels of ../lambda_attention.
#pragma once

#include "lambda_attention_op.h"

namespace lminf {

class CudaKernel {
 public:
  CudaKernel(const abi::Api* api, const LambdaAttentionParams& layer) : api_(api), layer_(layer) {}

  // Everything stays on the device, lengths included: the host reads none of it.
  static abi::MemoryType memoryType(size_t) { return abi::kMemoryDefault; }

  abi::Status* compute(abi::KernelContext* context) noexcept;

 private:
  const abi::Api* api_;
  const LambdaAttentionParams layer_;  // attributes and types
};

}  // namespace lminf
