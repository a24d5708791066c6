// The CUDA runtime that the library was linked with.
#pragma once

#include <cstdint>

// Such as 13000 for 13.0; 0 if there is none, in the emulation.
extern "C" std::int32_t lminfCudaRuntime();
