#include "lambda_attention_op.h"

#include <utility>

namespace lminf {
namespace {

constexpr std::array<const char*, kNumInt8CacheInputs> kInputNames = {
    "query", "key", "value", "past_key", "past_value", "past_sink_key", "past_sink_value",
    "past_length", "new_length", "query_position", "slot_position", "cos", "sin", "limit_cos",
    "limit_sin", "alibi_slopes", "sink_logits", "past_key_scale", "past_value_scale"};

// The shapes the contract asks for; the first difference ends the step.
abi::Status* checkShapes(const abi::Api* api, const Attributes& a, const Call& call) {
  const auto& shapes = call.shapes;
  const Shape &query = shapes[kQuery], &key = shapes[kKey], &ring = shapes[kPastKey];
  for (const Input input : {kQuery, kKey, kPastKey}) {
    if (shapes[input].size() != 4) {
      return invalid(api, std::string(kInputNames[input]) + " has shape " + text(shapes[input]) +
                              ", expected four dimensions");
    }
  }
  const int64_t b = query[0], h = query[1], s = query[2], d = query[3], g = key[1];
  if (g < 1 || h % g != 0) {
    return invalid(api, "query has " + std::to_string(h) + " heads, which key's " +
                            std::to_string(g) + " do not divide");
  }
  if (a.rotaryDim > d) {
    return invalid(api, "rotary_dim " + std::to_string(a.rotaryDim) + " exceeds head_dim " +
                            std::to_string(d));
  }
  const Shape& sinks = shapes[kPastSinkKey];
  const int64_t slots = a.numSinkTokens > 0 ? a.numSinkTokens : 1;
  const bool constant = a.numSinkTokens == 0 && !sinks.empty() && sinks[0] == 1;
  const Shape sinkShape = {constant ? 1 : b, g, slots, d};
  const Shape newShape = {b, g, s, d}, ringShape = {b, g, ring[2], d};
  std::vector<std::pair<Input, Shape>> wanted = {
      {kKey, newShape},           {kValue, newShape},          {kPastKey, ringShape},
      {kPastValue, ringShape},    {kPastSinkKey, sinkShape},   {kPastSinkValue, sinkShape},
      {kPastLength, {b}},         {kNewLength, {b}},           {kAlibiSlopes, {h}},
      {kSinkLogits, {h}},
  };
  if (a.rotaryDim > 0) {
    const int64_t half = a.rotaryDim / 2;
    wanted.insert(wanted.end(), {{kCos, {b, s, half}}, {kSin, {b, s, half}},
                                 {kLimitCos, {half}}, {kLimitSin, {half}}});
  }
  if (a.int8Cache) {
    const Shape scales = {b, g, ring[2], 1};
    wanted.insert(wanted.end(), {{kPastKeyScale, scales}, {kPastValueScale, scales}});
  }
  for (const auto& [input, shape] : wanted) {
    if (shapes[input] != shape) {
      return invalid(api, std::string(kInputNames[input]) + " has shape " + text(shapes[input]) +
                              ", expected " + text(shape));
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
  const std::pair<const char*, int64_t*> integers[] = {
      {"num_sink_tokens", &out->numSinkTokens}, {"window_size", &out->windowSize},
      {"distance_limit", &out->distanceLimit},  {"rotary_dim", &out->rotaryDim},
      {"rotary_interleaved", &out->rotaryInterleaved}};
  for (const auto& [name, value] : integers) {
    if (abi::Status* wrong =
            abi::call<abi::kKernelInfoGetAttributeInt64>(api, info, name, value)) {
      return wrong;
    }
  }
  const std::pair<const char*, float*> floats[] = {{"scale", &out->scale},
                                                   {"softcap", &out->softcap}};
  for (const auto& [name, value] : floats) {
    if (abi::Status* wrong =
            abi::call<abi::kKernelInfoGetAttributeFloat>(api, info, name, value)) {
      return wrong;
    }
  }
  if (out->windowSize < 1) return invalid(api, "window_size must be at least 1");
  if (out->numSinkTokens < 0) return invalid(api, "num_sink_tokens must not be negative");
  if (out->distanceLimit < out->windowSize) {
    return invalid(api, "distance_limit must be at least window_size");
  }
  if (out->rotaryDim < 0 || out->rotaryDim % 2 != 0) {
    return invalid(api, "rotary_dim must be even and not negative");
  }
  return nullptr;
}

abi::Status* readCall(const abi::Api* api, abi::KernelContext* context, const Attributes& a,
                      Call* call) {
  const size_t numInputs = a.int8Cache ? kNumInt8CacheInputs : kNumInputs;
  for (size_t i = 0; i < numInputs; ++i) {
    if (abi::Status* wrong =
            readTensor(api, context, i, &call->shapes[i], &call->inputs[i])) {
      return wrong;
    }
  }
  if (abi::Status* wrong = checkShapes(api, a, *call)) return wrong;
  Shape sinks = call->shapes[kPastSinkKey];
  sinks[0] = call->shapes[kQuery][0];
  const auto& shape = call->shapes;
  const Shape* shapes[kNumInt8CacheOutputs] = {
      &shape[kQuery], &shape[kPastKey],      &shape[kPastValue],     &sinks,
      &sinks,         &shape[kPastKeyScale], &shape[kPastValueScale]};
  const size_t numOutputs = a.int8Cache ? kNumInt8CacheOutputs : kNumOutputs;
  for (size_t i = 0; i < numOutputs; ++i) {
    if (abi::Status* wrong = findTensor(api, context, i, *shapes[i], &call->outputs[i])) {
      return wrong;
    }
    const bool sink = i == kPresentSinkKey || i == kPresentSinkValue;
    const bool needed = !sink || a.numSinkTokens > 0;
    if (needed && call->outputs[i] == nullptr && call->shapes[kQuery][0] > 0) {
      return invalid(api, "output " + std::to_string(i) + " must be used or empty, found missing");
    }
  }
  return nullptr;
}

abi::ElementType inputType(size_t index, abi::ElementType element, bool int8Cache) {
  if (int8Cache && (index == kPastKey || index == kPastValue)) return abi::kInt8;
  if (index <= kPastSinkValue) return element;
  return index <= kSlotPosition ? abi::kInt64 : abi::kFloat;
}

abi::ElementType outputType(size_t index, abi::ElementType element, bool int8Cache) {
  if (int8Cache && (index == kPresentKey || index == kPresentValue)) return abi::kInt8;
  return index < kNumOutputs ? element : abi::kFloat;
}

}  // namespace lminf
