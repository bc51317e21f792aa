// The matrix product that the convolution's panels go through.
#pragma once

#include <cstdint>

#include "cpu/simd/matmul.h"

namespace dlops::cpu {

// C = A B, or C += A B. Row-major: A is m x k with rows `lda` apart, and so on. Runs on the calling
// thread alone. Floating-point products are simd/matmul.h, which takes panels as they are: rows of
// A may overlap (lda < k), and so may those of B (ldb < n). It sums 256 terms at a time and then
// adds what was there, which keeps rounding errors near those of native, and it sums an element
// alike wherever it stands in a matrix of any size, which BLAS does not: an image's result must not
// depend on its neighbours in a panel. Complex numbers and integers go through at::mm. `bias`,
// where not null, has an element for each row of C, which is added last; floating-point products
// only.
template <class scalar_t>
void matmul(int64_t m, int64_t n, int64_t k, const scalar_t* a, int64_t lda, const scalar_t* b,
            int64_t ldb, scalar_t* c, int64_t ldc, bool accumulate, const scalar_t* bias = nullptr);

// Whether bfloat16 numbers are multiplied as they are, with sums in float32: by AMX, or by
// AVX512_BF16 where that is faster than float32, or DLOPS_CPU_AVX512_BF16=1 asks for it.
bool multiplies_bfloat16();
// Whether it also rounds them as they are stored: matmul_rounded is there.
bool rounds_products();

// Elements that the next product may read after the last one of B.
constexpr int64_t kPadding = 64;

// C = before + the sum of A B over `count` factors. T is double, float, or where that is multiplied
// bfloat16: then k is even, A's step is 1, and the rows of B stand in pairs, element
// (i, j) at b[i / 2][j][i % 2], the pairs `ldb` pairs of numbers apart. A part of B that begins at
// an even row i begins at b + i * ldb, as in a row-major matrix.
template <class T, class sum_t>
void matmul_of_factors(int64_t m, int64_t n, int64_t k, const Factors<T>* factors, int64_t count,
                       const FactorStrides& strides, sum_t* c, int64_t ldc, Addend<sum_t> before);
// The same of bfloat16, rounded.
void matmul_rounded(int64_t m, int64_t n, int64_t k, const Factors<c10::BFloat16>* factors,
                    int64_t count, const FactorStrides& strides, float* c, int64_t ldc,
                    Addend<float> before, Rounded rounded);

}  // namespace dlops::cpu
