// Marks the functions that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define DLOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DLOPS_HOST_DEVICE inline
#endif
