// lminf::LambdaAttention version 1 as onnxruntime sees it: inputs, outputs, attributes, shapes.
// LambdaAttentionInt8Cache is the same over rings of int8, whose scales stand behind all else.
//
// What is here is the same for every execution provider; a provider adds a kernel by deriving
// from `OpBase` and one line in register.cc.
#pragma once

#include <array>
#include <string>

#include "ort_abi.h"
#include "tensor.h"

namespace lminf {

constexpr const char* kDomain = "lminf";
constexpr const char* kName = "LambdaAttention";
constexpr const char* kInt8CacheName = "LambdaAttentionInt8Cache";

enum Input : size_t {
  kQuery, kKey, kValue, kPastKey, kPastValue, kPastSinkKey, kPastSinkValue, kPastLength,
  kNewLength, kQueryPosition, kSlotPosition, kCos, kSin, kLimitCos, kLimitSin, kAlibiSlopes,
  kSinkLogits, kNumInputs,
  kPastKeyScale = kNumInputs, kPastValueScale, kNumInt8CacheInputs,
};
enum Output : size_t {
  kOutput, kPresentKey, kPresentValue, kPresentSinkKey, kPresentSinkValue, kNumOutputs,
  kPresentKeyScale = kNumOutputs, kPresentValueScale, kNumInt8CacheOutputs,
};

// One element type of one provider: a static description that onnxruntime keeps a pointer to.
// Its kernel is a class K with K(const Attributes&) and Status* compute(const Api*, Context*).
struct Attributes {
  int64_t numSinkTokens, windowSize, distanceLimit, rotaryDim, rotaryInterleaved;
  float scale, softcap;
  bool int8Cache;  // not the node's own, but which of the two operators it is
};

// A message for onnxruntime; null is success, as everywhere in its API.
abi::Status* invalid(const abi::Api* api, const std::string& message);

// Reads and checks the node's attributes; null or what is wrong.
abi::Status* readAttributes(const abi::Api* api, const abi::KernelInfo* info, Attributes* out);

// One call: shapes and pointers of every input and output.
struct Call {
  std::array<Shape, kNumInt8CacheInputs> shapes;
  std::array<const void*, kNumInt8CacheInputs> inputs;
  std::array<void*, kNumInt8CacheOutputs> outputs;
};

// Reads inputs, checks every shape against the others, allocates or finds the outputs.
abi::Status* readCall(const abi::Api* api, abi::KernelContext* context, const Attributes&, Call*);

abi::ElementType inputType(size_t index, abi::ElementType element, bool int8Cache);
abi::ElementType outputType(size_t index, abi::ElementType element, bool int8Cache);

template <abi::ElementType element, typename Kernel, bool int8Cache = false>
struct Op : abi::CustomOp {
  explicit Op(const char* provider) : abi::CustomOp{}, provider(provider) {
    version = abi::kApiVersion;
    getName = [](const abi::CustomOp*) { return int8Cache ? kInt8CacheName : kName; };
    getExecutionProviderType = [](const abi::CustomOp* op) {
      return static_cast<const Op*>(op)->provider;
    };
    getInputTypeCount = [](const abi::CustomOp*) -> size_t {
      return int8Cache ? kNumInt8CacheInputs : kNumInputs;
    };
    getInputType = [](const abi::CustomOp*, size_t i) { return inputType(i, element, int8Cache); };
    getOutputTypeCount = [](const abi::CustomOp*) -> size_t {
      return int8Cache ? kNumInt8CacheOutputs : kNumOutputs;
    };
    getOutputType = [](const abi::CustomOp*, size_t i) {
      return outputType(i, element, int8Cache);
    };
    getInputCharacteristic = [](const abi::CustomOp*, size_t) { return abi::kRequired; };
    getOutputCharacteristic = [](const abi::CustomOp*, size_t) { return abi::kRequired; };
    getInputMemoryType = [](const abi::CustomOp*, size_t i) { return Kernel::memoryType(i); };
    getStartVersion = [](const abi::CustomOp*) { return 1; };
    getEndVersion = [](const abi::CustomOp*) { return 1; };
    createKernelV2 = create;
    kernelComputeV2 = [](void* kernel, abi::KernelContext* context) {
      return static_cast<Kernel*>(kernel)->compute(context);
    };
    kernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }

  static abi::Status* LMINF_ORT_CALL create(const abi::CustomOp*, const abi::Api* api,
                                            const abi::KernelInfo* info, void** kernel) {
    Attributes attributes;
    if (abi::Status* wrong = readAttributes(api, info, &attributes)) return wrong;
    attributes.int8Cache = int8Cache;
    *kernel = new Kernel(api, attributes, element);
    return nullptr;
  }

  const char* provider;
};

}  // namespace lminf
