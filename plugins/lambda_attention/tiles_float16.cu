#include "tiles.inl"

template cudaError_t lminf::enqueueTiles<lminf::Half, lminf::Half>(const KernelArguments&,
                                                                   const AttentionPlan&, int,
                                                                   cudaStream_t);
