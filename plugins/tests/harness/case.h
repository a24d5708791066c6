// What the harness is to run: attributes, profiles, and the steps' tensors, read from a folder.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "../../operator/contract.h"

namespace harness {

using lminf::kInputs;
using lminf::kOutputs;

// The input that an output has the shape of, but for the rows of sinks without sink tokens.
inline std::int32_t shapeSource(std::int32_t output) {
  return output == lminf::kOutput ? lminf::kQuery : lminf::kUpdatedInput[output];
}

inline bool isSinkOutput(std::int32_t output) {
  return output == lminf::kPresentSinkKey || output == lminf::kPresentSinkValue;
}

// Smallest, usual and largest value of the two open dimensions.
struct Profile {
  std::int64_t batch[3];
  std::int64_t sequence[3];
};

struct Step {
  std::size_t profile = 0;
  std::vector<nvinfer1::Dims> shapes;  // of all inputs, in the operator's order
};

struct Case {
  std::filesystem::path folder;
  std::map<std::string, std::int32_t> integers;
  std::map<std::string, float> floats;
  nvinfer1::DataType type = nvinfer1::DataType::kFLOAT;
  bool int8Rings = false;
  std::vector<Profile> profiles;
  std::vector<Step> steps;

  std::int32_t numInputs() const {
    return int8Rings ? +lminf::kNumInt8CacheInputs : +lminf::kNumInputs;
  }
  std::int32_t numOutputs() const {
    return int8Rings ? +lminf::kNumInt8CacheOutputs : +lminf::kNumOutputs;
  }
  const char* name() const { return int8Rings ? lminf::kInt8CacheName : lminf::kName; }
  nvinfer1::DataType typeOf(std::int32_t place) const;  // outputs follow the inputs
  std::size_t bytesOf(std::int32_t place, const nvinfer1::Dims& shape) const;
};

// Reads FOLDER/case.txt, whose lines are
//   int NAME VALUE | float NAME VALUE            an attribute
//   type float32 | float16 | bfloat16            element type of the model
//   rings int8                                   rings of int8; of the model's type without it
//   profile BMIN BOPT BMAX SMIN SOPT SMAX        an optimisation profile
//   step PROFILE                                 begins a step
//   tensor NAME DIM …                            an input of that step, in order
// The inputs' bytes are in FOLDER/STEP.NAME.bin; caches are read for the first step only.
// Throws std::runtime_error naming the line.
Case readCase(const std::filesystem::path& folder);

std::vector<char> readBytes(const std::filesystem::path& path);
void writeBytes(const std::filesystem::path& path, const std::vector<char>& bytes);

}  // namespace harness
