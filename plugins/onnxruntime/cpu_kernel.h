// The operator on onnxruntime's CPU execution provider.
#pragma once

#include "lambda_attention_op.h"

namespace lminf {

class CpuKernel {
 public:
  CpuKernel(const abi::Api* api, const LambdaAttentionParams& layer) : api_(api), layer_(layer) {}

  static abi::MemoryType memoryType(size_t) { return abi::kMemoryDefault; }

  abi::Status* compute(abi::KernelContext* context) noexcept;

 private:
  const abi::Api* api_;
  const LambdaAttentionParams layer_;  // attributes and types
};

}  // namespace lminf
