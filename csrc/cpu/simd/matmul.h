// A matrix product in which every element is the same sum in the same order, whatever the size of
// the matrix and the element's place in it.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace dlops::cpu {

// C = A B, or C += A B, as in cpu/matmul.h. `padded`: a vector may be read from wherever a row of B
// has an element.
template <int capability, class T>
void matmul_in_order(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                     int64_t ldb, bool padded, T* c, int64_t ldc, bool accumulate);
// The product of bfloat16 in cpu/matmul.h, on machines with AVX512_BF16.
void matmul_of_pairs(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda,
                     const c10::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate);

}  // namespace dlops::cpu
