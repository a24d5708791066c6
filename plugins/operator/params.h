// What one call of lminf::LambdaAttention is given, on any device: plain C++17, no CUDA header.
//
// The operator itself is described in docs/operator.md. Every tensor is contiguous, row-major.
#pragma once

#include <algorithm>
#include <cstdint>

#include "contract.h"

namespace lminf {

enum class DataType : std::int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// One step of one layer. Addresses are those of the device the kernel runs on.
//
// Aliasing: a present tensor is updated in place where its pointer equals its past's; where the
// pointers differ, the past is copied first. Other overlaps are not allowed.
//
// Without sink tokens (N = 0) the present sinks may be null: they are not read.
struct LambdaAttentionParams : Tensors, Attributes {
  DataType dataType = DataType::kFloat16;  // T
  bool int8Cache = false;                  // the rings hold int8
  bool hasKeyBias = false;                 // without the keys' bias; only with int8Cache

  std::int64_t batchSize = 0;       // B
  std::int64_t numHeads = 0;        // H
  std::int64_t numKvHeads = 0;      // G
  std::int64_t sequenceLength = 0;  // S
  std::int64_t capacity = 0;        // C
  std::int64_t headDim = 0;         // D
  std::int64_t sinkBatchSize = 0;   // rows of the past sinks: B, or 1 when N == 0; 0 means B

  // A ring smaller than W + S - 1 is refused, since it would lose keys once it wraps. A runtime
  // that starts with a small ring and grows it sets this: it promises that no row wraps in this
  // call, pastLength + S <= C.
  bool growingRing = false;

  std::int64_t sinkSlots() const { return std::max<std::int64_t>(numSinkTokens, 1); }
};

}  // namespace lminf
