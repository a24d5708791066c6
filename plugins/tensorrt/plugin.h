// lminf::LambdaAttention, and the same over rings of int8, as TensorRT plugins: they map
// descriptors to the kernels' parameters.
#pragma once

#include <NvInferRuntime.h>

#include <string>

#include "../operator/params.h"
#include "../operator/rules.h"
#include "attributes.h"

namespace lminf::tensorrt {

inline constexpr const char* kPluginVersion = "1";
static_assert(kVersion == 1, "kPluginVersion is the operator's version as text");

// One node. All caches, scales too, are updated in place where TensorRT binds past and present to
// one address; where it does not, the past is copied first.
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // With int8Cache it is the plugin of the operator over rings of int8. What a builder enqueues to
  // measure says nothing about an engine's caches, so only the runtime phase takes note of them.
  Plugin(const Attributes& attributes, bool int8Cache, nvinfer1::TensorRTPhase phase);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(
      nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  nvinfer1::AsciiChar const* getPluginName() const noexcept override {
    return int8Cache_ ? kInt8CacheName : kName;
  }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kDomain; }

  // IPluginV3OneBuildV2
  int32_t getNbOutputs() const noexcept override { return numOutputs(int8Cache_); }
  int32_t getAliasedInput(int32_t outputIndex) noexcept override;
  int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
                             nvinfer1::DataType const* inputTypes,
                             int32_t nbInputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs,
                          nvinfer1::DimsExprs const* shapeInputs, int32_t nbShapeInputs,
                          nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                          nvinfer1::IExprBuilder& exprBuilder) noexcept override;
  bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut,
                                 int32_t nbInputs, int32_t nbOutputs) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                          nvinfer1::DynamicPluginTensorDesc const* out,
                          int32_t nbOutputs) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
                          nvinfer1::DynamicPluginTensorDesc const* outputs,
                          int32_t nbOutputs) const noexcept override;
  char const* getMetadataString() noexcept override { return metadata_.c_str(); }

  // IPluginV3OneRuntime
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs,
                        nvinfer1::PluginTensorDesc const* out, int32_t nbOutputs) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc,
                  nvinfer1::PluginTensorDesc const* outputDesc, void const* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
    return fields_.collection();
  }

 private:
  std::string checkCounts(int32_t nbInputs, int32_t nbOutputs) const;
  void takeNote(void const* const* inputs, void* const* outputs) const;
  const Operand& operandAt(int32_t place) const;

  const Attributes attributes_;
  const bool int8Cache_;
  const nvinfer1::TensorRTPhase phase_;
  const SerializedFields fields_;
  const std::string metadata_;
  // The step of the latest onShapeChange, without pointers; `problem_` if it cannot run.
  LambdaAttentionParams step_;
  std::size_t workspaceBytes_ = 0;
  std::string problem_;
};

}  // namespace lminf::tensorrt
