#include "case.h"

#include <fstream>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace harness {

using nvinfer1::DataType;
using nvinfer1::Dims;

namespace {

DataType readType(const std::string& name) {
  if (name == "float32") return DataType::kFLOAT;
  if (name == "float16") return DataType::kHALF;
  if (name == "bfloat16") return DataType::kBF16;
  throw std::runtime_error("unknown type " + name);
}

void readTensor(std::istringstream& words, std::vector<Step>& steps, std::size_t count) {
  std::string name;
  words >> name;
  if (steps.empty()) throw std::runtime_error("a tensor before the first step");
  std::vector<Dims>& shapes = steps.back().shapes;
  if (shapes.size() >= count || kInputs[shapes.size()].name != name) {
    throw std::runtime_error("tensor " + name + " out of order");
  }
  Dims dims{};
  for (std::int64_t size = 0; words >> size;) dims.d[dims.nbDims++] = size;
  shapes.push_back(dims);
}

void readLine(const std::string& line, Case& result) {
  std::istringstream words(line);
  std::string kind;
  std::string name;
  words >> kind;
  if (kind == "int") {
    words >> name >> result.integers[name];
  } else if (kind == "float") {
    std::string number;
    words >> name >> number;
    result.floats[name] = std::stof(number);  // unlike a stream it reads nan and inf
  } else if (kind == "type") {
    words >> name;
    result.type = readType(name);
  } else if (kind == "rings") {
    words >> name;
    if (name != "int8") throw std::runtime_error("unknown rings " + name);
    result.int8Rings = true;
  } else if (kind == "profile") {
    Profile profile{};
    for (std::int64_t& size : profile.batch) words >> size;
    for (std::int64_t& size : profile.sequence) words >> size;
    result.profiles.push_back(profile);
  } else if (kind == "step") {
    result.steps.emplace_back();
    words >> result.steps.back().profile;
  } else if (kind == "tensor") {
    readTensor(words, result.steps, static_cast<std::size_t>(result.numInputs()));
    return;  // a list of dimensions ends by failing to read one more
  } else {
    throw std::runtime_error("unknown word " + kind);
  }
  if (words.fail()) throw std::runtime_error("a value is missing or no number");
}

}  // namespace

Case readCase(const std::filesystem::path& folder) {
  Case result;
  result.folder = folder;
  std::ifstream file(folder / "case.txt");
  if (!file) throw std::runtime_error("cannot read " + (folder / "case.txt").string());
  for (std::string line; std::getline(file, line);) {
    try {
      if (!line.empty()) readLine(line, result);
    } catch (const std::exception& error) {
      throw std::runtime_error("case.txt: \"" + line + "\": " + error.what());
    }
  }
  if (result.profiles.empty() || result.steps.empty()) {
    throw std::runtime_error("case.txt has no profile or no step");
  }
  for (const Step& step : result.steps) {
    if (step.profile >= result.profiles.size() ||
        step.shapes.size() != static_cast<std::size_t>(result.numInputs())) {
      throw std::runtime_error("case.txt: a step lacks tensors or names an unknown profile");
    }
  }
  return result;
}

DataType Case::typeOf(std::int32_t place) const {
  const lminf::Operand& operand =
      place < numInputs() ? kInputs[place] : kOutputs[place - numInputs()];
  switch (operand.element) {
    case lminf::ElementKind::kInt64: return DataType::kINT64;
    case lminf::ElementKind::kFloat32: return DataType::kFLOAT;
    case lminf::ElementKind::kRing: return int8Rings ? DataType::kINT8 : type;
    default: return type;
  }
}

std::size_t Case::bytesOf(std::int32_t place, const Dims& shape) const {
  std::size_t size = 2;
  if (typeOf(place) == DataType::kFLOAT) size = 4;
  if (typeOf(place) == DataType::kINT64) size = 8;
  if (typeOf(place) == DataType::kINT8) size = 1;
  for (std::int32_t axis = 0; axis < shape.nbDims; ++axis) {
    size *= static_cast<std::size_t>(shape.d[axis]);
  }
  return size;
}

std::vector<char> readBytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void writeBytes(const std::filesystem::path& path, const std::vector<char>& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file) throw std::runtime_error("cannot write " + path.string());
}

}  // namespace harness
