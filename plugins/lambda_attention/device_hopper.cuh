// The instructions of compute capability 9.0, as PTX or from the block emulation.
#pragma once

#include "device.cuh"

#if defined(LMINF_EMULATE)
#include "hopper.h"
#else
#include "hopper_ptx.cuh"
#endif
