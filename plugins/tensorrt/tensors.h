// The node's tensors as TensorRT describes them, and the step they describe together.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "../operator/params.h"

namespace lminf::tensorrt {

// The type that a tensor must have, given that of the query, of which all tensors of T are.
nvinfer1::DataType typeOf(const Operand& operand, nvinfer1::DataType query, bool int8Cache);

// Whether a query may have this element type.
bool isModelType(nvinfer1::DataType type);

// What is wrong with shapes that are known in full, in one line; empty if `params` was filled
// with attributes and sizes and may run once it has pointers. Its kind of ring comes in.
std::string readStep(const Attributes& attributes, const nvinfer1::Dims* inputs,
                     nvinfer1::DataType type, LambdaAttentionParams& params);

// What is wrong with shapes of which some dimensions are -1, still open. Batch size and new
// tokens are taken as 1 while they are open.
std::string checkOpenShapes(const Attributes& attributes, const nvinfer1::Dims* inputs,
                            nvinfer1::DataType type, bool int8Cache);

}  // namespace lminf::tensorrt
