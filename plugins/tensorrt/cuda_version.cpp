// Which CUDA runtime the library was linked with. It is inside, so a driver that is too old fails
// at the first kernel with a number; who loads the library reads this first, without loading it.

#include "cuda_version.h"

#include <cuda_runtime_api.h>

#ifndef CUDART_VERSION
#define CUDART_VERSION 0  // the emulation
#endif
#define LMINF_TEXT_OF(value) #value
#define LMINF_TEXT(value) LMINF_TEXT_OF(value)

namespace {
// Read from the file by lminf_export/runtime/plugin_cuda.py.
__attribute__((used)) const char kMark[] =
    "lminf_tensorrt CUDA runtime " LMINF_TEXT(CUDART_VERSION);
}  // namespace

extern "C" __attribute__((visibility("default"))) std::int32_t lminfCudaRuntime() {
  return CUDART_VERSION;
}
