#include "attributes.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "message.h"

namespace lminf::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

struct IntegerField {
  const char* name;
  std::int64_t Attributes::* member;
};

struct FloatField {
  const char* name;
  float Attributes::* member;
};

constexpr std::array<IntegerField, 5> kIntegers{{
    {"num_sink_tokens", &Attributes::numSinkTokens},
    {"window_size", &Attributes::windowSize},
    {"distance_limit", &Attributes::distanceLimit},
    {"rotary_dim", &Attributes::rotaryDim},
    {"rotary_interleaved", &Attributes::rotaryInterleaved},
}};
constexpr std::array<FloatField, 2> kFloats{{
    {"scale", &Attributes::scale},
    {"softcap", &Attributes::softcap},
}};

template <class Number>
Number read(const PluginField& field) {
  Number value{};
  std::memcpy(&value, field.data, sizeof(value));
  return value;
}

// Parsers hand integers over with 32 bits, `SerializedFields` with 64.
std::string readInteger(const PluginField& field, std::int64_t& value) {
  if (field.type == PluginFieldType::kINT32) {
    value = read<std::int32_t>(field);
  } else if (field.type == PluginFieldType::kINT64) {
    value = read<std::int64_t>(field);
  } else {
    return message(field.name, ": must be an integer, its field type is ",
                   static_cast<std::int32_t>(field.type));
  }
  return {};
}

std::string readFloat(const PluginField& field, float& value) {
  if (field.type == PluginFieldType::kFLOAT32) {
    value = read<float>(field);
  } else if (field.type == PluginFieldType::kFLOAT64) {
    value = static_cast<float>(read<double>(field));
  } else {
    return message(field.name, ": must be a float, its field type is ",
                   static_cast<std::int32_t>(field.type));
  }
  return {};
}

std::string readField(const PluginField& field, Attributes& attributes) {
  if (field.data == nullptr || field.length != 1) {
    return message(field.name, ": must be one number, the field has ", field.length);
  }
  for (const IntegerField& known : kIntegers) {
    if (std::strcmp(known.name, field.name) == 0) {
      return readInteger(field, attributes.*known.member);
    }
  }
  for (const FloatField& known : kFloats) {
    if (std::strcmp(known.name, field.name) == 0) {
      return readFloat(field, attributes.*known.member);
    }
  }
  return message(field.name, ": no such attribute");
}

std::string checkComplete(const std::set<std::string>& seen) {
  for (const IntegerField& known : kIntegers) {
    if (seen.count(known.name) == 0) return message(known.name, ": attribute missing");
  }
  for (const FloatField& known : kFloats) {
    if (seen.count(known.name) == 0) return message(known.name, ": attribute missing");
  }
  return {};
}

// The rules that need no shapes are those of the kernels, asked with the smallest tensors that
// could carry these attributes.
std::string checkRules(const Attributes& attributes) {
  if (attributes.rotaryInterleaved != 0 && attributes.rotaryInterleaved != 1) {
    return message("rotary_interleaved = ", attributes.rotaryInterleaved, ": must be 0 or 1");
  }
  LambdaAttentionParams params;
  params.batchSize = params.numHeads = params.numKvHeads = params.sequenceLength = 1;
  params.capacity = 1;
  params.growingRing = true;  // the ring is checked where its size is known
  params.headDim = 256;
  attributes.writeTo(params);
  return validateSettings(params);
}

}  // namespace

void Attributes::writeTo(LambdaAttentionParams& params) const {
  params.numSinkTokens = numSinkTokens;
  params.windowSize = windowSize;
  params.distanceLimit = distanceLimit;
  params.rotaryDim = rotaryDim;
  params.rotaryInterleaved = rotaryInterleaved != 0;
  params.scale = scale;
  params.softcap = softcap;
}

std::string readFields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes) {
  if (fields == nullptr || fields->nbFields < 0 ||
      (fields->nbFields > 0 && fields->fields == nullptr)) {
    return message("no attributes were passed");
  }
  std::set<std::string> seen;
  for (std::int32_t index = 0; index < fields->nbFields; ++index) {
    const PluginField& field = fields->fields[index];
    if (field.name == nullptr) return message("attribute ", index, " has no name");
    if (!seen.insert(field.name).second) return message(field.name, ": passed twice");
    std::string problem = readField(field, attributes);
    if (!problem.empty()) return problem;
  }
  std::string problem = checkComplete(seen);
  return problem.empty() ? checkRules(attributes) : problem;
}

SerializedFields::SerializedFields(const Attributes& attributes) : attributes_(attributes) {
  static_assert(kIntegers.size() + kFloats.size() == kCount, "every attribute is serialised");
  PluginField* next = fields_.data();
  for (const IntegerField& known : kIntegers) {
    *next++ = PluginField(known.name, &(attributes_.*known.member), PluginFieldType::kINT64, 1);
  }
  for (const FloatField& known : kFloats) {
    *next++ = PluginField(known.name, &(attributes_.*known.member), PluginFieldType::kFLOAT32, 1);
  }
  collection_.nbFields = static_cast<std::int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

const nvinfer1::PluginFieldCollection* fieldNames() {
  static const std::array<PluginField, kIntegers.size() + kFloats.size()> names = [] {
    std::array<PluginField, kIntegers.size() + kFloats.size()> all{};
    PluginField* next = all.data();
    for (const IntegerField& known : kIntegers) {
      *next++ = PluginField(known.name, nullptr, PluginFieldType::kINT64, 1);
    }
    for (const FloatField& known : kFloats) {
      *next++ = PluginField(known.name, nullptr, PluginFieldType::kFLOAT32, 1);
    }
    return all;
  }();
  static const nvinfer1::PluginFieldCollection collection{
      static_cast<std::int32_t>(names.size()), names.data()};
  return &collection;
}

}  // namespace lminf::tensorrt
