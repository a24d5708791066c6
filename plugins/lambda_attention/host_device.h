// For what runs on the host and on the device.
#pragma once

#if defined(__CUDACC__)
#define LMINF_HD __host__ __device__ __forceinline__
#else
#define LMINF_HD inline
#endif
