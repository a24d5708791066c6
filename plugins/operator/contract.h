// The operator's inputs, outputs and attributes, in order.
//
// Written by scripts/docs/write_all.py from lminf_export/operator/contract.py, which says
// what the letters of shapes mean; do not edit.
#pragma once

#include <cstdint>

// clang-format off

namespace lminf {

inline constexpr const char* kDomain = "lminf";
inline constexpr int kVersion = 1;
inline constexpr const char* kName = "LambdaAttention";
// The same operator over rings of int8. Its scales follow the other inputs and outputs.
inline constexpr const char* kInt8CacheName = "LambdaAttentionInt8Cache";
// The same, where keys lie in the ring without their bias.
inline constexpr const char* kKeyBiasName = "LambdaAttentionInt8CacheKeyBias";
// Digit tables: row kDigitBase · k + d is the rotation of position d · kDigitBaseᵏ.
inline constexpr std::int64_t kDigitBase = 1024;
inline constexpr std::int64_t kTableRows = 4096;

enum Input : std::int32_t {
  kQuery,
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kPastSinkKey,
  kPastSinkValue,
  kPastLength,
  kNewLength,
  kQueryPosition,
  kSlotPosition,
  kCos,
  kSin,
  kLimitCos,
  kLimitSin,
  kAlibiSlopes,
  kSinkLogits,
  kNumInputs,
  kPastKeyScale = kNumInputs,
  kPastValueScale,
  kNumInt8CacheInputs,
  kKeyBias = kNumInt8CacheInputs,
  kCosTable,
  kSinTable,
  kNumKeyBiasInputs,
};

enum Output : std::int32_t {
  kOutput,
  kPresentKey,
  kPresentValue,
  kPresentSinkKey,
  kPresentSinkValue,
  kNumOutputs,
  kPresentKeyScale = kNumOutputs,
  kPresentValueScale,
  kNumInt8CacheOutputs,
};

// kModel is T, the type of activations; kRing is T too, but int8 with an int8 cache.
enum class ElementKind : std::int32_t { kModel, kRing, kInt64, kFloat32 };

// Dimensions by name. kRotaryPairs is R/2; sinks have max(N, 1) slots.
enum class Letter : std::int32_t { kB, kH, kS, kD, kG, kC, kN, kRotaryPairs, kOne, kTableRows };

inline constexpr int kMostDimensions = 4;

struct Operand {
  const char* name;
  ElementKind element;
  int rank;
  Letter shape[kMostDimensions];
};

inline constexpr Operand kInputs[kNumKeyBiasInputs] = {
    {"query", ElementKind::kModel, 4,
     {Letter::kB, Letter::kH, Letter::kS, Letter::kD}},
    {"key", ElementKind::kModel, 4,
     {Letter::kB, Letter::kG, Letter::kS, Letter::kD}},
    {"value", ElementKind::kModel, 4,
     {Letter::kB, Letter::kG, Letter::kS, Letter::kD}},
    {"past_key", ElementKind::kRing, 4,
     {Letter::kB, Letter::kG, Letter::kC, Letter::kD}},
    {"past_value", ElementKind::kRing, 4,
     {Letter::kB, Letter::kG, Letter::kC, Letter::kD}},
    {"past_sink_key", ElementKind::kModel, 4,
     {Letter::kB, Letter::kG, Letter::kN, Letter::kD}},
    {"past_sink_value", ElementKind::kModel, 4,
     {Letter::kB, Letter::kG, Letter::kN, Letter::kD}},
    {"past_length", ElementKind::kInt64, 1,
     {Letter::kB}},
    {"new_length", ElementKind::kInt64, 1,
     {Letter::kB}},
    {"query_position", ElementKind::kInt64, 2,
     {Letter::kB, Letter::kS}},
    {"slot_position", ElementKind::kInt64, 2,
     {Letter::kB, Letter::kC}},
    {"cos", ElementKind::kFloat32, 3,
     {Letter::kB, Letter::kS, Letter::kRotaryPairs}},
    {"sin", ElementKind::kFloat32, 3,
     {Letter::kB, Letter::kS, Letter::kRotaryPairs}},
    {"limit_cos", ElementKind::kFloat32, 1,
     {Letter::kRotaryPairs}},
    {"limit_sin", ElementKind::kFloat32, 1,
     {Letter::kRotaryPairs}},
    {"alibi_slopes", ElementKind::kFloat32, 1,
     {Letter::kH}},
    {"sink_logits", ElementKind::kFloat32, 1,
     {Letter::kH}},
    {"past_key_scale", ElementKind::kFloat32, 4,
     {Letter::kB, Letter::kG, Letter::kC, Letter::kOne}},
    {"past_value_scale", ElementKind::kFloat32, 4,
     {Letter::kB, Letter::kG, Letter::kC, Letter::kOne}},
    {"key_bias", ElementKind::kModel, 2,
     {Letter::kG, Letter::kD}},
    {"cos_table", ElementKind::kFloat32, 2,
     {Letter::kTableRows, Letter::kRotaryPairs}},
    {"sin_table", ElementKind::kFloat32, 2,
     {Letter::kTableRows, Letter::kRotaryPairs}},
};

inline constexpr Operand kOutputs[kNumInt8CacheOutputs] = {
    {"output", ElementKind::kModel, 4,
     {Letter::kB, Letter::kH, Letter::kS, Letter::kD}},
    {"present_key", ElementKind::kRing, 4,
     {Letter::kB, Letter::kG, Letter::kC, Letter::kD}},
    {"present_value", ElementKind::kRing, 4,
     {Letter::kB, Letter::kG, Letter::kC, Letter::kD}},
    {"present_sink_key", ElementKind::kModel, 4,
     {Letter::kB, Letter::kG, Letter::kN, Letter::kD}},
    {"present_sink_value", ElementKind::kModel, 4,
     {Letter::kB, Letter::kG, Letter::kN, Letter::kD}},
    {"present_key_scale", ElementKind::kFloat32, 4,
     {Letter::kB, Letter::kG, Letter::kC, Letter::kOne}},
    {"present_value_scale", ElementKind::kFloat32, 4,
     {Letter::kB, Letter::kG, Letter::kC, Letter::kOne}},
};

// The input that an output is the updated state of, or kNone.
inline constexpr std::int32_t kNone = -1;
inline constexpr std::int32_t kUpdatedInput[kNumInt8CacheOutputs] = {
    kNone,
    kPastKey,
    kPastValue,
    kPastSinkKey,
    kPastSinkValue,
    kPastKeyScale,
    kPastValueScale,
};

// As on the node.
struct Attributes {
  // N ≥ 0, starting tokens that stay visible
  std::int64_t numSinkTokens = 0;
  // W ≥ 1, keys a query sees, its own included
  std::int64_t windowSize = 0;
  // L ≥ W, distance of an evicted starting token
  std::int64_t distanceLimit = 0;
  // R, even, at most D; 0 for no rotation
  std::int64_t rotaryDim = 0;
  // 1 pairs dimensions 2i and 2i + 1, 0 i and i + R/2
  std::int64_t rotaryInterleaved = 0;
  // factor of every logit
  float scale = 0.0f;
  // c replaces a logit x by c·tanh(x / c); 0 for none
  float softcap = 0.0f;
};

// One of the two members is null.
struct AttributeField {
  const char* name;
  std::int64_t Attributes::*integer;
  float Attributes::*number;
};

inline constexpr AttributeField kAttributes[] = {
    {"num_sink_tokens", &Attributes::numSinkTokens, nullptr},
    {"window_size", &Attributes::windowSize, nullptr},
    {"distance_limit", &Attributes::distanceLimit, nullptr},
    {"rotary_dim", &Attributes::rotaryDim, nullptr},
    {"rotary_interleaved", &Attributes::rotaryInterleaved, nullptr},
    {"scale", nullptr, &Attributes::scale},
    {"softcap", nullptr, &Attributes::softcap},
};

// Addresses of the tensors of one call.
struct Tensors {
  // T (B, H, S, D): new tokens, not rotated, after any QK-norm
  const void* query = nullptr;
  // T (B, G, S, D): new tokens, not rotated, after any QK-norm
  const void* key = nullptr;
  // T (B, G, S, D): new tokens
  const void* value = nullptr;
  // T or int8 (B, G, C, D): rotated, position p in slot p mod C
  const void* pastKey = nullptr;
  // T or int8 (B, G, C, D): position p in slot p mod C
  const void* pastValue = nullptr;
  // T (B, G, N, D): not rotated, position p in slot p
  const void* pastSinkKey = nullptr;
  // T (B, G, N, D): position p in slot p
  const void* pastSinkValue = nullptr;
  // int64 (B): tokens each row has seen, 0 … 2⁴⁰
  const std::int64_t* pastLength = nullptr;
  // int64 (B): real tokens each row brings, 0 … S; padding behind
  const std::int64_t* newLength = nullptr;
  // int64 (B, S): follows from past_length
  const std::int64_t* queryPosition = nullptr;
  // int64 (B, C): follows from the lengths; negative if empty
  const std::int64_t* slotPosition = nullptr;
  // float32 (B, S, R/2): rows of the new tokens' positions
  const float* cos = nullptr;
  // float32 (B, S, R/2): rows of the new tokens' positions
  const float* sin = nullptr;
  // float32 (R/2): the row of the distance limit
  const float* limitCos = nullptr;
  // float32 (R/2): the row of the distance limit
  const float* limitSin = nullptr;
  // float32 (H): zeros without ALiBi
  const float* alibiSlopes = nullptr;
  // float32 (H): learned logits in the denominator; −∞ for none
  const float* sinkLogits = nullptr;
  // float32 (B, G, C, 1): of past_key, one for each token and head
  const float* pastKeyScale = nullptr;
  // float32 (B, G, C, 1): of past_value, one for each token and head
  const float* pastValueScale = nullptr;
  // T (G, D): part of every key, kept out of the ring
  const void* keyBias = nullptr;
  // float32 (T, R/2): rows of the digits of any position
  const float* cosTable = nullptr;
  // float32 (T, R/2): rows of the digits of any position
  const float* sinTable = nullptr;
  // T (B, H, S, D): what the new tokens attend to
  void* output = nullptr;
  // T or int8 (B, G, C, D): past_key with the new keys
  void* presentKey = nullptr;
  // T or int8 (B, G, C, D): past_value with the new values
  void* presentValue = nullptr;
  // T (B, G, N, D): past_sink_key with new starting tokens
  void* presentSinkKey = nullptr;
  // T (B, G, N, D): past_sink_value with new starting tokens
  void* presentSinkValue = nullptr;
  // float32 (B, G, C, 1): past_key_scale with the new scales
  float* presentKeyScale = nullptr;
  // float32 (B, G, C, 1): past_value_scale with the new scales
  float* presentValueScale = nullptr;
};

// Takes addresses in the operator's order; those of scales only with an int8 cache, those of a
// bias only in the operator that has one.
inline void setTensors(Tensors& tensors, const void* const* inputs, void* const* outputs,
                       bool int8Cache, bool hasKeyBias) {
  tensors.query = inputs[kQuery];
  tensors.key = inputs[kKey];
  tensors.value = inputs[kValue];
  tensors.pastKey = inputs[kPastKey];
  tensors.pastValue = inputs[kPastValue];
  tensors.pastSinkKey = inputs[kPastSinkKey];
  tensors.pastSinkValue = inputs[kPastSinkValue];
  tensors.pastLength = static_cast<const std::int64_t*>(inputs[kPastLength]);
  tensors.newLength = static_cast<const std::int64_t*>(inputs[kNewLength]);
  tensors.queryPosition = static_cast<const std::int64_t*>(inputs[kQueryPosition]);
  tensors.slotPosition = static_cast<const std::int64_t*>(inputs[kSlotPosition]);
  tensors.cos = static_cast<const float*>(inputs[kCos]);
  tensors.sin = static_cast<const float*>(inputs[kSin]);
  tensors.limitCos = static_cast<const float*>(inputs[kLimitCos]);
  tensors.limitSin = static_cast<const float*>(inputs[kLimitSin]);
  tensors.alibiSlopes = static_cast<const float*>(inputs[kAlibiSlopes]);
  tensors.sinkLogits = static_cast<const float*>(inputs[kSinkLogits]);
  tensors.output = outputs[kOutput];
  tensors.presentKey = outputs[kPresentKey];
  tensors.presentValue = outputs[kPresentValue];
  tensors.presentSinkKey = outputs[kPresentSinkKey];
  tensors.presentSinkValue = outputs[kPresentSinkValue];
  if (!int8Cache) return;
  tensors.pastKeyScale = static_cast<const float*>(inputs[kPastKeyScale]);
  tensors.pastValueScale = static_cast<const float*>(inputs[kPastValueScale]);
  tensors.presentKeyScale = static_cast<float*>(outputs[kPresentKeyScale]);
  tensors.presentValueScale = static_cast<float*>(outputs[kPresentValueScale]);
  if (!hasKeyBias) return;
  tensors.keyBias = inputs[kKeyBias];
  tensors.cosTable = static_cast<const float*>(inputs[kCosTable]);
  tensors.sinTable = static_cast<const float*>(inputs[kSinTable]);
}

}  // namespace lminf

// clang-format on
