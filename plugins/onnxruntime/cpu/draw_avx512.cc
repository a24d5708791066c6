// draw_block.h for one instruction set; the build gives this file its flags.
#include "draw_block.h"

namespace lminf::cpu {
extern const DrawKernels kDrawAvx512 = {"avx512", largest, from, weights, sums};
}  // namespace lminf::cpu
