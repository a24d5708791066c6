// Products of weights in blocks with activations rounded to int8, block by block.
//
// Every block of a token's activations is rounded to integers of −127 … 127 with a scale of its
// own (the largest / 127), as onnxruntime's MatMulNBits does at accuracy level 4. Integers are
// multiplied and summed as integers within a block, sums of blocks are float32.
#pragma once

#include "linear.h"

namespace lminf::cpu {

// The same functions compiled for one instruction set.
struct Int8LinearKernels {
  const char* name;
  // Bytes of a token's activations in `round`'s layout, a multiple of 64.
  size_t (*tokenBytes)(const Blocks&);
  // Rounds one token's activations x (K) into that layout, or into floats of the same values;
  // scratch: tokenBytes.
  void (*round)(const Blocks&, const float* x, int64_t length, uint8_t* out, int8_t* scratch);
  void (*roundFloats)(const Blocks&, const float* x, int64_t length, float* out);
  // Without `many`, many tokens are faster as floats.
  Product product;
};

extern const Int8LinearKernels kInt8LinearPortable;
#if defined(__x86_64__)
extern const Int8LinearKernels kInt8LinearAvx2;
extern const Int8LinearKernels kInt8LinearAvx512;
extern const Int8LinearKernels kInt8LinearAvx512Vnni;
#endif

// The ones of the instruction set in use (`activeKernels`).
const Int8LinearKernels& activeInt8Linear();

// The whole operator; x is of type p.dataType. Returns null, or what is wrong.
const char* int8Linear(Linear p, const void* x, const LinearKernels&, const Int8LinearKernels&,
                       const Parallel&);

}  // namespace lminf::cpu
