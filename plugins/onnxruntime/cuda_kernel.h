// The operator on onnxruntime's CUDA execution provider, by the kernels of ../lambda_attention.
#pragma once

#include "lambda_attention_op.h"

namespace lminf {

class CudaKernel {
 public:
  CudaKernel(const abi::Api* api, const Attributes& attributes, abi::ElementType element)
      : api_(api), attributes_(attributes), element_(element) {}

  // Everything stays on the device, lengths included: the host reads none of it.
  static abi::MemoryType memoryType(size_t) { return abi::kMemoryDefault; }

  abi::Status* compute(abi::KernelContext* context) noexcept;

 private:
  const abi::Api* api_;
  Attributes attributes_;
  abi::ElementType element_;
};

}  // namespace lminf
