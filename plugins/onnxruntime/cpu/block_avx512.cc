// block.h for one instruction set; the build gives this file its flags.
#include "block.h"

namespace lminf::cpu {
extern const Kernels kAvx512 = {"avx512", append, scratchFloats, partialFloats, attend, combine};
extern const Kernels kAvx512Vnni = {"avx512vnni",  append, scratchFloats,
                                    partialFloats, attend, combine};
}  // namespace lminf::cpu
