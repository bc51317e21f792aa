// Marks the functions that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define DLOPS_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the vector kernels compile these headers once per instruction set, and a copy
// left out of line could be the one that the linker keeps for all of them.
#define DLOPS_HOST_DEVICE __attribute__((always_inline)) inline
#endif
