// Defines enqueueTiles for one type: include and instantiate.
#pragma once

#include "kernels.h"
#include "tiles_kernel.cuh"

namespace lminf {

template <class T, class Ring>
cudaError_t enqueueTiles(const KernelArguments& arguments, const AttentionPlan& plan, int headDim,
                         cudaStream_t stream) {
  const LaunchShape shape = shapeOf(arguments, plan);
  if (plan.kernel == AttentionKernel::kTiles128) {
    switch (headDim) {
      case 32: return enqueue(tilesKernel<T, Ring, 32, 8>, shape, stream, arguments);
      case 64: return enqueue(tilesKernel<T, Ring, 64, 8>, shape, stream, arguments);
      case 80: return enqueue(tilesKernel<T, Ring, 80, 8>, shape, stream, arguments);
      case 96: return enqueue(tilesKernel<T, Ring, 96, 8>, shape, stream, arguments);
      case 128: return enqueue(tilesKernel<T, Ring, 128, 8>, shape, stream, arguments);
      default: return cudaErrorInvalidValue;  // the plan takes smaller tiles there
    }
  }
#define LMINF_TILES(D) enqueue(tilesKernel<T, Ring, D, 4>, shape, stream, arguments)
  LMINF_FOR_HEAD_DIM(headDim, LMINF_TILES)
#undef LMINF_TILES
}

}  // namespace lminf
