#include "tiles_tall.inl"

template cudaError_t lminf::enqueueTilesTall<lminf::Bfloat16>(const KernelArguments&,
                                                              const AttentionPlan&, int,
                                                              cudaStream_t);
