#include "decode.inl"

template cudaError_t lminf::enqueueDecode<lminf::Half, lminf::Half>(const KernelArguments&,
                                                                    const AttentionPlan&, int,
                                                                    cudaStream_t);
