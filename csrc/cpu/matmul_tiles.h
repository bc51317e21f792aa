// The product of bfloat16 numbers by AMX.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "cpu/simd/matmul.h"

namespace dlops::cpu {

// Whether products of bfloat16 go through AMX: on machines that have it, but for DLOPS_CPU_AMX=0;
// and whether float32's may as sums of them, which DLOPS_CPU_AMX=1 asks for: an error on other
// machines.
bool takes_tiles();
bool splits_float32();

// As matmul_of_factors in cpu/matmul.h, of bfloat16. To what was before the sums of 32 terms or
// fewer are added, in their order; numbers below float32's normal ones count as zeros.
void matmul_of_tiles(int64_t m, int64_t n, int64_t k, const Factors<c10::BFloat16>* factors,
                     int64_t count, const FactorStrides& strides, float* c, int64_t ldc,
                     Addend<float> before);

}  // namespace dlops::cpu
