// A matrix product in which every element is the same sum in the same order, whatever the size of
// the matrix and the element's place in it.
#pragma once

#include <cstdint>

namespace dlops::cpu {

// C = A B, or C += A B, as in cpu/matmul.h.
template <int capability, class T>
void matmul_in_order(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                     int64_t ldb, T* c, int64_t ldc, bool accumulate);

}  // namespace dlops::cpu
