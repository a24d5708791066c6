#include "decode.inl"

template cudaError_t lminf::enqueueDecode<lminf::Bfloat16, lminf::Int8>(const KernelArguments&,
                                                                        const AttentionPlan&, int,
                                                                        cudaStream_t);
