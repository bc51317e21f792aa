#include "cpu/simd/matmul.h"

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>

namespace dlops::cpu {
namespace {

// A tile of kRows x (kVectors vectors) sums stays in registers, of which AVX-512 has 32.
constexpr int64_t kRows = DLOPS_CAPABILITY == 2 ? 8 : 4;
constexpr int64_t kVectors = 3;
// Terms that are summed in registers before they join C: their part of B stays in the L1 cache.
constexpr int64_t kTerms = 128;

template <class T>
using Vec = at::vec::Vectorized<T>;

// C += A B, or C = A B, for `rows` rows and `width` columns of C; B is packed, its rows
// kVectors vectors apart and filled up with zeros.
template <int64_t rows, class T>
void tile(int64_t width, int64_t k, const T* a, int64_t lda, const T* b, T* c, int64_t ldc,
          bool accumulate) {
  using V = Vec<T>;
  V sums[rows][kVectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 3
    for (int64_t v = 0; v < kVectors; ++v) sums[i][v] = V(T(0));
  for (int64_t term = 0; term < k; ++term) {
    V factors[kVectors];
#pragma GCC unroll 3
    for (int64_t v = 0; v < kVectors; ++v)
      factors[v] = V::loadu(b + (term * kVectors + v) * V::size());
#pragma GCC unroll 8
    for (int64_t i = 0; i < rows; ++i) {
      const V factor(a[i * lda + term]);
#pragma GCC unroll 3
      for (int64_t v = 0; v < kVectors; ++v)
        sums[i][v] = at::vec::fmadd(factor, factors[v], sums[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; ++i) {
#pragma GCC unroll 3
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t count = std::min<int64_t>(V::size(), width - v * V::size());
      if (count <= 0) continue;
      T* to = c + i * ldc + v * V::size();
      (accumulate ? V::loadu(to, count) + sums[i][v] : sums[i][v])
          .store(to, static_cast<int>(count));
    }
  }
}

}  // namespace

template <int capability, class T>
void matmul_in_order(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
                     int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int64_t columns = kVectors * Vec<T>::size();
  alignas(64) T packed[kTerms * columns];
  // One round at least, so that an empty sum is written too.
  for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += kTerms) {
    const int64_t terms = std::min(kTerms, k - k0);
    const bool add = accumulate || k0 > 0;
    for (int64_t j = 0; j < n; j += columns) {
      const int64_t width = std::min(columns, n - j);
      for (int64_t term = 0; term < terms; ++term) {
        const T* from = b + (k0 + term) * ldb + j;
        T* to = packed + term * columns;
        std::copy_n(from, width, to);
        std::fill(to + width, to + columns, T(0));
      }
      int64_t i = 0;
      for (; i + kRows <= m; i += kRows)
        tile<kRows>(width, terms, a + i * lda + k0, lda, packed, c + i * ldc + j, ldc, add);
      for (; i < m; ++i)
        tile<1>(width, terms, a + i * lda + k0, lda, packed, c + i * ldc + j, ldc, add);
    }
  }
}

#define DLOPS_INSTANTIATE(T)                                                                       \
  template void matmul_in_order<DLOPS_CAPABILITY, T>(int64_t, int64_t, int64_t, const T*, int64_t, \
                                                     const T*, int64_t, T*, int64_t, bool);

DLOPS_INSTANTIATE(double)
DLOPS_INSTANTIATE(float)

}  // namespace dlops::cpu
