#include "tensors.h"

#include <algorithm>
#include <array>
#include <cstdint>

#include "../operator/message.h"
#include "../operator/rules.h"
#include "validate.h"

namespace lminf::tensorrt {
namespace {

using nvinfer1::Dims;

using Shapes = std::array<Shape, kNumInt8CacheInputs>;

Shapes shapesOf(const Dims* inputs, bool int8Cache) {
  Shapes shapes;
  const auto count = static_cast<std::size_t>(numInputs(int8Cache, false));
  for (std::size_t input = 0; input < count; ++input) {
    const Dims& dims = inputs[input];
    shapes[input].assign(dims.d, dims.d + std::max<std::int32_t>(dims.nbDims, 0));
  }
  return shapes;
}

std::string readType(nvinfer1::DataType type, DataType& result) {
  switch (type) {
    case nvinfer1::DataType::kFLOAT: result = DataType::kFloat32; return {};
    case nvinfer1::DataType::kHALF: result = DataType::kFloat16; return {};
    case nvinfer1::DataType::kBF16: result = DataType::kBfloat16; return {};
    default:
      return message("query has element type ", static_cast<std::int32_t>(type),
                     " of nvinfer1::DataType; the kernels take kFLOAT, kHALF and kBF16");
  }
}

std::string read(const Attributes& attributes, const Shapes& shapes, nvinfer1::DataType type,
                 LambdaAttentionParams& params) {
  static_cast<Attributes&>(params) = attributes;
  const std::string problem = readShapes(shapes.data(), params);
  return problem.empty() ? readType(type, params.dataType) : problem;
}

}  // namespace

bool isModelType(nvinfer1::DataType type) {
  DataType ignored;
  return readType(type, ignored).empty();
}

nvinfer1::DataType typeOf(const Operand& operand, nvinfer1::DataType query, bool int8Cache) {
  switch (operand.element) {
    case ElementKind::kInt64: return nvinfer1::DataType::kINT64;
    case ElementKind::kFloat32: return nvinfer1::DataType::kFLOAT;
    case ElementKind::kRing: return int8Cache ? nvinfer1::DataType::kINT8 : query;
    case ElementKind::kModel: break;
  }
  return query;
}

std::string readStep(const Attributes& attributes, const Dims* inputs, nvinfer1::DataType type,
                     LambdaAttentionParams& params) {
  const std::string problem = read(attributes, shapesOf(inputs, params.int8Cache), type, params);
  return problem.empty() ? validateSettings(params) : problem;
}

std::string checkOpenShapes(const Attributes& attributes, const Dims* inputs,
                            nvinfer1::DataType type, bool int8Cache) {
  const Shapes shapes = shapesOf(inputs, int8Cache);
  LambdaAttentionParams params;
  params.int8Cache = int8Cache;
  std::string problem = read(attributes, shapes, type, params);
  if (!problem.empty()) return problem;
  if (params.numHeads == kOpen || params.numKvHeads == kOpen || params.headDim == kOpen) {
    return message("heads and head_dim must be fixed, query has shape ", text(shapes[kQuery]),
                   " and key ", text(shapes[kKey]));
  }
  // Open sink rows agree with whatever the batch will be.
  if (params.sinkBatchSize == kOpen || params.batchSize == kOpen) params.sinkBatchSize = 0;
  if (params.batchSize == kOpen) params.batchSize = 1;
  if (params.sequenceLength == kOpen) params.sequenceLength = 1;
  if (params.capacity == kOpen) params.capacity = attributes.windowSize;
  return validateSettings(params);
}

}  // namespace lminf::tensorrt
