#include "tiles.inl"

template cudaError_t lminf::enqueueTiles<lminf::Half>(const KernelArguments&, const AttentionPlan&,
                                                      int, cudaStream_t);
