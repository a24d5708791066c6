// x · weightᵀ (+ addend) on the CPU, described by plain pointers and sizes.
//
// The weight is read where it lies, in the layout of the checkpoint: (out, in), row after row, or
// in blocks of integers. No copy of it is made, so weights that a file backs stay on the file's
// pages.
#pragma once

#include "../../operator/params.h"
#include "parallel.h"

namespace lminf::cpu {

// A weight as integers of a few bits, laid out as onnxruntime's MatMulNBits has it. An element is
// (integer − zero point) · scale of its block. Two integers of 4 bits share a byte, the first in
// its low half, and so do two zero points.
struct Blocks {
  int64_t bits;               // 4 or 8
  int64_t size;               // elements of a block: 16, 32, 64, 128 or 256
  int64_t perRow;             // ⌈K / size⌉; the last one is padded
  const uint8_t* packed;      // (N, perRow, size · bits / 8)
  const void* scales;         // (N, perRow), of type scaleType
  const uint8_t* zeroPoints;  // (N, ⌈perRow · bits / 8⌉); null: 2^(bits − 1) everywhere
  DataType scaleType;         // float32 or float16

  int64_t bytes() const { return size * bits / 8; }
  int64_t rowBytes() const { return perRow * bytes(); }
  int64_t zeroBytes() const { return (perRow * bits + 7) / 8; }
};

struct Linear {
  int64_t tokens;             // M
  int64_t outFeatures;        // N
  int64_t inFeatures;         // K
  DataType dataType;          // of weight, scales, addend and out; float32 or float16
  const float* x;             // (M, K)
  const uint8_t* int8Tokens;  // M tokens as integers, laid out by `Int8LinearKernels`; null for x
  const void* weight;         // (N, K); null where the weight is in blocks
  const Blocks* blocks;
  const void* addend;    // (N) or (M, N); null for none
  int64_t addendStride;  // elements from one token's addend to the next one's: 0 or N
  void* out;             // (M, N)
};

// Pieces of a product that can run at once; rows are those of the weight.
struct Product {
  // Few tokens: weight rows firstRow … endRow − 1, each streamed once.
  void (*few)(const Linear&, int64_t firstRow, int64_t endRow, float* scratch);
  // At most kPieceTokens of many tokens: up to panelRows weight rows, a panel that stays in the
  // cache.
  void (*many)(const Linear&, int64_t firstToken, int64_t endToken, int64_t firstRow,
               float* scratch);
  // What rows of a piece of `few` are a multiple of, and rows of `many`.
  int64_t (*fewRows)(const Linear&);
  int64_t (*panelRows)(const Linear&);
  // Floats of scratch memory that each needs.
  size_t (*fewFloats)(const Linear&);
  size_t (*manyFloats)(const Linear&);
};

// Up to here a few weight rows at a time are streamed past all tokens; beyond, some tokens at a
// time pass by panels of rows.
constexpr int64_t kFewTokens = 16;
// Tokens of a piece: enough to pay for a panel, few enough for the cache.
constexpr int64_t kPieceTokens = 512;

// The same functions compiled for one instruction set.
struct LinearKernels {
  const char* name;
  void (*widen)(const void* halves, int64_t count, float* out);
  Product product;
};

extern const LinearKernels kLinearPortable;
#if defined(__x86_64__)
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvx512;
#endif

// The ones of the instruction set in use (`activeKernels`).
const LinearKernels& activeLinear();

// The whole operator; x is of type p.dataType. Returns null, or what is wrong.
const char* linear(Linear p, const void* x, const LinearKernels&, const Parallel&);

// Lets p.x be x (M, K) in float32, in memory of this thread. Returns null, or what is wrong.
const char* widenInput(Linear* p, const void* x, const LinearKernels&);

// All pieces of a product. Returns null, or what is wrong.
const char* multiply(const Linear&, const Product&, const Parallel&);

}  // namespace lminf::cpu
