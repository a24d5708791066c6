// What the harness is to run: attributes, profiles, and the steps' tensors, read from a folder.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace harness {

inline constexpr std::int32_t kNumInputs = 17;
inline constexpr std::int32_t kNumOutputs = 5;
inline constexpr std::int32_t kFirstCache = 3;  // past_key, past_value, past_sink_key, past_sink_value
inline constexpr std::int32_t kNumCaches = 4;

extern const std::vector<std::string> kInputNames;
extern const std::vector<std::string> kOutputNames;

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
  std::vector<Profile> profiles;
  std::vector<Step> steps;

  nvinfer1::DataType typeOf(std::int32_t place) const;  // outputs follow the inputs
  std::size_t bytesOf(std::int32_t place, const nvinfer1::Dims& shape) const;
};

// Reads FOLDER/case.txt, whose lines are
//   int NAME VALUE | float NAME VALUE            an attribute
//   type float32 | float16 | bfloat16            element type of the model
//   profile BMIN BOPT BMAX SMIN SOPT SMAX        an optimisation profile
//   step PROFILE                                 begins a step
//   tensor NAME DIM …                            an input of that step, in order
// The inputs' bytes are in FOLDER/STEP.NAME.bin; caches are read for the first step only.
// Throws std::runtime_error naming the line.
Case readCase(const std::filesystem::path& folder);

std::vector<char> readBytes(const std::filesystem::path& path);
void writeBytes(const std::filesystem::path& path, const std::vector<char>& bytes);

}  // namespace harness
