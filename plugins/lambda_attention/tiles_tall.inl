// Defines enqueueTilesTall for one type: include and instantiate.
#pragma once

#include "kernels.h"
#include "tiles_tall.cuh"

namespace lminf {

template <class T>
cudaError_t enqueueTilesTall(const KernelArguments& arguments, const AttentionPlan& plan,
                             int headDim, cudaStream_t stream) {
  const LaunchShape shape = shapeOf(arguments, plan);
#define LMINF_TALL(D) enqueue(tilesTallKernel<T, D>, shape, stream, arguments)
  switch (headDim) {
    case 32: return LMINF_TALL(32);
    case 64: return LMINF_TALL(64);
    case 80: return LMINF_TALL(80);
    case 96: return LMINF_TALL(96);
    case 128: return LMINF_TALL(128);
    default: return cudaErrorInvalidValue;  // the plan takes another kernel there
  }
#undef LMINF_TALL
}

}  // namespace lminf
