#include "attributes.h"

#include <cstdint>
#include <cstring>
#include <set>

#include "../operator/message.h"
#include "../operator/rules.h"

namespace lminf::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

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
  for (const AttributeField& known : kAttributes) {
    if (std::strcmp(known.name, field.name) != 0) continue;
    return known.integer != nullptr ? readInteger(field, attributes.*known.integer)
                                    : readFloat(field, attributes.*known.number);
  }
  return message(field.name, ": no such attribute");
}

std::string checkComplete(const std::set<std::string>& seen) {
  for (const AttributeField& known : kAttributes) {
    if (seen.count(known.name) == 0) return message(known.name, ": attribute missing");
  }
  return {};
}

// A field without a value where `attributes` is null.
PluginField fieldOf(const AttributeField& known, const Attributes* attributes) {
  if (known.integer != nullptr) {
    const void* value = attributes != nullptr ? &(attributes->*known.integer) : nullptr;
    return {known.name, value, PluginFieldType::kINT64, 1};
  }
  const void* value = attributes != nullptr ? &(attributes->*known.number) : nullptr;
  return {known.name, value, PluginFieldType::kFLOAT32, 1};
}

FieldArray fieldsOf(const Attributes* attributes) {
  FieldArray fields;
  for (std::size_t index = 0; index < fields.size(); ++index) {
    fields[index] = fieldOf(kAttributes[index], attributes);
  }
  return fields;
}

}  // namespace

std::string readFields(const nvinfer1::PluginFieldCollection* fields, Attributes& attributes) {
  if (fields == nullptr || fields->nbFields < 0 ||
      (fields->nbFields > 0 && fields->fields == nullptr)) {
    return "no attributes were passed";
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
  return problem.empty() ? checkAttributes(attributes) : problem;
}

SerializedFields::SerializedFields(const Attributes& attributes)
    : attributes_(attributes), fields_(fieldsOf(&attributes_)) {
  collection_.nbFields = static_cast<std::int32_t>(fields_.size());
  collection_.fields = fields_.data();
}

const nvinfer1::PluginFieldCollection* fieldNames() {
  static const FieldArray names = fieldsOf(nullptr);
  static const nvinfer1::PluginFieldCollection collection{static_cast<std::int32_t>(names.size()),
                                                          names.data()};
  return &collection;
}

std::string describe(const Attributes& attributes) {
  std::ostringstream text;
  const char* separator = "";
  for (const AttributeField& known : kAttributes) {
    text << separator << known.name << '=';
    if (known.integer != nullptr) {
      text << attributes.*known.integer;
    } else {
      text << attributes.*known.number;
    }
    separator = " ";
  }
  return text.str();
}

}  // namespace lminf::tensorrt
