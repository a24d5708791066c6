#include "lambda_attention_op.h"

#include <array>

#include "../operator/message.h"

namespace lminf {
namespace {

abi::Status* readInputs(const abi::Api* api, const abi::KernelContext* context, size_t count,
                        Shape* shapes, const void** data) {
  for (size_t i = 0; i < count; ++i) {
    if (abi::Status* wrong = readTensor(api, context, i, &shapes[i], &data[i])) return wrong;
  }
  return nullptr;
}

abi::Status* findOutputs(const abi::Api* api, abi::KernelContext* context,
                         const LambdaAttentionParams& p, size_t count, const Shape* inputs,
                         void** data) {
  for (size_t i = 0; i < count; ++i) {
    const auto output = static_cast<std::int32_t>(i);
    Shape shape = inputs[shapeSource(output)];
    shape[0] = p.batchSize;
    if (abi::Status* wrong = findTensor(api, context, i, shape, &data[i])) return wrong;
    const bool needed = (!isSinkOutput(output) || p.numSinkTokens > 0) && p.batchSize > 0;
    if (needed && data[i] == nullptr) {
      return invalid(api, message("output ", kOutputs[i].name, " must be used"));
    }
  }
  return nullptr;
}

}  // namespace

abi::Status* invalid(const abi::Api* api, const std::string& message) {
  const std::string whole = "lminf::LambdaAttention: " + message;
  return abi::call<abi::kCreateStatus>(api, abi::kInvalidArgument, whole.c_str());
}

abi::Status* readAttributes(const abi::Api* api, const abi::KernelInfo* info, Attributes* out) {
  for (const AttributeField& field : kAttributes) {
    abi::Status* wrong = field.integer != nullptr
                             ? abi::call<abi::kKernelInfoGetAttributeInt64>(api, info, field.name,
                                                                            &(out->*field.integer))
                             : abi::call<abi::kKernelInfoGetAttributeFloat>(api, info, field.name,
                                                                            &(out->*field.number));
    if (wrong != nullptr) return wrong;
  }
  const std::string problem = checkAttributes(*out);
  return problem.empty() ? nullptr : invalid(api, problem);
}

abi::Status* readCall(const abi::Api* api, abi::KernelContext* context,
                      LambdaAttentionParams* params) {
  const size_t count = numInputs(params->int8Cache, params->hasKeyBias);
  const size_t numOutputs = params->int8Cache ? kNumInt8CacheOutputs : kNumOutputs;
  std::array<Shape, kNumKeyBiasInputs> shapes;
  std::array<const void*, kNumKeyBiasInputs> inputs{};
  std::array<void*, kNumInt8CacheOutputs> outputs{};
  if (abi::Status* wrong = readInputs(api, context, count, shapes.data(), inputs.data())) {
    return wrong;
  }
  std::string problem = readShapes(shapes.data(), *params);
  if (problem.empty()) problem = checkSizes(*params);
  if (!problem.empty()) return invalid(api, problem);
  if (abi::Status* wrong =
          findOutputs(api, context, *params, numOutputs, shapes.data(), outputs.data())) {
    return wrong;
  }
  setTensors(*params, inputs.data(), outputs.data(), params->int8Cache, params->hasKeyBias);
  return nullptr;
}

abi::ElementType typeOf(const Operand& operand, abi::ElementType element, bool int8Cache) {
  switch (operand.element) {
    case ElementKind::kModel: return element;
    case ElementKind::kRing: return int8Cache ? abi::kInt8 : element;
    case ElementKind::kInt64: return abi::kInt64;
    case ElementKind::kFloat32: return abi::kFloat;
  }
  return abi::kUndefined;
}

}  // namespace lminf
