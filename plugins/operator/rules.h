// The operator's rules, written once for every kernel, provider and plugin.
//
// A check returns what is wrong, in one line without the operator's name, or an empty string. What
// only some kernels cannot take is checked where those kernels are.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "params.h"

namespace lminf {

// Dimensions of a tensor; kOpen where a network does not know one yet.
using Shape = std::vector<std::int64_t>;
inline constexpr std::int64_t kOpen = -1;

// Positions end here: from here on they have no exact rotation (docs/operator.md).
inline constexpr std::int64_t kMaxPosition = std::int64_t{1} << 40;

// The operator of a kind of ring.
const char* nameOf(const LambdaAttentionParams& params);

// Inputs that the operator of a kind of ring has.
std::int32_t numInputs(bool int8Cache, bool hasKeyBias);
constexpr std::int32_t numOutputs(bool int8Cache) {
  return int8Cache ? kNumInt8CacheOutputs : kNumOutputs;
}

// "(2, 3, 5)".
std::string text(const Shape& shape);

// Attributes by themselves.
std::string checkAttributes(const Attributes& attributes);

// Fills the sizes of params, which has its attributes already, from the shapes of all inputs, and
// checks the shapes against each other and the attributes. An open dimension agrees with any.
std::string readShapes(const Shape* inputs, LambdaAttentionParams& params);

// The input that an output has the shape of; present sinks have a row for each of B.
Input shapeSource(std::int32_t output);

// Whether an output holds sinks: a constant that is not read where there are no sink
// tokens.
constexpr bool isSinkOutput(std::int32_t output) {
  return output == kPresentSinkKey || output == kPresentSinkValue;
}

// Heads, rotated dimensions and rows of sinks against each other; 0 is a size like others.
std::string checkSizes(const LambdaAttentionParams& params);

// Slots that a ring needs to keep every key that a query may still see while a step is written:
// its oldest query needs W keys, and S - 1 newer ones have been written already.
constexpr std::int64_t leastSlots(std::int64_t windowSize, std::int64_t newTokens) {
  return windowSize + newTokens - 1;
}

// A ring that wraps in this step or has wrapped before.
std::string checkRing(std::int64_t capacity, std::int64_t windowSize, std::int64_t newTokens);

}  // namespace lminf
