// lminf::LambdaAttention and its two forms over rings of int8 as onnxruntime sees them.
//
// What is here is the same for every execution provider; a provider adds a kernel with the members
// that `Op` asks for, and one line for each element type in register.cc. Names, element types and
// rules are those of ../operator.
#pragma once

#include <string>

#include "../operator/rules.h"
#include "ort_abi.h"
#include "tensor.h"

namespace lminf {

// A message for onnxruntime; null is success, as everywhere in its API.
abi::Status* invalid(const abi::Api* api, const std::string& message);

// Reads and checks the node's attributes. Returns null, or what is wrong.
abi::Status* readAttributes(const abi::Api* api, const abi::KernelInfo* info, Attributes* out);

// Reads the inputs of one call, checks them, and allocates or finds the outputs. Fills sizes and
// tensors of `params`, which holds the node's attributes and types. Returns null, or what is wrong.
abi::Status* readCall(const abi::Api* api, abi::KernelContext* context,
                      LambdaAttentionParams* params);

// The element type of an input or output where T is `element`.
abi::ElementType typeOf(const Operand& operand, abi::ElementType element, bool int8Cache);

// One operator for one element type on one provider: a static description that onnxruntime keeps a
// pointer to. Its kernel is a class K with K(const Api*, const LambdaAttentionParams&), whose
// params hold attributes and types of the node, static MemoryType memoryType(size_t input), and
// Status* compute(KernelContext*) noexcept.
template <abi::ElementType element, typename Kernel, bool int8Cache = false,
          bool hasKeyBias = false>
struct Op : abi::CustomOp {
  explicit Op(const char* provider) noexcept : abi::CustomOp{}, provider(provider) {
    version = abi::kApiVersion;
    getName = [](const abi::CustomOp*) {
      return hasKeyBias ? kKeyBiasName : int8Cache ? kInt8CacheName : kName;
    };
    getExecutionProviderType = [](const abi::CustomOp* op) {
      return static_cast<const Op*>(op)->provider;
    };
    getInputTypeCount = [](const abi::CustomOp*) -> size_t {
      return numInputs(int8Cache, hasKeyBias);
    };
    getInputType = [](const abi::CustomOp*, size_t i) {
      return typeOf(kInputs[i], element, int8Cache);
    };
    getOutputTypeCount = [](const abi::CustomOp*) -> size_t {
      return int8Cache ? kNumInt8CacheOutputs : kNumOutputs;
    };
    getOutputType = [](const abi::CustomOp*, size_t i) {
      return typeOf(kOutputs[i], element, int8Cache);
    };
    getInputCharacteristic = [](const abi::CustomOp*, size_t) { return abi::kRequired; };
    getOutputCharacteristic = [](const abi::CustomOp*, size_t) { return abi::kRequired; };
    getInputMemoryType = [](const abi::CustomOp*, size_t i) { return Kernel::memoryType(i); };
    getStartVersion = [](const abi::CustomOp*) { return kVersion; };
    getEndVersion = [](const abi::CustomOp*) { return kVersion; };
    createKernelV2 = create;
    kernelComputeV2 = [](void* kernel, abi::KernelContext* context) {
      return static_cast<Kernel*>(kernel)->compute(context);
    };
    kernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static abi::Status* LMINF_ORT_CALL create(const abi::CustomOp*, const abi::Api* api,
                                            const abi::KernelInfo* info, void** kernel) {
    LambdaAttentionParams layer;
    if (abi::Status* wrong = readAttributes(api, info, &layer)) return wrong;
    layer.dataType = dataTypeOf(element);
    layer.int8Cache = int8Cache;
    layer.hasKeyBias = hasKeyBias;
    *kernel = new Kernel(api, layer);
    return nullptr;
  }

  const char* provider;
};

}  // namespace lminf
