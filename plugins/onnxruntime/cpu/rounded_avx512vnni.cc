// rounded_block.h for one instruction set; the build gives this file its flags.
#include "rounded_panel.h"

namespace lminf::cpu {
extern const RoundedKernels kRoundedAvx512Vnni = {
    "avx512vnni", tokenBytes, roundToken, roundFloats,
    {few, many, kPanelRows, fewFloats, manyFloats}};
}  // namespace lminf::cpu
