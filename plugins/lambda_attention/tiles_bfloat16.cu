#include "tiles.inl"

template cudaError_t lminf::enqueueTiles<lminf::Bfloat16, lminf::Bfloat16>(const KernelArguments&,
                                                                           const AttentionPlan&,
                                                                           int, cudaStream_t);
