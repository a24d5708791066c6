// Λ-attention on the CPU: one operator call, described by plain pointers and sizes.
//
// Letters as everywhere: B batch, H query heads, G key/value heads, S new tokens, C ring slots,
// N sink tokens, D head dimension, R rotated dimensions. A position is an absolute token index,
// a slot a cache index. windowSize counts keys including the query's own.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lminf::cpu {

enum class Element { kFloat, kHalf };

// Inputs and outputs of lminf::LambdaAttention version 1, or of LambdaAttentionInt8Cache
// (docs/operator.md), row-major.
struct Params {
  int64_t batch;         // B
  int64_t heads;         // H
  int64_t kvHeads;       // G, divides H
  int64_t steps;         // S
  int64_t capacity;      // C
  int64_t headDim;       // D
  int64_t sinkSlots;     // max(N, 1)
  int64_t pastSinkBatch; // B, or 1 where the sinks are a constant
  int64_t numSinkTokens; // N
  int64_t windowSize;    // W
  int64_t distanceLimit; // L
  int64_t rotaryDim;     // R, 0 for none
  bool interleaved;
  float scale;
  float softcap;         // 0 for none
  Element element;       // of queries, keys, values and caches
  bool int8Rings;        // rings hold int8, sinks still elements

  const void* query;     // (B, H, S, D)
  const void* key;       // (B, G, S, D)
  const void* value;     // (B, G, S, D)
  const void* pastKey;   // (B, G, C, D); may be the same memory as its present
  const void* pastValue;
  const void* pastSinkKey;  // (B or 1, G, max(N, 1), D)
  const void* pastSinkValue;
  const int64_t* pastLength;  // (B)
  const int64_t* newLength;   // (B)
  const float* cos;           // (B, S, R/2)
  const float* sin;
  const float* limitCos;      // (R/2)
  const float* limitSin;
  const float* alibiSlopes;   // (H)
  const float* sinkLogits;    // (H), −∞ for none
  const float* pastKeyScale;  // (B, G, C, 1), of rings of int8
  const float* pastValueScale;

  void* output;          // (B, H, S, D)
  void* presentKey;      // (B, G, C, D)
  void* presentValue;
  void* presentSinkKey;  // (B, G, max(N, 1), D); null where nobody reads it
  void* presentSinkValue;
  float* presentKeyScale;     // (B, G, C, 1)
  float* presentValueScale;
};

// One piece of attention: some queries of one key/value head over some keys.
struct Item {
  int64_t batch;
  int64_t kvHead;
  int64_t firstStep;   // queries firstStep … firstStep + numSteps − 1 of all the head's queries
  int64_t numSteps;
  int64_t firstKey;    // ring keys at positions firstKey … endKey − 1
  int64_t endKey;
  bool first;          // also takes the sinks and the learned logits
  float* partial;      // where an unfinished result goes; null: this item is all there is
};

// Most pieces the keys of one block of queries are cut into.
constexpr size_t kMaxSplits = 16;

// Runs body(data, i) for i = 0 … count − 1, in any order, possibly at once.
struct Parallel {
  void* context;
  void (*run)(void* context, size_t count, void (*body)(void* data, size_t index), void* data);
};

// The same functions compiled for one instruction set.
struct Kernels {
  const char* name;
  // Rotates the new keys of one (batch, kvHead) and writes keys, values and sinks.
  void (*append)(const Params&, int64_t batch, int64_t kvHead);
  // Floats of scratch memory, 64-byte aligned, that attend needs for so many queries.
  size_t (*scratchFloats)(const Params&, int64_t numSteps);
  // Floats of a partial result of so many queries.
  size_t (*partialFloats)(const Params&, int64_t numSteps);
  void (*attend)(const Params&, const Item&, float* scratch);
  // Merges the partial results of items that differ only in their keys.
  void (*combine)(const Params&, const Item* items, size_t count);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Vnni;  // attention as kAvx512; products of integers gain
#endif

// The set in use: the fastest this processor can run, unless another was asked for.
const Kernels& activeKernels();

// Uses the set of this name ("portable", "avx2", "avx512",
// "avx512vnni") from now on, for tests and
// measurements. Returns whether this processor can.
bool useKernels(const char* name);

// The whole operator. Returns null, or what is wrong with the arguments.
const char* lambdaAttention(const Params&, const Kernels&, const Parallel&);

}  // namespace lminf::cpu
