#include "tiles.inl"

template cudaError_t lminf::enqueueTiles<lminf::Half, lminf::Int8>(const KernelArguments&,
                                                                   const AttentionPlan&, int,
                                                                   cudaStream_t);
