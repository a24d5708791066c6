#include "rules.h"

#include <algorithm>
#include <cmath>

#include "message.h"

namespace lminf {
namespace {

std::int64_t sizeOf(Letter letter, const LambdaAttentionParams& p) {
  switch (letter) {
    case Letter::kB: return p.batchSize;
    case Letter::kH: return p.numHeads;
    case Letter::kG: return p.numKvHeads;
    case Letter::kS: return p.sequenceLength;
    case Letter::kC: return p.capacity;
    case Letter::kN: return p.sinkSlots();
    case Letter::kD: return p.headDim;
    case Letter::kRotaryPairs: return p.rotaryDim / 2;
    case Letter::kOne: return 1;
    case Letter::kTableRows: return kTableRows;
  }
  return kOpen;
}

std::int64_t expectedSize(std::int32_t input, int axis, const LambdaAttentionParams& p) {
  // Past sinks agree on their rows; checkSizes says how many they may be.
  const bool sinks = input == kPastSinkKey || input == kPastSinkValue;
  return sinks && axis == 0 ? p.sinkBatchSize : sizeOf(kInputs[input].shape[axis], p);
}

void setSizes(const Shape* inputs, LambdaAttentionParams& p) {
  const Shape& query = inputs[kQuery];
  p.batchSize = query[0];
  p.numHeads = query[1];
  p.sequenceLength = query[2];
  p.headDim = query[3];
  p.numKvHeads = inputs[kKey][1];
  p.capacity = inputs[kPastKey][2];
  p.sinkBatchSize = inputs[kPastSinkKey][0];
}

bool agrees(const Shape& found, std::int32_t input, const LambdaAttentionParams& p) {
  for (int axis = 0; axis < kInputs[input].rank; ++axis) {
    const std::int64_t size = found[static_cast<std::size_t>(axis)];
    const std::int64_t expected = expectedSize(input, axis, p);
    if (size != expected && size != kOpen && expected != kOpen) return false;
  }
  return true;
}

std::string disagreement(const Shape& found, std::int32_t input, const LambdaAttentionParams& p) {
  Shape expected;
  for (int axis = 0; axis < kInputs[input].rank; ++axis) {
    expected.push_back(expectedSize(input, axis, p));
  }
  const auto hasOpen = [](const Shape& shape) {
    return std::find(shape.begin(), shape.end(), kOpen) != shape.end();
  };
  return message(kInputs[input].name, " has shape ", text(found), ", expected ", text(expected),
                 hasOpen(found) || hasOpen(expected) ? " (-1 is any)" : "");
}

std::string checkRanks(const Shape* inputs, std::int32_t count) {
  for (std::int32_t input = 0; input < count; ++input) {
    const Operand& operand = kInputs[input];
    if (inputs[input].size() != static_cast<std::size_t>(operand.rank)) {
      return message(operand.name, " has shape ", text(inputs[input]), ", expected ", operand.rank,
                     operand.rank == 1 ? " dimension" : " dimensions");
    }
  }
  return {};
}

// Without rotation cos, sin and the limit rows are small constants that are not read.
bool isUnread(std::int32_t input, const Attributes& a) {
  const Operand& operand = kInputs[input];
  return a.rotaryDim == 0 && operand.shape[operand.rank - 1] == Letter::kRotaryPairs;
}

}  // namespace

const char* nameOf(const LambdaAttentionParams& params) {
  if (params.hasKeyBias) return kKeyBiasName;
  return params.int8Cache ? kInt8CacheName : kName;
}

std::int32_t numInputs(bool int8Cache, bool hasKeyBias) {
  if (hasKeyBias) return kNumKeyBiasInputs;
  return int8Cache ? kNumInt8CacheInputs : kNumInputs;
}

std::string text(const Shape& shape) {
  std::string out = "(";
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    out += (axis > 0 ? ", " : "") + std::to_string(shape[axis]);
  }
  return out + ")";
}

std::string checkAttributes(const Attributes& a) {
  if (a.numSinkTokens < 0) {
    return message("num_sink_tokens = ", a.numSinkTokens, ": must be at least 0");
  }
  if (a.windowSize < 1 || a.windowSize > kMaxPosition) {
    return message("window_size = ", a.windowSize, ": must be in 1 ... 2^40");
  }
  if (a.distanceLimit < a.windowSize || a.distanceLimit > kMaxPosition) {
    return message("distance_limit = ", a.distanceLimit,
                   ": must be in window_size = ", a.windowSize, " ... 2^40");
  }
  if (a.rotaryDim < 0 || a.rotaryDim % 2 != 0) {
    return message("rotary_dim = ", a.rotaryDim, ": must be even and at least 0");
  }
  if (a.rotaryInterleaved != 0 && a.rotaryInterleaved != 1) {
    return message("rotary_interleaved = ", a.rotaryInterleaved, ": must be 0 or 1");
  }
  if (!std::isfinite(a.scale)) return message("scale = ", a.scale, ": must be finite");
  if (!(a.softcap >= 0.0f) || !std::isfinite(a.softcap)) {
    return message("softcap = ", a.softcap, ": must be finite and at least 0 (0 means none)");
  }
  return {};
}

std::string readShapes(const Shape* inputs, LambdaAttentionParams& params) {
  const std::int32_t count = numInputs(params.int8Cache, params.hasKeyBias);
  std::string problem = checkRanks(inputs, count);
  if (!problem.empty()) return problem;
  setSizes(inputs, params);
  for (std::int32_t input = 0; input < count; ++input) {
    if (isUnread(input, params) || agrees(inputs[input], input, params)) continue;
    return disagreement(inputs[input], input, params);
  }
  return {};
}

Input shapeSource(std::int32_t output) {
  return kUpdatedInput[output] == kNone ? kQuery : static_cast<Input>(kUpdatedInput[output]);
}

std::string checkSizes(const LambdaAttentionParams& p) {
  if (p.numKvHeads < 1 || p.numHeads % p.numKvHeads != 0) {
    return message("query heads H = ", p.numHeads,
                   ": must be a multiple of key/value heads G = ", p.numKvHeads);
  }
  if (p.rotaryDim > p.headDim) {
    return message("rotary_dim = ", p.rotaryDim,
                   ": must be even and in 0 ... head_dim = ", p.headDim);
  }
  const std::int64_t rows = p.sinkBatchSize;
  if (rows != 0 && rows != p.batchSize && !(rows == 1 && p.numSinkTokens == 0)) {
    return message("past_sink_key has ", rows, " rows: must have B = ", p.batchSize,
                   p.numSinkTokens == 0 ? " or 1" : "");
  }
  return {};
}

std::string checkRing(std::int64_t capacity, std::int64_t windowSize, std::int64_t newTokens) {
  if (capacity >= leastSlots(windowSize, newTokens)) return {};
  return message("ring slots C = ", capacity,
                 ": must be at least window_size + S - 1 = ", windowSize, " + ", newTokens,
                 " - 1, or keys are overwritten while in use; bring fewer tokens per step or "
                 "export with a larger chunk_size");
}

}  // namespace lminf
