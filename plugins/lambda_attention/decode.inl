// Defines enqueueDecode for one type: include and instantiate.
#pragma once

#include "decode.cuh"
#include "kernels.h"

namespace lminf {

template <class T, class Ring>
cudaError_t enqueueDecode(const KernelArguments& arguments, const AttentionPlan& plan, int headDim,
                          cudaStream_t stream) {
  LaunchShape shape = shapeOf(arguments, plan);
  shape.early = arguments.startsEarly && !arguments.appendsInDecode;
  if (plan.kernel == AttentionKernel::kDecode16) {
    switch (headDim) {
      case 32: return enqueue(decodeKernel<T, Ring, 32, 2>, shape, stream, arguments);
      case 64: return enqueue(decodeKernel<T, Ring, 64, 2>, shape, stream, arguments);
      case 80: return enqueue(decodeKernel<T, Ring, 80, 2>, shape, stream, arguments);
      case 96: return enqueue(decodeKernel<T, Ring, 96, 2>, shape, stream, arguments);
      case 128: return enqueue(decodeKernel<T, Ring, 128, 2>, shape, stream, arguments);
      default: return cudaErrorInvalidValue;  // the plan takes another kernel there
    }
  }
#define LMINF_DECODE(D) enqueue(decodeKernel<T, Ring, D, 1>, shape, stream, arguments)
  LMINF_FOR_HEAD_DIM(headDim, LMINF_DECODE)
#undef LMINF_DECODE
}

}  // namespace lminf
