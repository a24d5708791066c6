// linear_block.h for one instruction set; the build gives this file its flags.
#include "linear_block.h"

namespace lminf::cpu {
extern const LinearKernels kLinearAvx2 = {"avx2", widen, kFloatProduct};
}  // namespace lminf::cpu
