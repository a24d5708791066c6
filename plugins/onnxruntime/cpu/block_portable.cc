// block.h for one instruction set; the build gives this file its flags.
#include "block.h"

namespace lminf::cpu {
extern const Kernels kPortable = {"portable",    append, scratchFloats,
                                  partialFloats, attend, combine};
}  // namespace lminf::cpu
