#include "cpu/matmul.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/util/complex.h>

#include <algorithm>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/matmul_tiles.h"
#include "cpu/simd/matmul.h"

// Whether products of pairs are built.
#if defined(__x86_64__) && (!defined(DLOPS_ONLY_CAPABILITY) || DLOPS_ONLY_CAPABILITY == 2)
#define DLOPS_PAIRS(call) call
#else
#define DLOPS_PAIRS(call) TORCH_INTERNAL_ASSERT(false, "no product of bfloat16 on this machine")
#endif

namespace dlops::cpu {
namespace {

// A view of memory that the caller owns.
template <class scalar_t>
at::Tensor matrix(const scalar_t* data, int64_t rows, int64_t cols, int64_t ld) {
  return at::from_blob(const_cast<scalar_t*>(data), {rows, cols}, {ld, 1},
                       at::TensorOptions(c10::CppTypeToScalarType<scalar_t>::value));
}

}  // namespace

template <class scalar_t>
void matmul(int64_t m, int64_t n, int64_t k, const scalar_t* a, int64_t lda, const scalar_t* b,
            int64_t ldb, scalar_t* c, int64_t ldc, bool accumulate, const scalar_t* bias) {
  if constexpr (std::is_floating_point_v<scalar_t>) {
    const Factors<scalar_t> factors{a, b};
    DLOPS_SIMD(matmul_in_order, scalar_t)
    (m, n, k, &factors, 1, {.lda = lda, .ldb = ldb, .padded = false}, c, ldc,
     accumulate ? Addend<scalar_t>{c, ldc} : Addend<scalar_t>{}, bias);
  } else {
    TORCH_INTERNAL_ASSERT(bias == nullptr);
    at::AutoDispatchBelowAutograd below_autograd;
    at::Tensor product = matrix(c, m, n, ldc);
    if (accumulate) {
      product.addmm_(matrix(a, m, k, lda), matrix(b, k, n, ldb));
    } else {
      at::mm_out(product, matrix(a, m, k, lda), matrix(b, k, n, ldb));
    }
  }
}

bool multiplies_bfloat16() {
  if (takes_tiles()) return true;
#if defined(__x86_64__)
  static const bool has_instructions = __builtin_cpu_supports("avx512bf16");
  return has_instructions && capability() == kAvx512;
#else
  return false;
#endif
}

template <class T, class sum_t>
void matmul_of_factors(int64_t m, int64_t n, int64_t k, const Factors<T>* factors, int64_t count,
                       const FactorStrides& strides, sum_t* c, int64_t ldc, Addend<sum_t> before) {
  if constexpr (std::is_same_v<T, sum_t>) {
    DLOPS_SIMD(matmul_in_order, T)
    (m, n, k, factors, count, strides, c, ldc, before, nullptr);
  } else {
    if (takes_tiles()) {
      return matmul_of_tiles(m, n, k, factors, count, strides, c, ldc, before);
    }
    DLOPS_PAIRS(matmul_of_pairs(m, n, k, factors, count, strides, c, ldc, before, Rounded{}));
  }
}

bool rounds_products() { return multiplies_bfloat16() && !takes_tiles(); }

void matmul_rounded(int64_t m, int64_t n, int64_t k, const Factors<c10::BFloat16>* factors,
                    int64_t count, const FactorStrides& strides, float* c, int64_t ldc,
                    Addend<float> before, Rounded rounded) {
  DLOPS_PAIRS(matmul_of_pairs(m, n, k, factors, count, strides, c, ldc, before, rounded));
}

#define DLOPS_INSTANTIATE_FACTORS(T, sum_t)                                                        \
  template void matmul_of_factors<T, sum_t>(int64_t, int64_t, int64_t, const Factors<T>*, int64_t, \
                                            const FactorStrides&, sum_t*, int64_t, Addend<sum_t>);

DLOPS_INSTANTIATE_FACTORS(double, double)
DLOPS_INSTANTIATE_FACTORS(float, float)
DLOPS_INSTANTIATE_FACTORS(c10::BFloat16, float)

#define DLOPS_INSTANTIATE(scalar_t)                                                   \
  template void matmul<scalar_t>(int64_t, int64_t, int64_t, const scalar_t*, int64_t, \
                                 const scalar_t*, int64_t, scalar_t*, int64_t, bool,  \
                                 const scalar_t*);

DLOPS_INSTANTIATE(double)
DLOPS_INSTANTIATE(float)
DLOPS_INSTANTIATE(c10::complex<double>)
DLOPS_INSTANTIATE(c10::complex<float>)
DLOPS_INSTANTIATE(int64_t)
DLOPS_INSTANTIATE(int32_t)
DLOPS_INSTANTIATE(int16_t)
DLOPS_INSTANTIATE(int8_t)
DLOPS_INSTANTIATE(uint8_t)

}  // namespace dlops::cpu
