// What TensorRT finds in the library: its creators, and where to say what goes wrong.

#include <NvInferRuntime.h>

#include <memory>

#include "attributes.h"
#include "guarded.h"
#include "plugin.h"

#if NV_TENSORRT_MAJOR < 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR < 3)
#error "TensorRT 10.3 or later is needed: earlier releases cannot alias a plugin's caches"
#endif

#define LMINF_EXPORT extern "C" __attribute__((visibility("default")))

namespace lminf::tensorrt {
namespace {

// Of the operator, or of the same over rings of int8.
class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(bool int8Cache) : int8Cache_(int8Cache) {}

  nvinfer1::IPluginV3* createPlugin(nvinfer1::AsciiChar const* name,
                                    nvinfer1::PluginFieldCollection const* fc,
                                    nvinfer1::TensorRTPhase phase) noexcept override {
    return guarded<nvinfer1::IPluginV3*>("createPlugin", nullptr, [&]() -> nvinfer1::IPluginV3* {
      Attributes attributes;
      const std::string problem = readFields(fc, attributes);
      if (!problem.empty()) {
        logError(problem + " (node " + (name != nullptr ? name : "without a name") + ")");
        return nullptr;
      }
      return std::make_unique<Plugin>(attributes, int8Cache_, phase).release();
    });
  }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override {
    return guarded<nvinfer1::PluginFieldCollection const*>("getFieldNames", nullptr,
                                                           [] { return fieldNames(); });
  }
  nvinfer1::AsciiChar const* getPluginName() const noexcept override {
    return int8Cache_ ? kInt8CacheName : kName;
  }
  nvinfer1::AsciiChar const* getPluginVersion() const noexcept override { return kPluginVersion; }
  nvinfer1::AsciiChar const* getPluginNamespace() const noexcept override { return kDomain; }

 private:
  const bool int8Cache_;
};

}  // namespace
}  // namespace lminf::tensorrt

LMINF_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  lminf::tensorrt::setLoggerFinder(finder);
}

LMINF_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
  static lminf::tensorrt::Creator creator(false);
  static lminf::tensorrt::Creator int8Creator(true);
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator, &int8Creator};
  nbCreators = 2;
  return creators;
}
