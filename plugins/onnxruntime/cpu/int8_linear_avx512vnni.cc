// int8_linear_panel.h for one instruction set; the build gives this file its flags.
#include "int8_linear_panel.h"

namespace lminf::cpu {
extern const Int8LinearKernels kInt8LinearAvx512Vnni = {
    "avx512vnni",
    tokenBytes,
    roundToken,
    roundFloats,
    {fewOrStrips, many, fewRows, stripRows, fewOrStripsFloats, stripFloats}};
}  // namespace lminf::cpu
