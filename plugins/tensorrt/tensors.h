// The node's tensors: their places, and the step they describe together.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "attributes.h"
#include "params.h"

namespace lminf::tensorrt {

// Places of inputs and outputs; outputs are counted from 0.
enum Input : std::int32_t {
  kQuery,
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kPastSinkKey,
  kPastSinkValue,
  kPastLength,
  kNewLength,
  kQueryPosition,
  kSlotPosition,
  kCos,
  kSin,
  kLimitCos,
  kLimitSin,
  kAlibiSlopes,
  kSinkLogits,
  kNumInputs,
};
enum Output : std::int32_t {
  kAttended,
  kPresentKey,
  kPresentValue,
  kPresentSinkKey,
  kPresentSinkValue,
  kNumOutputs,
};

// Name of a tensor as the operator's contract has it; outputs follow the inputs.
const char* tensorName(std::int32_t place);

// Rank of an input.
std::int32_t inputRank(std::int32_t input);

// Whether a tensor may have this element type, given that of the query: floating tensors of the
// model share it, lengths and positions are int64, rotation rows and head constants float32.
bool isTypeAllowed(std::int32_t place, nvinfer1::DataType type, nvinfer1::DataType query);

// What is wrong with shapes that are known in full, in one line; empty if `params` was filled
// with the sizes and may run once it has pointers.
std::string readStep(const Attributes& attributes, const nvinfer1::Dims* inputs,
                     nvinfer1::DataType type, LambdaAttentionParams& params);

// What is wrong with shapes of which some dimensions are -1, still open. Batch size and new
// tokens are taken as 1 while they are open.
std::string checkOpenShapes(const Attributes& attributes, const nvinfer1::Dims* inputs,
                            nvinfer1::DataType type);

}  // namespace lminf::tensorrt
