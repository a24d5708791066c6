// Λ-attention on a CUDA device: append the new keys to the ring, then attend.
//
// The caller owns all memory, the stream and the error; nothing is allocated, nothing waits for
// the device, no device memory is read by the host. So a call can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include "../operator/params.h"
#include "plan.h"

namespace lminf {

// Enqueue one step of one layer on a stream, at most three kernels (and up to four copies, six with
// rings of int8, where present tensors are not their pasts).
//
// workspace: workspaceBytes of device memory, 16-byte aligned; contents are scratch. May be null
// with workspaceBytes 0.
// preference: which kernels may run.
// Returns cudaErrorInvalidValue where `validate` finds something (ask it for the message) or the
// workspace is misaligned; otherwise what the runtime says. Device memory is not touched then.
cudaError_t launch(const LambdaAttentionParams& params, void* workspace, std::size_t workspaceBytes,
                   cudaStream_t stream, KernelPreference preference = KernelPreference::kFastest);

}  // namespace lminf
