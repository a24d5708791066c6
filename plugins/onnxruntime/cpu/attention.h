// Λ-attention on the CPU: how one operator call is cut into pieces, and who computes them.
//
// Letters are those of ../../operator/params.h. A position is an absolute token index, a slot a
// cache index. windowSize counts keys including the query's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../../operator/params.h"
#include "parallel.h"

namespace lminf::cpu {

using Params = LambdaAttentionParams;

// One piece of attention: some queries of one key/value head over some keys.
struct Item {
  int64_t batch;
  int64_t kvHead;
  int64_t firstStep;  // queries firstStep … firstStep + numSteps − 1 of all the head's queries
  int64_t numSteps;
  int64_t firstKey;  // ring keys at positions firstKey … endKey − 1
  int64_t endKey;
  bool first;      // also takes the sinks and the learned logits
  float* partial;  // where an unfinished result goes; null: this item is all there is
};

// Most pieces the keys of one block of queries are cut into.
constexpr size_t kMaxSplits = 16;

// The functions of attention compiled for one instruction set.
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

// Uses the set of this name ("portable", "avx2", "avx512", "avx512vnni") from now on, for tests and
// measurements. Returns whether this processor can.
bool useKernels(const char* name);

// The whole operator, of params that passed the rules of ../../operator in float32 or float16.
// Returns what is wrong with the lengths or went wrong, or an empty string.
std::string lambdaAttention(const Params&, const Kernels&, const Parallel&);

}  // namespace lminf::cpu
