#include "validate.h"

#include <cstdint>
#include <initializer_list>

#include "../operator/message.h"
#include "../operator/rules.h"
#include "plan.h"

namespace lminf {
namespace {

constexpr std::int64_t kMaxRingElements = std::int64_t{1}
                                          << 30;          // C * D of one head, int32 offsets
constexpr std::int64_t kMaxRows = std::int64_t{1} << 30;  // B * H * S, grid dimensions

struct NamedSize {
  const char* name;
  std::int64_t value;
};

struct Tensor {
  const Operand& operand;
  const void* address;
};

std::string checkLimits(const LambdaAttentionParams& p) {
  for (const NamedSize size :
       {NamedSize{"batch size B", p.batchSize}, NamedSize{"query heads H", p.numHeads},
        NamedSize{"key/value heads G", p.numKvHeads}, NamedSize{"new tokens S", p.sequenceLength},
        NamedSize{"ring slots C", p.capacity}}) {
    if (size.value <= 0) {
      return message(size.name, " = ", size.value, ": must be at least 1");
    }
    if (size.value > kMaxRows) {
      return message(size.name, " = ", size.value, ": must be at most ", kMaxRows);
    }
  }
  if (!isSupportedHeadDim(p.headDim)) {
    return message("head_dim = ", p.headDim, ": the kernels take 32, 64, 80, 96, 128 and 256");
  }
  std::string problem = checkSizes(p);
  if (!problem.empty()) return problem;
  if (p.numHeads > kMaxRows / p.batchSize ||
      p.sequenceLength > kMaxRows / (p.batchSize * p.numHeads)) {
    return message("B * H * S = ", p.batchSize, " * ", p.numHeads, " * ", p.sequenceLength,
                   ": must be at most ", kMaxRows);
  }
  if (p.capacity > kMaxRingElements / p.headDim) {
    return message("ring slots C = ", p.capacity, ": must be at most ",
                   kMaxRingElements / p.headDim, " at head_dim ", p.headDim);
  }
  if (p.numSinkTokens > kMaxRingElements / p.headDim) {
    return message("num_sink_tokens = ", p.numSinkTokens, ": must be at most ",
                   kMaxRingElements / p.headDim, " at head_dim ", p.headDim);
  }
  return {};
}

// A chunk is written before anything is attended, so it must fit a growing ring too.
std::string checkRingOf(const LambdaAttentionParams& p) {
  if (p.sequenceLength > p.capacity) {
    return message("ring slots C = ", p.capacity, ": fewer than the S = ", p.sequenceLength,
                   " new tokens of the step");
  }
  return p.growingRing ? "" : checkRing(p.capacity, p.windowSize, p.sequenceLength);
}

// Bytes; the tensors of the model and the rings are read 16 bytes at a time.
std::size_t alignmentOf(ElementKind element) {
  switch (element) {
    case ElementKind::kInt64: return sizeof(std::int64_t);
    case ElementKind::kFloat32: return sizeof(float);
    default: return 16;
  }
}

std::string checkAlignment(const Tensor& tensor) {
  const std::size_t alignment = alignmentOf(tensor.operand.element);
  if (reinterpret_cast<std::uintptr_t>(tensor.address) % alignment == 0) return {};
  return message(tensor.operand.name, " at ", tensor.address, ": must be aligned to ", alignment,
                 " bytes");
}

std::string checkPointers(std::initializer_list<Tensor> tensors) {
  for (const Tensor& tensor : tensors) {
    if (tensor.address == nullptr) return message(tensor.operand.name, " is a null pointer");
    const std::string problem = checkAlignment(tensor);
    if (!problem.empty()) return problem;
  }
  return {};
}

}  // namespace

std::string validateSettings(const LambdaAttentionParams& p) {
  if (p.dataType != DataType::kFloat32 && p.dataType != DataType::kFloat16 &&
      p.dataType != DataType::kBfloat16) {
    return message("data type ", static_cast<std::int32_t>(p.dataType),
                   ": the kernels take float32, float16 and bfloat16");
  }
  if (p.hasKeyBias) return "rings without the bias of keys: only the CPU kernel takes them";
  std::string problem = checkAttributes(p);
  if (problem.empty()) problem = checkLimits(p);
  if (problem.empty()) problem = checkRingOf(p);
  return problem;
}

std::string validate(const LambdaAttentionParams& p) {
  std::string problem = validateSettings(p);
  if (!problem.empty()) return problem;
  problem = checkPointers({{kInputs[kQuery], p.query},
                           {kInputs[kKey], p.key},
                           {kInputs[kValue], p.value},
                           {kInputs[kPastKey], p.pastKey},
                           {kInputs[kPastValue], p.pastValue},
                           {kInputs[kPastLength], p.pastLength},
                           {kInputs[kNewLength], p.newLength},
                           {kOutputs[kOutput], p.output},
                           {kOutputs[kPresentKey], p.presentKey},
                           {kOutputs[kPresentValue], p.presentValue}});
  if (problem.empty() && p.rotaryDim > 0) {
    problem = checkPointers({{kInputs[kCos], p.cos},
                             {kInputs[kSin], p.sin},
                             {kInputs[kLimitCos], p.limitCos},
                             {kInputs[kLimitSin], p.limitSin}});
  }
  if (problem.empty() && p.int8Cache) {
    problem = checkPointers({{kInputs[kPastKeyScale], p.pastKeyScale},
                             {kInputs[kPastValueScale], p.pastValueScale},
                             {kOutputs[kPresentKeyScale], p.presentKeyScale},
                             {kOutputs[kPresentValueScale], p.presentValueScale}});
  }
  const bool writesSinks = p.numSinkTokens > 0 || p.presentSinkKey || p.presentSinkValue;
  if (problem.empty() && writesSinks) {
    problem = checkPointers({{kInputs[kPastSinkKey], p.pastSinkKey},
                             {kInputs[kPastSinkValue], p.pastSinkValue},
                             {kOutputs[kPresentSinkKey], p.presentSinkKey},
                             {kOutputs[kPresentSinkValue], p.presentSinkValue}});
  }
  if (problem.empty()) problem = checkAlignment({kInputs[kAlibiSlopes], p.alibiSlopes});
  if (problem.empty()) problem = checkAlignment({kInputs[kSinkLogits], p.sinkLogits});
  return problem;
}

}  // namespace lminf
