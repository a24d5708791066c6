// The few functions of the CUDA runtime that the launcher calls, and what tests ask and tell.
#include "cuda_runtime_api.h"

#include <cstring>

#include "block.h"

namespace emulation = lminf::emulation;

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = emulation::device.driverVersion;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulation::device.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = emulation::device.hopper ? 9 : 8; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulation::device.sharedBytes; break;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
  }
  return "unknown";
}

// For tests: the emulated device and what its kernels did.
extern "C" {

__attribute__((visibility("default"))) void lminfEmulationConfigure(int multiprocessors,
                                                                    int sharedBytes, int reverse,
                                                                    int hopper, int eager,
                                                                    int driverVersion,
                                                                    int codeVersion) {
  emulation::device = {multiprocessors, sharedBytes,   reverse != 0, hopper != 0,
                       eager != 0,      driverVersion, codeVersion};
}

__attribute__((visibility("default"))) void lminfEmulationReset() { emulation::counters = {}; }

__attribute__((visibility("default"))) void lminfEmulationCounters(std::uint64_t* numbers) {
  numbers[0] = emulation::counters.launches;
  numbers[1] = emulation::counters.earlyLaunches;
  numbers[2] = emulation::counters.streamedBytes;
  numbers[3] = emulation::counters.copiedBytes;
}
}
