// lminf::Linear and lminf::LinearAdd version 1 on onnxruntime's CPU execution provider.
//
//   Linear(x (M, K), weight (N, K)) → (M, N) = x · weightᵀ
//   LinearAdd(x, weight, addend (N) or (M, N)) → x · weightᵀ + addend
//
// Their function bodies are Gemm. This kernel reads the weight in place: onnxruntime's Gemm makes
// a packed copy of it in memory of its own.
#pragma once

#include <utility>

#include "mapped_weight.h"
#include "ort_abi.h"
#include "tensor.h"

namespace lminf {

class LinearKernel {
 public:
  LinearKernel(const abi::Api* api, abi::ElementType element, bool adds, InputTensors inputs)
      : api_(api), element_(element), adds_(adds), inputs_(std::move(inputs)) {}

  abi::Status* compute(abi::KernelContext* context) noexcept;

 private:
  abi::Status* run(abi::KernelContext* context);
  abi::Status* invalid(const char* what) const;

  const abi::Api* api_;
  abi::ElementType element_;
  bool adds_;
  InputTensors inputs_;
  MappedWeight weight_;
};

// What every product with a weight tells onnxruntime alike: one result, and inputs of its
// element type.
template <abi::ElementType element, size_t numInputs>
struct MatrixOp : abi::CustomOp {
  MatrixOp() noexcept : abi::CustomOp{} {
    version = abi::kApiVersion;
    getExecutionProviderType = [](const abi::CustomOp*) { return "CPUExecutionProvider"; };
    getInputTypeCount = [](const abi::CustomOp*) { return numInputs; };
    getInputType = [](const abi::CustomOp*, size_t) { return element; };
    getOutputTypeCount = [](const abi::CustomOp*) -> size_t { return 1; };
    getOutputType = [](const abi::CustomOp*, size_t) { return element; };
    getInputCharacteristic = [](const abi::CustomOp*, size_t) { return abi::kRequired; };
    getOutputCharacteristic = [](const abi::CustomOp*, size_t) { return abi::kRequired; };
    getInputMemoryType = [](const abi::CustomOp*, size_t) { return abi::kMemoryDefault; };
    getStartVersion = [](const abi::CustomOp*) { return 1; };
    getEndVersion = [](const abi::CustomOp*) { return 1; };
  }
};

template <abi::ElementType element, bool adds>
struct LinearOp : MatrixOp<element, adds ? 3 : 2> {
  LinearOp() noexcept {
    this->getName = [](const abi::CustomOp*) { return adds ? "LinearAdd" : "Linear"; };
    this->createKernelV2 = [](const abi::CustomOp*, const abi::Api* api,
                              const abi::KernelInfo* info, void** kernel) -> abi::Status* {
      InputTensors inputs;
      if (abi::Status* wrong = inputs.keepConstants(api, info, adds ? 3 : 2)) return wrong;
      *kernel = new LinearKernel(api, element, adds, std::move(inputs));
      return nullptr;
    };
    this->kernelComputeV2 = [](void* kernel, abi::KernelContext* context) {
      return static_cast<LinearKernel*>(kernel)->compute(context);
    };
    this->kernelDestroy = [](void* kernel) { delete static_cast<LinearKernel*>(kernel); };
  }
};

}  // namespace lminf
