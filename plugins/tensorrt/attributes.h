// The operator's attributes as TensorRT passes them around: plugin fields.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <iterator>
#include <string>

#include "../operator/contract.h"

namespace lminf::tensorrt {

// What is wrong with a node's fields, in one line; empty if `attributes` was filled from them.
// Every attribute must be there once, a single number, and within its rule.
std::string readFields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes);

using FieldArray = std::array<nvinfer1::PluginField, std::size(kAttributes)>;

// The fields of one object, for TensorRT to serialise: they point into it, so it does not move.
class SerializedFields {
 public:
  explicit SerializedFields(const Attributes& attributes);
  SerializedFields(const SerializedFields&) = delete;
  SerializedFields& operator=(const SerializedFields&) = delete;

  const nvinfer1::PluginFieldCollection* collection() const { return &collection_; }

 private:
  Attributes attributes_;
  FieldArray fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// Names and types of the attributes, without values: what a parser looks for on a node.
const nvinfer1::PluginFieldCollection* fieldNames();

// "window_size=4096 scale=0.125 …", for people who look at an engine.
std::string describe(const Attributes& attributes);

}  // namespace lminf::tensorrt
