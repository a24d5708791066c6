// Λ-attention on a CUDA device: append the new keys to the ring, then attend.
//
// The caller owns all memory, the stream and the error; nothing is allocated, nothing waits for
// the device, no device memory is read by the host. So a call can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "../operator/params.h"
#include "plan.h"

namespace lminf {

// Enqueue one step of one layer on a stream, at most three kernels, one or two for single tokens
// (and up to four copies, six with rings of int8, where present tensors are not their pasts).
//
// workspace: workspaceBytes of device memory, 16-byte aligned; contents are scratch. May be null
// with workspaceBytes 0.
// Returns cudaErrorInvalidValue where `validate` finds something (ask it for the message) or the
// workspace is misaligned; otherwise what the runtime says. Device memory is not touched then.
cudaError_t launch(const LambdaAttentionParams& params, void* workspace, std::size_t workspaceBytes,
                   cudaStream_t stream);

// What a caller may decide in place of the plan: for tests, and for timing one variant beside the
// other. The results are the same but for the order of sums.
struct LaunchChoices {
  KernelPreference preference = kDefaultPreference;
  int splits = 0;           // of the keys: 1 … kMaxSplits, if the workspace suffices; 0: the plan's
  bool startsEarly = true;  // a kernel may start before the one ahead of it ends (SM 9.0 and later)
  bool appendsInDecode = true;  // a single token is appended by the decode kernel
  // Device memory of arrivalBytes(params), 4-byte aligned, that is zero before its first use: with
  // it the block of decode that ends last combines, in place of a kernel. Every call leaves it
  // zero; calls that share it must not run at the same time. Null: a kernel combines.
  std::uint32_t* arrivals = nullptr;
};

// `launch` with choices. Returns cudaErrorInvalidValue as well where splits do not fit or arrivals
// are misaligned.
cudaError_t launchWith(const LambdaAttentionParams& params, const LaunchChoices& choices,
                       void* workspace, std::size_t workspaceBytes, cudaStream_t stream);

}  // namespace lminf
