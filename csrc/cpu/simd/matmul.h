// A matrix product in which every element is the same sum in the same order, whatever the size of
// the matrix and the element's place in it.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

namespace dlops::cpu {

// Terms that are summed in registers before they join C: long chains of roundings cost accuracy.
constexpr int64_t kTerms = 256;

// Matrices of a product, as in cpu/matmul.h.
template <class T>
struct Factors {
  const T *a, *b;
};

// How they lie: element (i, j) of A is a[shift + i * lda + j * step], and of B b[i * ldb + j].
struct FactorStrides {
  int64_t lda, ldb;
  int64_t step = 1, shift = 0;
  bool padded = true;  // a vector may be read from wherever a row of B has an element
};

// What a product is added to: a matrix with rows `ld` apart, which may be C itself, one row for all
// of its rows (ld 0), or nothing.
template <class T>
struct Addend {
  const T* data = nullptr;
  int64_t ld = 0;
};

// C = before + the sum of A B over the factors. `bias`, where not null, has an element for each row
// of C, which is added last.
template <int capability, class T>
void matmul_in_order(int64_t m, int64_t n, int64_t k, const Factors<T>* factors, int64_t count,
                     const FactorStrides& strides, T* c, int64_t ldc, Addend<T> before,
                     const T* bias = nullptr);
// Where a product leaves its elements rounded to bfloat16, if `data` is not null. C then has the
// sums on the way there, where there are more than kTerms terms.
struct Rounded {
  c10::BFloat16* data = nullptr;
  int64_t ld = 0;
};
// The same of bfloat16, whose B are padded and in pairs, on machines with AVX512_BF16. step is 1.
// Numbers below float32's normal ones are rounded to zero, as the product's instruction has them.
void matmul_of_pairs(int64_t m, int64_t n, int64_t k, const Factors<c10::BFloat16>* factors,
                     int64_t count, const FactorStrides& strides, float* c, int64_t ldc,
                     Addend<float> before, Rounded rounded);

}  // namespace dlops::cpu
