// int8_linear_block.h for one instruction set; the build gives this file its flags.
#include "int8_linear_block.h"

namespace lminf::cpu {
extern const Int8LinearKernels kInt8LinearAvx512 = {
    "avx512",
    tokenBytes,
    roundToken,
    roundFloats,
    {few, nullptr, fourRows, nullptr, noFloats, nullptr}};
}  // namespace lminf::cpu
