// rounded_block.h for one instruction set; the build gives this file its flags.
#include "rounded_block.h"

namespace lminf::cpu {
extern const RoundedKernels kRoundedPortable = {
    "portable", tokenBytes, roundToken, roundFloats, {few, nullptr, 0, fewFloats, nullptr}};
}  // namespace lminf::cpu
