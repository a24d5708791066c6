// One function per kernel and type, each in a file of its own so that they compile side by side.
#pragma once

#include "device.cuh"
#include "kernel_arguments.h"
#include "plan.h"

namespace lminf {

// T is the model's element type, Ring that of the rings: T or Int8.
template <class T, class Ring>
cudaError_t enqueueAppend(const KernelArguments& arguments, int headDim, cudaStream_t stream);
// `startsEarly`: the attention kernel ahead calls letNextStart, and this GPU can make use of it.
template <class T>
cudaError_t enqueueCombine(const KernelArguments& arguments, int headDim, bool startsEarly,
                           cudaStream_t stream);
template <class T, class Ring>
cudaError_t enqueueDecode(const KernelArguments& arguments, const AttentionPlan& plan, int headDim,
                          cudaStream_t stream);
template <class T, class Ring>
cudaError_t enqueueTiles(const KernelArguments& arguments, const AttentionPlan& plan, int headDim,
                         cudaStream_t stream);
// Rings of T, D <= kLargestTallHeadDim.
template <class T>
cudaError_t enqueueTilesTall(const KernelArguments& arguments, const AttentionPlan& plan,
                             int headDim, cudaStream_t stream);
// Where the library holds code for sm_90a (LMINF_HOPPER).
template <class T>
cudaError_t enqueueTilesHopper(const KernelArguments& arguments, const AttentionPlan& plan,
                               int headDim, cudaStream_t stream);
template <class Ring>
cudaError_t enqueueSimple(const KernelArguments& arguments, const AttentionPlan& plan, int headDim,
                          cudaStream_t stream);

inline LaunchShape shapeOf(const KernelArguments& arguments, const AttentionPlan& plan) {
  const unsigned pairs =
      static_cast<unsigned>(arguments.batchSize) * static_cast<unsigned>(arguments.numKvHeads);
  return {pairs * static_cast<unsigned>(plan.rowBlocks), static_cast<unsigned>(plan.splits),
          static_cast<unsigned>(plan.threads), plan.sharedBytes};
}

// A grid of blocks that each give every warp one row.
inline LaunchShape shapeOfRows(std::int64_t rows, int warps) {
  return {static_cast<unsigned>(ceilDiv<std::int64_t>(rows, warps)), 1,
          static_cast<unsigned>(warps) * 32, 0};
}

}  // namespace lminf

// Calls function<headDim>(); validation has refused every other head dimension.
#define LMINF_FOR_HEAD_DIM(headDim, FUNCTION) \
  switch (headDim) {                          \
    case 32: return FUNCTION(32);             \
    case 64: return FUNCTION(64);             \
    case 80: return FUNCTION(80);             \
    case 96: return FUNCTION(96);             \
    case 128: return FUNCTION(128);           \
    case 256: return FUNCTION(256);           \
    default: return cudaErrorInvalidValue;    \
  }
