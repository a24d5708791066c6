// lminf::LinearNBits and lminf::LinearNBitsAdd version 1 on onnxruntime's CPU execution provider.
//
//   LinearNBits(x (M, K), weight, scales[, zero_points]) → (M, N) = x · weightᵀ
//   LinearNBitsAdd(x, weight, scales, addend (N) or (M, N)[, zero_points]) → x · weightᵀ + addend
//
// with attributes and storage of onnxruntime's MatMulNBits, which is in their function bodies:
// weight (N, ⌈K / block_size⌉, bytes of a block) uint8, scales (N, ⌈K / block_size⌉), zero points
// (N, bytes) uint8. Scales may be float16 where all else is float32. This kernel reads them in
// place: MatMulNBits makes a packed copy.
#pragma once

#include <utility>

#include "linear_op.h"
#include "mapped_weight.h"

namespace lminf {

struct NBitsAttributes {
  int64_t inFeatures, outFeatures, bits, blockSize, accuracyLevel;
};

// Reads and checks the node's attributes; null or what is wrong.
abi::Status* readAttributes(const abi::Api* api, const abi::KernelInfo* info, NBitsAttributes* out);

class LinearNBitsKernel {
 public:
  LinearNBitsKernel(const abi::Api* api, const NBitsAttributes& attributes,
                    abi::ElementType element, abi::ElementType scaleElement, bool adds,
                    InputTensors inputs)
      : api_(api), attributes_(attributes), element_(element), scaleElement_(scaleElement),
        adds_(adds), inputs_(std::move(inputs)) {}

  abi::Status* compute(abi::KernelContext* context) noexcept;

 private:
  abi::Status* run(abi::KernelContext* context);
  abi::Status* invalid(const std::string& what) const;

  const abi::Api* api_;
  NBitsAttributes attributes_;
  abi::ElementType element_, scaleElement_;
  bool adds_;
  InputTensors inputs_;
  MappedWeight packed_, scales_, zeros_;
};

template <abi::ElementType element, bool adds, abi::ElementType scales = element>
struct LinearNBitsOp : MatrixOp<element, adds ? 5 : 4> {
  LinearNBitsOp() noexcept {
    this->getName = [](const abi::CustomOp*) { return adds ? "LinearNBitsAdd" : "LinearNBits"; };
    this->getInputType = [](const abi::CustomOp*, size_t i) {
      if (i == 2) return scales;
      return i == 1 || i == (adds ? 4 : 3) ? abi::kUint8 : element;
    };
    this->getInputCharacteristic = [](const abi::CustomOp*, size_t i) {
      return i == (adds ? 4 : 3) ? abi::kOptional : abi::kRequired;
    };
    this->createKernelV2 = [](const abi::CustomOp*, const abi::Api* api,
                              const abi::KernelInfo* info, void** kernel) -> abi::Status* {
      NBitsAttributes attributes{};
      if (abi::Status* wrong = readAttributes(api, info, &attributes)) return wrong;
      InputTensors inputs;
      if (abi::Status* wrong = inputs.keepConstants(api, info, adds ? 5 : 4)) return wrong;
      *kernel = new LinearNBitsKernel(api, attributes, element, scales, adds, std::move(inputs));
      return nullptr;
    };
    this->kernelComputeV2 = [](void* kernel, abi::KernelContext* context) {
      return static_cast<LinearNBitsKernel*>(kernel)->compute(context);
    };
    this->kernelDestroy = [](void* kernel) { delete static_cast<LinearNBitsKernel*>(kernel); };
  }
};

}  // namespace lminf
