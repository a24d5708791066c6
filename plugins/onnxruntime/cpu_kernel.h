// The operator on onnxruntime's CPU execution provider.
#pragma once

#include "lambda_attention_op.h"

namespace lminf {

class CpuKernel {
 public:
  CpuKernel(const abi::Api* api, const Attributes& attributes, abi::ElementType element)
      : api_(api), attributes_(attributes), element_(element) {}

  static abi::MemoryType memoryType(size_t) { return abi::kMemoryDefault; }

  abi::Status* compute(abi::KernelContext* context) noexcept;

 private:
  const abi::Api* api_;
  Attributes attributes_;
  abi::ElementType element_;
};

}  // namespace lminf
