#include "tiles_hopper.inl"

template cudaError_t lminf::enqueueTilesHopper<lminf::Bfloat16>(const KernelArguments&,
                                                                const AttentionPlan&, int,
                                                                cudaStream_t);
