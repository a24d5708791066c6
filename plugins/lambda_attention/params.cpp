#include "params.h"

#include <initializer_list>
#include <sstream>

#include "plan.h"

namespace lminf {
namespace {

constexpr std::int64_t kMaxPosition = std::int64_t{1} << 40;
constexpr std::int64_t kMaxRingElements = std::int64_t{1} << 30;  // C * D of one head, int32 offsets
constexpr std::int64_t kMaxRows = std::int64_t{1} << 30;          // B * H * S, grid dimensions

template <class... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream text;
  text << "LambdaAttention: ";
  (text << ... << parts);
  return text.str();
}

struct NamedSize {
  const char* name;
  std::int64_t value;
};

struct NamedPointer {
  const char* name;
  const void* pointer;
  std::size_t alignment;
};

std::string checkSizes(const LambdaAttentionParams& p) {
  for (const NamedSize size : {NamedSize{"batch size B", p.batchSize},
                               NamedSize{"query heads H", p.numHeads},
                               NamedSize{"key/value heads G", p.numKvHeads},
                               NamedSize{"new tokens S", p.sequenceLength},
                               NamedSize{"ring slots C", p.capacity}}) {
    if (size.value <= 0) {
      return message(size.name, " = ", size.value, ": must be at least 1");
    }
    if (size.value > kMaxRows) {
      return message(size.name, " = ", size.value, ": must be at most ", kMaxRows);
    }
  }
  if (p.numHeads % p.numKvHeads != 0) {
    return message("query heads H = ", p.numHeads, ": must be a multiple of key/value heads G = ",
                   p.numKvHeads);
  }
  if (p.numHeads > kMaxRows / p.batchSize ||
      p.sequenceLength > kMaxRows / (p.batchSize * p.numHeads)) {
    return message("B * H * S = ", p.batchSize, " * ", p.numHeads, " * ", p.sequenceLength,
                   ": must be at most ", kMaxRows);
  }
  if (!isSupportedHeadDim(p.headDim)) {
    return message("head_dim = ", p.headDim, ": the kernels take 64, 80, 96, 128 and 256");
  }
  if (p.capacity > kMaxRingElements / p.headDim) {
    return message("ring slots C = ", p.capacity, ": must be at most ", kMaxRingElements / p.headDim,
                   " at head_dim ", p.headDim);
  }
  return {};
}

std::string checkAttributes(const LambdaAttentionParams& p) {
  if (p.numSinkTokens < 0 || p.numSinkTokens > kMaxRingElements / p.headDim) {
    return message("num_sink_tokens = ", p.numSinkTokens, ": must be in 0 ... ",
                   kMaxRingElements / p.headDim);
  }
  if (p.windowSize < 1 || p.windowSize > kMaxPosition) {
    return message("window_size = ", p.windowSize, ": must be in 1 ... 2^40");
  }
  if (p.distanceLimit < p.windowSize || p.distanceLimit > kMaxPosition) {
    return message("distance_limit = ", p.distanceLimit, ": must be in window_size = ",
                   p.windowSize, " ... 2^40");
  }
  if (p.rotaryDim < 0 || p.rotaryDim % 2 != 0 || p.rotaryDim > p.headDim) {
    return message("rotary_dim = ", p.rotaryDim, ": must be even and in 0 ... head_dim = ",
                   p.headDim);
  }
  if (!(p.scale - p.scale == 0.0f)) {
    return message("scale = ", p.scale, ": must be finite");
  }
  if (!(p.softcap >= 0.0f) || !(p.softcap - p.softcap == 0.0f)) {
    return message("softcap = ", p.softcap, ": must be finite and at least 0 (0 means none)");
  }
  return {};
}

std::string checkRing(const LambdaAttentionParams& p) {
  if (p.sequenceLength > p.capacity) {
    return message("ring slots C = ", p.capacity, ": fewer than the S = ", p.sequenceLength,
                   " new tokens of the step");
  }
  if (!p.growingRing && p.capacity < p.windowSize + p.sequenceLength - 1) {
    return message("ring slots C = ", p.capacity, ": must be at least window_size + S - 1 = ",
                   p.windowSize, " + ", p.sequenceLength, " - 1, or keys are overwritten while in "
                   "use; bring fewer tokens per step or export with a larger chunk_size");
  }
  const std::int64_t sinkBatch = p.sinkBatchSize;
  if (sinkBatch != 0 && sinkBatch != p.batchSize && !(sinkBatch == 1 && p.numSinkTokens == 0)) {
    return message("past_sink_key has ", sinkBatch, " rows: must have B = ", p.batchSize,
                   p.numSinkTokens == 0 ? " or 1" : "");
  }
  return {};
}

std::string checkPointers(std::initializer_list<NamedPointer> pointers) {
  for (const NamedPointer& named : pointers) {
    if (named.pointer == nullptr) {
      return message(named.name, " is a null pointer");
    }
    if (reinterpret_cast<std::uintptr_t>(named.pointer) % named.alignment != 0) {
      return message(named.name, " at ", named.pointer, ": must be aligned to ", named.alignment,
                     " bytes");
    }
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
  std::string problem = checkSizes(p);
  if (problem.empty()) problem = checkAttributes(p);
  if (problem.empty()) problem = checkRing(p);
  return problem;
}

std::string validate(const LambdaAttentionParams& p) {
  std::string problem = validateSettings(p);
  if (!problem.empty()) return problem;
  problem = checkPointers({{"query", p.query, 16},
                           {"key", p.key, 16},
                           {"value", p.value, 16},
                           {"past_key", p.pastKey, 16},
                           {"past_value", p.pastValue, 16},
                           {"past_length", p.pastLength, 8},
                           {"new_length", p.newLength, 8},
                           {"output", p.output, 16},
                           {"present_key", p.presentKey, 16},
                           {"present_value", p.presentValue, 16}});
  if (problem.empty() && p.rotaryDim > 0) {
    problem = checkPointers({{"cos", p.cos, 4},
                             {"sin", p.sin, 4},
                             {"limit_cos", p.limitCos, 4},
                             {"limit_sin", p.limitSin, 4}});
  }
  const bool writesSinks = p.numSinkTokens > 0 || p.presentSinkKey || p.presentSinkValue;
  if (problem.empty() && writesSinks) {
    problem = checkPointers({{"past_sink_key", p.pastSinkKey, 16},
                             {"past_sink_value", p.pastSinkValue, 16},
                             {"present_sink_key", p.presentSinkKey, 16},
                             {"present_sink_value", p.presentSinkValue, 16}});
  }
  const std::uintptr_t floats = reinterpret_cast<std::uintptr_t>(p.alibiSlopes) |
                                reinterpret_cast<std::uintptr_t>(p.sinkLogits);
  if (problem.empty() && floats % 4 != 0) {
    problem = message("alibi_slopes and sink_logits must be aligned to 4 bytes");
  }
  return problem;
}

}  // namespace lminf
