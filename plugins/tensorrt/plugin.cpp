#include "plugin.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <memory>

#include "../operator/rules.h"
#include "cache_use.h"
#include "guarded.h"
#include "lambda_attention.h"
#include "plan.h"
#include "tensors.h"
#include "validate.h"

namespace lminf::tensorrt {
namespace {

using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginCapabilityType;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kOk = 0;
constexpr int32_t kFailed = 1;

// Of all inputs that a node may have.
using Shapes = std::array<Dims, kNumInt8CacheInputs>;

int32_t report(const std::string& problem) {
  if (problem.empty()) return kOk;
  logError(problem);
  return kFailed;
}

// Dimensions of an expression that are known while the network is built; -1 for the others.
Dims knownDims(const nvinfer1::DimsExprs& exprs) {
  Dims dims{};
  dims.nbDims = exprs.nbDims;
  for (int32_t axis = 0; axis < exprs.nbDims; ++axis) {
    const nvinfer1::IDimensionExpr& size = *exprs.d[axis];
    dims.d[axis] = size.isConstant() ? size.getConstantValue() : -1;
  }
  return dims;
}

Shapes maximalShapes(const DynamicPluginTensorDesc* inputs, int32_t count) {
  Shapes shapes{};
  for (int32_t input = 0; input < count; ++input) {
    shapes[static_cast<std::size_t>(input)] = inputs[input].max;
  }
  return shapes;
}

Shapes shapesOf(const PluginTensorDesc* inputs, int32_t count) {
  Shapes shapes{};
  for (int32_t input = 0; input < count; ++input) {
    shapes[static_cast<std::size_t>(input)] = inputs[input].dims;
  }
  return shapes;
}

// Without sink tokens the present sinks are not read, and nothing is written there.
void setPointers(LambdaAttentionParams& params, const void* const* inputs, void* const* outputs) {
  setTensors(params, inputs, outputs, params.int8Cache, params.hasKeyBias);
  if (params.numSinkTokens == 0) params.presentSinkKey = params.presentSinkValue = nullptr;
}

}  // namespace

Plugin::Plugin(const Attributes& attributes, bool int8Cache, nvinfer1::TensorRTPhase phase)
    : attributes_(attributes), int8Cache_(int8Cache), phase_(phase), fields_(attributes),
      metadata_(describe(attributes)) {
  step_.int8Cache = int8Cache;
}

std::string Plugin::checkCounts(int32_t nbInputs, int32_t nbOutputs) const {
  const int32_t inputs = numInputs(int8Cache_, false), outputs = numOutputs(int8Cache_);
  if (nbInputs == inputs && nbOutputs == outputs) return {};
  return message("version ", kPluginVersion, " of ", getPluginName(), " has ", inputs,
                 " inputs and ", outputs, " outputs, the node has ", nbInputs, " and ", nbOutputs,
                 "; export the model again");
}

// Place counts inputs, then outputs.
const Operand& Plugin::operandAt(int32_t place) const {
  const int32_t inputs = numInputs(int8Cache_, false);
  return place < inputs ? kInputs[place] : kOutputs[place - inputs];
}

void Plugin::takeNote(void const* const* inputs, void* const* outputs) const {
  if (phase_ != nvinfer1::TensorRTPhase::kRUNTIME) return;
  const int32_t copied = noteCaches(inputs, outputs, getNbOutputs(), attributes_.numSinkTokens);
  static std::atomic<bool> told{false};
  if (copied == 0 || told.exchange(true)) return;
  logWarning(message("past and present of ", copied, " caches of a layer have two addresses, ",
                     "so every step copies them; said once, lminfCachesApart() counts them"));
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
  switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>("clone", nullptr, [this] {
    auto copy = std::make_unique<Plugin>(attributes_, int8Cache_, phase_);
    copy->step_ = step_;
    copy->workspaceBytes_ = workspaceBytes_;
    copy->problem_ = problem_;
    return copy.release();
  });
}

int32_t Plugin::getAliasedInput(int32_t outputIndex) noexcept {
  if (outputIndex < 0 || outputIndex >= getNbOutputs()) return kNone;
  // Without sink tokens the pasts are constants that all such layers share: nothing to update.
  const bool constant = isSinkOutput(outputIndex) && attributes_.numSinkTokens == 0;
  return constant ? kNone : kUpdatedInput[outputIndex];
}

int32_t Plugin::getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
                                   nvinfer1::DataType const* inputTypes,
                                   int32_t nbInputs) const noexcept {
  return guarded<int32_t>("getOutputDataTypes", kFailed, [&] {
    const std::string problem = checkCounts(nbInputs, nbOutputs);
    if (!problem.empty()) return report(problem);
    for (int32_t input = 0; input < nbInputs; ++input) {
      const nvinfer1::DataType query = inputTypes[kQuery];
      if (!isModelType(query) || inputTypes[input] != typeOf(kInputs[input], query, int8Cache_)) {
        return report(message(
            kInputs[input].name, " has element type ", static_cast<int32_t>(inputTypes[input]),
            " of nvinfer1::DataType, query has ", static_cast<int32_t>(inputTypes[kQuery])));
      }
    }
    for (int32_t output = 0; output < nbOutputs; ++output) {
      outputTypes[output] = typeOf(kOutputs[output], inputTypes[kQuery], int8Cache_);
    }
    return kOk;
  });
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
                                nvinfer1::DimsExprs const*, int32_t nbShapeInputs,
                                nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                                nvinfer1::IExprBuilder&) noexcept {
  return guarded<int32_t>("getOutputShapes", kFailed, [&] {
    std::string problem = checkCounts(nbInputs, nbOutputs);
    if (problem.empty() && nbShapeInputs != 0) {
      problem = message("takes no shape tensors, the node has ", nbShapeInputs);
    }
    if (!problem.empty()) return report(problem);
    Shapes known{};
    for (int32_t input = 0; input < nbInputs; ++input) {
      known[static_cast<std::size_t>(input)] = knownDims(inputs[input]);
    }
    // Element types are not known here; any of them has the same rules for shapes.
    problem = checkOpenShapes(attributes_, known.data(), nvinfer1::DataType::kHALF, int8Cache_);
    if (!problem.empty()) return report(problem);
    for (int32_t output = 0; output < nbOutputs; ++output) {
      outputs[output] = inputs[shapeSource(output)];
      const bool constant = isSinkOutput(output) && attributes_.numSinkTokens == 0;
      if (constant) outputs[output].d[0] = inputs[kQuery].d[0];
    }
    return kOk;
  });
}

bool Plugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* inOut,
                                       int32_t nbInputs, int32_t nbOutputs) noexcept {
  if (nbInputs != numInputs(int8Cache_, false) || nbOutputs != numOutputs(int8Cache_) || pos < 0 ||
      pos >= nbInputs + nbOutputs) {
    return false;
  }
  const PluginTensorDesc& asked = inOut[pos].desc;
  const nvinfer1::DataType query = inOut[kQuery].desc.type;
  return asked.format == nvinfer1::TensorFormat::kLINEAR && isModelType(query) &&
         asked.type == typeOf(operandAt(pos), query, int8Cache_);
}

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* in, int32_t nbInputs,
                                DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept {
  return guarded<int32_t>("configurePlugin", kFailed, [&] {
    const std::string problem = checkCounts(nbInputs, nbOutputs);
    if (!problem.empty()) return report(problem);
    LambdaAttentionParams largest;
    largest.int8Cache = int8Cache_;
    const Shapes shapes = maximalShapes(in, nbInputs);
    return report(readStep(attributes_, shapes.data(), in[kQuery].desc.type, largest));
  });
}

size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
                                DynamicPluginTensorDesc const*, int32_t nbOutputs) const noexcept {
  return guarded<size_t>("getWorkspaceSize", 0, [&]() -> size_t {
    std::string problem = checkCounts(nbInputs, nbOutputs);
    LambdaAttentionParams largest;
    largest.int8Cache = int8Cache_;
    if (problem.empty()) {
      const Shapes shapes = maximalShapes(inputs, nbInputs);
      problem = readStep(attributes_, shapes.data(), inputs[kQuery].desc.type, largest);
    }
    return report(problem) == kOk ? workspaceSize(largest) : 0;
  });
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* in, int32_t nbInputs, PluginTensorDesc const*,
                              int32_t nbOutputs) noexcept {
  return guarded<int32_t>("onShapeChange", kFailed, [&] {
    step_ = LambdaAttentionParams{};
    step_.int8Cache = int8Cache_;
    workspaceBytes_ = 0;
    problem_ = checkCounts(nbInputs, nbOutputs);
    if (problem_.empty()) {
      const Shapes shapes = shapesOf(in, nbInputs);
      problem_ = readStep(attributes_, shapes.data(), in[kQuery].type, step_);
    }
    if (problem_.empty()) workspaceBytes_ = workspaceSize(step_);
    return report(problem_);
  });
}

int32_t Plugin::enqueue(PluginTensorDesc const*, PluginTensorDesc const*, void const* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
  return guarded<int32_t>("enqueue", kFailed, [&] {
    if (!problem_.empty()) return report(problem_);
    if (step_.batchSize == 0) return report(message("enqueue before onShapeChange"));
    LambdaAttentionParams params = step_;
    setPointers(params, inputs, outputs);
    const std::size_t bytes = workspace != nullptr ? workspaceBytes_ : 0;
    const cudaError_t status = launch(params, workspace, bytes, stream);
    if (status == cudaSuccess) {
      takeNote(inputs, outputs);
      return kOk;
    }
    const std::string problem = validate(params);
    return report(problem.empty() ? message("the kernels failed: ", cudaGetErrorName(status))
                                  : problem);
  });
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  return clone();
}

}  // namespace lminf::tensorrt
