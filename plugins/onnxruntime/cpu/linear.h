// x · weightᵀ (+ addend) on the CPU, described by plain pointers and sizes.
//
// The weight is read where it lies, in the layout of the checkpoint: (out, in), row after row. No
// copy of it is made, so weights that a file backs stay on the file's pages.
#pragma once

#include "attention.h"

namespace lminf::cpu {

struct Linear {
  int64_t tokens;        // M
  int64_t outFeatures;   // N
  int64_t inFeatures;    // K
  Element element;       // of weight, addend and out
  const float* x;        // (M, K)
  const void* weight;    // (N, K)
  const void* addend;    // (N) or (M, N); null for none
  int64_t addendStride;  // elements from one token's addend to the next one's: 0 or N
  void* out;             // (M, N)
};

// The same functions compiled for one instruction set; rows are those of the weight.
struct LinearKernels {
  const char* name;
  void (*widen)(const void* halves, int64_t count, float* out);
  // Few tokens: weight rows firstRow … endRow − 1, each streamed once.
  void (*few)(const Linear&, int64_t firstRow, int64_t endRow);
  // Many tokens: up to panelRows weight rows, cut into panels that stay in the cache.
  void (*many)(const Linear&, int64_t firstToken, int64_t endToken, int64_t firstRow,
               float* scratch);
  int64_t panelRows;
  // Floats of scratch memory that `many` needs for so many tokens.
  size_t (*scratchFloats)(int64_t tokens);
};

extern const LinearKernels kLinearPortable;
#if defined(__x86_64__)
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvx512;
#endif

// The ones of the instruction set in use (`activeKernels`).
const LinearKernels& activeLinear();

// The whole operator; x is of the weight's element type. Returns null, or what is wrong.
const char* linear(Linear, const void* x, const LinearKernels&, const Parallel&);

}  // namespace lminf::cpu
