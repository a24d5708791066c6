// The kernels that go by rows: append, combine, and attention in float32.
#include "append.cuh"
#include "combine.cuh"
#include "kernels.h"
#include "simple.cuh"

namespace lminf {

template <class T, class Ring>
cudaError_t enqueueAppend(const KernelArguments& a, int headDim, cudaStream_t stream) {
  const int carried = a.copySinkKey || a.copySinkValue ? a.sinkSlots : 0;
  const std::int64_t rows = static_cast<std::int64_t>(a.batchSize) * a.numKvHeads *
                            (std::int64_t{a.sequenceLength} + carried);
  const LaunchShape shape = shapeOfRows(rows, kAppendWarps);
#define LMINF_APPEND(D) enqueue(appendKernel<T, Ring, D>, shape, stream, a)
  LMINF_FOR_HEAD_DIM(headDim, LMINF_APPEND)
#undef LMINF_APPEND
}

template <class T>
cudaError_t enqueueCombine(const KernelArguments& a, int headDim, bool startsEarly,
                           cudaStream_t stream) {
  const std::int64_t rows =
      static_cast<std::int64_t>(a.batchSize) * a.numKvHeads * a.group * a.sequenceLength;
  const LaunchShape shape{static_cast<unsigned>(rows), 1, kCombineWarps * 32,
                          sizeof(float) * kCombineWarps * static_cast<std::size_t>(2 + headDim),
                          startsEarly};
#define LMINF_COMBINE(D) enqueue(combineKernel<T, D>, shape, stream, a)
  LMINF_FOR_HEAD_DIM(headDim, LMINF_COMBINE)
#undef LMINF_COMBINE
}

template <class Ring>
cudaError_t enqueueSimple(const KernelArguments& arguments, const AttentionPlan& plan, int headDim,
                          cudaStream_t stream) {
  const LaunchShape shape{static_cast<unsigned>(plan.rowBlocks), 1,
                          static_cast<unsigned>(plan.threads), 0};
#define LMINF_SIMPLE(D) enqueue(simpleKernel<float, Ring, D>, shape, stream, arguments)
  LMINF_FOR_HEAD_DIM(headDim, LMINF_SIMPLE)
#undef LMINF_SIMPLE
}

template cudaError_t enqueueAppend<float, float>(const KernelArguments&, int, cudaStream_t);
template cudaError_t enqueueAppend<float, Int8>(const KernelArguments&, int, cudaStream_t);
template cudaError_t enqueueAppend<Half, Half>(const KernelArguments&, int, cudaStream_t);
template cudaError_t enqueueAppend<Half, Int8>(const KernelArguments&, int, cudaStream_t);
template cudaError_t enqueueAppend<Bfloat16, Bfloat16>(const KernelArguments&, int, cudaStream_t);
template cudaError_t enqueueAppend<Bfloat16, Int8>(const KernelArguments&, int, cudaStream_t);
template cudaError_t enqueueSimple<float>(const KernelArguments&, const AttentionPlan&, int,
                                          cudaStream_t);
template cudaError_t enqueueSimple<Int8>(const KernelArguments&, const AttentionPlan&, int,
                                         cudaStream_t);
template cudaError_t enqueueCombine<Half>(const KernelArguments&, int, bool, cudaStream_t);
template cudaError_t enqueueCombine<Bfloat16>(const KernelArguments&, int, bool, cudaStream_t);

}  // namespace lminf
