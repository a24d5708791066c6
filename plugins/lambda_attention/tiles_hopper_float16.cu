#include "tiles_hopper.inl"

template cudaError_t lminf::enqueueTilesHopper<lminf::Half>(const KernelArguments&,
                                                            const AttentionPlan&, int,
                                                            cudaStream_t);
