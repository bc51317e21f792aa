// The matrix product that the convolution's panels go through.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace dlops::cpu {

// C = A B, or C += A B. Row-major: A is m x k with rows `lda` apart, and so on. Runs on the calling
// thread alone. For float32 this is oneDNN's BRGEMM micro-kernel where the machine has it, which
// takes panels as they are; else, and for float64, simd/matmul.h; for complex numbers and integers
// at::mm. Rows of A may overlap (lda < k), and so may those of B (ldb < n). BRGEMM sums 256 terms
// at a time and then adds what was there, which keeps rounding errors near those of native. The
// first two sum an element alike wherever it stands in a matrix of any size, which BLAS does not:
// an image's result must not depend on its neighbours in a panel.
template <class scalar_t>
void matmul(int64_t m, int64_t n, int64_t k, const scalar_t* a, int64_t lda, const scalar_t* b,
            int64_t ldb, scalar_t* c, int64_t ldc, bool accumulate);

// Whether the machine multiplies bfloat16 numbers, with sums in float32: AVX512_BF16 or AMX. The
// product below is for such machines only.
bool multiplies_bfloat16();
// As above, for an even k and a B whose rows stand in pairs: element (i, j) at b[i / 2][j][i % 2],
// the pairs `ldb` pairs of numbers apart. A part of B that begins at an even row i begins at b + i
// * ldb, as in a row-major matrix.
void matmul(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda,
            const c10::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate);
// To be called by a thread that has made such products: AMX has a state to give back.
void end_bfloat16_products();

}  // namespace dlops::cpu
