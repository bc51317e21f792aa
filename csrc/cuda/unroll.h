// Marks the loops that a GPU is to run unrolled.
#pragma once

#if defined(__CUDA_ARCH__)
#define DLOPS_UNROLL _Pragma("unroll")
#else
#define DLOPS_UNROLL
#endif
