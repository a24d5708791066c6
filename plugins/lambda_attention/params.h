// What one call of lminf::LambdaAttention is given, and whether it may run.
//
// Plain C++17: no CUDA header, no device. The operator itself is described in docs/operator.md;
// lminf_export/op.py names the same 17 inputs and 5 outputs.
//
// Letters: B batch, H query heads, G key/value heads (H % G == 0), S new tokens, C ring slots,
// N sink tokens, D head dimension, R rotated dimensions (R <= D, even), W window, L limit.
// T below is the model's type. Every tensor is contiguous, row-major.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lminf {

enum class DataType : std::int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

// One step of one layer. Pointers are device addresses (host addresses for a CPU kernel).
//
// Aliasing: a present tensor is updated in place where its pointer equals its past's; where the
// pointers differ, the past is copied first. Other overlaps are not allowed.
struct LambdaAttentionParams {
  // Inputs, in the operator's order.
  const void* query = nullptr;          // T (B, H, S, D), not rotated
  const void* key = nullptr;            // T (B, G, S, D), not rotated
  const void* value = nullptr;          // T (B, G, S, D)
  const void* pastKey = nullptr;        // T (B, G, C, D), rotated, position p in slot p mod C
  const void* pastValue = nullptr;      // T (B, G, C, D)
  const void* pastSinkKey = nullptr;    // T (sinkBatchSize, G, max(N, 1), D), not rotated
  const void* pastSinkValue = nullptr;  // like pastSinkKey
  const std::int64_t* pastLength = nullptr;     // (B), tokens seen, 0 ... 2^40
  const std::int64_t* newLength = nullptr;      // (B), 0 ... S real tokens; padding behind them
  const std::int64_t* queryPosition = nullptr;  // (B, S); follows from the lengths, never read
  const std::int64_t* slotPosition = nullptr;   // (B, C); follows from the lengths, never read
  const float* cos = nullptr;          // (B, S, R/2) rows of the new tokens; unread when R == 0
  const float* sin = nullptr;          // like cos
  const float* limitCos = nullptr;     // (R/2), the row of distance L; unread when R == 0
  const float* limitSin = nullptr;     // like limitCos
  const float* alibiSlopes = nullptr;  // (H), zeros without ALiBi; null means zeros
  const float* sinkLogits = nullptr;   // (H), -inf without learned logits; null means -inf

  // Outputs, in the operator's order.
  void* output = nullptr;           // T (B, H, S, D); rows behind newLength become zeros
  void* presentKey = nullptr;       // like pastKey
  void* presentValue = nullptr;     // like pastValue
  void* presentSinkKey = nullptr;   // T (B, G, max(N, 1), D); may be null when N == 0
  void* presentSinkValue = nullptr;  // like presentSinkKey

  // Sizes.
  DataType dataType = DataType::kFloat16;
  std::int64_t batchSize = 0;       // B
  std::int64_t numHeads = 0;        // H
  std::int64_t numKvHeads = 0;      // G
  std::int64_t sequenceLength = 0;  // S
  std::int64_t capacity = 0;        // C
  std::int64_t headDim = 0;         // D: 64, 80, 96, 128 or 256
  std::int64_t sinkBatchSize = 0;   // rows of pastSinkKey: B, or 1 when N == 0; 0 means B

  // Attributes, as on the node.
  std::int64_t numSinkTokens = 0;  // N
  std::int64_t windowSize = 0;     // W, keys a query sees, its own included
  std::int64_t distanceLimit = 0;  // L >= W
  std::int64_t rotaryDim = 0;      // R, 0 for a model without rotation
  bool rotaryInterleaved = false;
  float scale = 1.0f;
  float softcap = 0.0f;  // 0 for none

  // A ring smaller than W + S - 1 is refused, since it would lose keys once it wraps. A runtime
  // that starts with a small ring and grows it sets this: it promises that no row wraps in this
  // call, pastLength + S <= C.
  bool growingRing = false;
};

// What is wrong with sizes, types and attributes, in one line; empty if nothing. Looks at no
// pointer, so a plugin can ask before any memory exists. Thread-safe, needs no device.
std::string validateSettings(const LambdaAttentionParams& params);

// validateSettings, and the pointers: null where a tensor is needed, or not aligned to 16 bytes
// (8 for int64, 4 for float tensors). Looks at no memory, needs no device.
std::string validate(const LambdaAttentionParams& params);

// Bytes of scratch memory `launch` can make use of. Grows with every size, so the answer for the
// largest shapes of a profile covers the smaller ones. Needs no device. With less memory (even
// none) launch still computes the same, with fewer splits of the keys, more slowly.
std::size_t workspaceSize(const LambdaAttentionParams& params);

}  // namespace lminf
