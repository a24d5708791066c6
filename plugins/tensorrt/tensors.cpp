#include "tensors.h"

#include <algorithm>
#include <array>
#include <initializer_list>

#include "message.h"

namespace lminf::tensorrt {
namespace {

using nvinfer1::Dims;

constexpr std::int64_t kOpen = -1;

constexpr std::array<const char*, kNumInputs + kNumOutputs> kNames{
    "query",         "key",         "value",          "past_key",    "past_value",
    "past_sink_key", "past_sink_value", "past_length", "new_length",  "query_position",
    "slot_position", "cos",         "sin",            "limit_cos",   "limit_sin",
    "alibi_slopes",  "sink_logits", "output",         "present_key", "present_value",
    "present_sink_key", "present_sink_value"};
constexpr std::array<std::int32_t, kNumInputs> kRanks{4, 4, 4, 4, 4, 4, 4, 1, 1,
                                                      2, 2, 3, 3, 1, 1, 1, 1};

std::string shapeText(const Dims& dims) {
  std::ostringstream text;
  text << '(';
  for (std::int32_t axis = 0; axis < dims.nbDims; ++axis) {
    text << (axis > 0 ? ", " : "") << dims.d[axis];
  }
  text << ')';
  return text.str();
}

bool matches(std::int64_t found, std::int64_t wanted) {
  return found == wanted || found == kOpen || wanted == kOpen;
}

std::string checkShape(const Dims* inputs, Input input, std::initializer_list<std::int64_t> wanted) {
  Dims expected{};
  expected.nbDims = static_cast<std::int32_t>(wanted.size());
  std::copy(wanted.begin(), wanted.end(), expected.d);
  const Dims& found = inputs[input];
  bool fits = found.nbDims == expected.nbDims;
  for (std::int32_t axis = 0; fits && axis < found.nbDims; ++axis) {
    fits = matches(found.d[axis], expected.d[axis]);
  }
  if (fits) return {};
  return message(kNames[static_cast<std::size_t>(input)], " has shape ", shapeText(found),
                 ", expected ", shapeText(expected), " (-1 is any)");
}

// The letters of docs/operator.md; -1 where a dimension is still open.
struct Sizes {
  std::int64_t batch, heads, sequence, headDim, kvHeads, capacity, sinkBatch;
};

Sizes sizesOf(const Dims* inputs) {
  const Dims& query = inputs[kQuery];
  return {query.d[0],           query.d[1], query.d[2], query.d[3], inputs[kKey].d[1],
          inputs[kPastKey].d[2], inputs[kPastSinkKey].d[0]};
}

std::string checkRanks(const Dims* inputs) {
  for (std::int32_t input = 0; input < kNumInputs; ++input) {
    if (inputs[input].nbDims != inputRank(input)) {
      return message(tensorName(input), " has shape ", shapeText(inputs[input]), ", expected ",
                     inputRank(input), " dimensions");
    }
  }
  return {};
}

// Without rotation cos, sin and the limit rows are small constants nobody reads.
std::string checkRotation(const Attributes& attributes, const Dims* inputs, const Sizes& size) {
  if (attributes.rotaryDim == 0) return {};
  const std::int64_t pairs = attributes.rotaryDim / 2;
  for (const Input input : {kCos, kSin}) {
    std::string problem = checkShape(inputs, input, {size.batch, size.sequence, pairs});
    if (!problem.empty()) return problem;
  }
  for (const Input input : {kLimitCos, kLimitSin}) {
    std::string problem = checkShape(inputs, input, {pairs});
    if (!problem.empty()) return problem;
  }
  return {};
}

std::string checkAgreement(const Attributes& attributes, const Dims* inputs) {
  const Sizes s = sizesOf(inputs);
  const std::int64_t sinks = std::max<std::int64_t>(attributes.numSinkTokens, 1);
  struct Rule {
    Input input;
    std::initializer_list<std::int64_t> shape;
  };
  for (const Rule& rule : {Rule{kKey, {s.batch, s.kvHeads, s.sequence, s.headDim}},
                           Rule{kValue, {s.batch, s.kvHeads, s.sequence, s.headDim}},
                           Rule{kPastKey, {s.batch, s.kvHeads, s.capacity, s.headDim}},
                           Rule{kPastValue, {s.batch, s.kvHeads, s.capacity, s.headDim}},
                           Rule{kPastSinkKey, {s.sinkBatch, s.kvHeads, sinks, s.headDim}},
                           Rule{kPastSinkValue, {s.sinkBatch, s.kvHeads, sinks, s.headDim}},
                           Rule{kPastLength, {s.batch}},
                           Rule{kNewLength, {s.batch}},
                           Rule{kQueryPosition, {s.batch, s.sequence}},
                           Rule{kSlotPosition, {s.batch, s.capacity}},
                           Rule{kAlibiSlopes, {s.heads}},
                           Rule{kSinkLogits, {s.heads}}}) {
    std::string problem = checkShape(inputs, rule.input, rule.shape);
    if (!problem.empty()) return problem;
  }
  return checkRotation(attributes, inputs, s);
}

std::string readType(nvinfer1::DataType type, DataType& result) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: result = DataType::kFloat32; return {};
    case nvinfer1::DataType::kHALF: result = DataType::kFloat16; return {};
    case nvinfer1::DataType::kBF16: result = DataType::kBfloat16; return {};
    default:
      return message("query has element type ", static_cast<std::int32_t>(type),
                     " of nvinfer1::DataType; the kernels take kFLOAT, kHALF and kBF16");
  }
}

std::string fill(const Attributes& attributes, const Dims* inputs, nvinfer1::DataType type,
                 LambdaAttentionParams& params) {
  const Sizes size = sizesOf(inputs);
  attributes.writeTo(params);
  params.batchSize = size.batch;
  params.numHeads = size.heads;
  params.numKvHeads = size.kvHeads;
  params.sequenceLength = size.sequence;
  params.capacity = size.capacity;
  params.headDim = size.headDim;
  params.sinkBatchSize = size.sinkBatch;
  return readType(type, params.dataType);
}

}  // namespace

const char* tensorName(std::int32_t place) { return kNames.at(static_cast<std::size_t>(place)); }

std::int32_t inputRank(std::int32_t input) { return kRanks.at(static_cast<std::size_t>(input)); }

bool isTypeAllowed(std::int32_t place, nvinfer1::DataType type, nvinfer1::DataType query) {
  if (place == kQuery) {
    return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF ||
           type == nvinfer1::DataType::kBF16;
  }
  if (place >= kPastLength && place <= kSlotPosition) return type == nvinfer1::DataType::kINT64;
  if (place >= kCos && place <= kSinkLogits) return type == nvinfer1::DataType::kFLOAT;
  return type == query;
}

std::string readStep(const Attributes& attributes, const Dims* inputs, nvinfer1::DataType type,
                     LambdaAttentionParams& params) {
  std::string problem = checkRanks(inputs);
  if (problem.empty()) problem = checkAgreement(attributes, inputs);
  if (problem.empty()) problem = fill(attributes, inputs, type, params);
  return problem.empty() ? validateSettings(params) : problem;
}

std::string checkOpenShapes(const Attributes& attributes, const Dims* inputs,
                            nvinfer1::DataType type) {
  std::string problem = checkRanks(inputs);
  if (problem.empty()) problem = checkAgreement(attributes, inputs);
  if (!problem.empty()) return problem;
  const Sizes size = sizesOf(inputs);
  if (size.heads == kOpen || size.kvHeads == kOpen || size.headDim == kOpen) {
    return message("heads and head_dim must be fixed, query has shape ", shapeText(inputs[kQuery]),
                   " and key ", shapeText(inputs[kKey]));
  }
  LambdaAttentionParams params;
  problem = fill(attributes, inputs, type, params);
  if (!problem.empty()) return problem;
  if (size.batch == kOpen) params.batchSize = 1;
  if (size.sequence == kOpen) params.sequenceLength = 1;
  if (size.capacity == kOpen) params.capacity = attributes.windowSize;
  // Open sink rows agree with whatever the batch will be.
  if (size.sinkBatch == kOpen || size.batch == kOpen) params.sinkBatchSize = 0;
  return validateSettings(params);
}

}  // namespace lminf::tensorrt
