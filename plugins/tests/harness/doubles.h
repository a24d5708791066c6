// The parts of TensorRT a plugin talks to, played by the harness.
//
// IExprBuilder and IDimensionExpr forward to an implementation object; ours derive from both
// sides, so that no library of TensorRT's is needed.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

namespace harness {

// Remembers what a plugin logs. The plugin asks which release it talks to; see main.cpp.
class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, nvinfer1::AsciiChar const* text) noexcept override {
    if (severity <= Severity::kERROR) {
      errors.emplace_back(text);
    } else if (severity == Severity::kWARNING) {
      warnings.emplace_back(text);
    }
  }

  std::vector<std::string> errors;
  std::vector<std::string> warnings;
};

class LoggerFinder final : public nvinfer1::ILoggerFinder {
 public:
  explicit LoggerFinder(Logger& logger) : logger_(logger) {}
  nvinfer1::ILogger* findLogger() override { return &logger_; }

 private:
  Logger& logger_;
};

// A dimension: a number, or one that is open while the network is built.
class Dimension final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Dimension(std::int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const override { return value_ >= 0; }
  std::int64_t getConstantValue() const override {
    return value_ >= 0 ? value_ : std::numeric_limits<std::int64_t>::min();
  }
  bool isSizeTensor() const override { return false; }

 private:
  std::int64_t value_;
};

// Makes constants; a plugin of ours needs no operation.
class ExprBuilder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
 public:
  ExprBuilder() { mImpl = this; }
  nvinfer1::IDimensionExpr const* constant(std::int64_t value) override {
    made_.push_back(std::make_unique<Dimension>(value));
    return made_.back().get();
  }
  nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation,
                                            nvinfer1::IDimensionExpr const&,
                                            nvinfer1::IDimensionExpr const&) override {
    return nullptr;
  }
  nvinfer1::IDimensionExpr const* declareSizeTensor(std::int32_t, nvinfer1::IDimensionExpr const&,
                                                    nvinfer1::IDimensionExpr const&) override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Dimension>> made_;
};

class ResourceContext final : public nvinfer1::IPluginResourceContext {
 public:
  nvinfer1::IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
  nvinfer1::IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
};

}  // namespace harness
