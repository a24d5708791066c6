// The kernels for callers that load a shared library: ctypes in tests and in scripts/gpu_suite.py.
#pragma once

#include "lambda_attention.h"

#if defined(_WIN32)
#define LMINF_EXPORT __declspec(dllexport)
#else
#define LMINF_EXPORT __attribute__((visibility("default")))
#endif

extern "C" {

// sizeof(LambdaAttentionParams), so that a caller can check its own description of the struct.
LMINF_EXPORT std::size_t lminfParamsSize();

// Writes the message of `validate` (empty: nothing wrong) and returns its length.
LMINF_EXPORT std::size_t lminfValidate(const lminf::LambdaAttentionParams* params, char* message,
                                       std::size_t messageBytes);

LMINF_EXPORT std::size_t lminfWorkspaceSize(const lminf::LambdaAttentionParams* params);

LMINF_EXPORT std::size_t lminfArrivalBytes(const lminf::LambdaAttentionParams* params);

// `launchWith`. Returns a cudaError_t.
LMINF_EXPORT int lminfLaunchWith(const lminf::LambdaAttentionParams* params, int preference,
                                 int splits, int startsEarly, int appendsInDecode, void* arrivals,
                                 void* workspace, std::size_t workspaceBytes, void* stream);

// The plan for a device of `multiprocessors` with `sharedBytes` of shared memory each, where
// `hopper` says whether kTilesHopper can run on it, as kernel, rows per block, row blocks, splits,
// threads, keys per tile, shared bytes.
LMINF_EXPORT void lminfPlan(const lminf::LambdaAttentionParams* params, int multiprocessors,
                            std::size_t sharedBytes, int hopper, std::size_t workspaceBytes,
                            int preference, std::int64_t* plan);

// Whether the library holds the kernel for compute capability 9.0.
LMINF_EXPORT int lminfHasHopper();

// The name of a cudaError_t.
LMINF_EXPORT const char* lminfErrorName(int status);
}
