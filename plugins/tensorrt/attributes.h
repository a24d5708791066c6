// The operator's attributes as TensorRT passes them around: plugin fields.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <string>

#include "params.h"

namespace lminf::tensorrt {

// Attributes of one node; the names of the fields are those of lminf_export/op.py.
struct Attributes {
  std::int64_t numSinkTokens = 0;
  std::int64_t windowSize = 0;
  std::int64_t distanceLimit = 0;
  std::int64_t rotaryDim = 0;
  std::int64_t rotaryInterleaved = 0;
  float scale = 1.0F;
  float softcap = 0.0F;

  void writeTo(LambdaAttentionParams& params) const;
};

// What is wrong with a node's fields, in one line; empty if `attributes` was filled from them.
// Every attribute must be there once, a single number, and within its rule.
std::string readFields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes);

// The fields of one object, for TensorRT to serialise: they point into it, so it does not move.
class SerializedFields {
 public:
  explicit SerializedFields(const Attributes& attributes);
  SerializedFields(const SerializedFields&) = delete;
  SerializedFields& operator=(const SerializedFields&) = delete;

  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  static constexpr std::size_t kCount = 7;

  Attributes attributes_;
  std::array<nvinfer1::PluginField, kCount> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// Names and types of the attributes, without values: what a parser looks for on a node.
const nvinfer1::PluginFieldCollection* fieldNames();

}  // namespace lminf::tensorrt
