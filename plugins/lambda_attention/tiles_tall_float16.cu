#include "tiles_tall.inl"

template cudaError_t lminf::enqueueTilesTall<lminf::Half>(const KernelArguments&,
                                                          const AttentionPlan&, int, cudaStream_t);
