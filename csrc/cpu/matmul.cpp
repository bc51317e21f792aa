#include "cpu/matmul.h"

#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/util/complex.h>

#include <algorithm>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/simd/matmul.h"

namespace dlops::cpu {
namespace {

#if defined(CPUBLAS_BRGEMM_F32F32F32)
// oneDNN has no query for it, so one small product is tried.
template <class T>
bool has_brgemm(bool in_pairs) {
  T a[16] = {}, b[256] = {};
  float c[16] = {};
  try {
    at::native::cpublas::brgemm(1, 16, 16, 16, 16, 16, false, a, b, c, in_pairs);
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

bool brgemm_works() {
  static const bool works = has_brgemm<float>(false);
  // Below AVX2, oneDNN has no such kernel and torch runs a BLAS product instead.
  return works && capability() != kBaseline && at::globalContext().userEnabledMkldnn();
}
#endif

// The most terms that are added up one after the other.
constexpr int64_t kPart = 256;

// A view of memory that the caller owns.
template <class scalar_t>
at::Tensor matrix(const scalar_t* data, int64_t rows, int64_t cols, int64_t ld) {
  return at::from_blob(const_cast<scalar_t*>(data), {rows, cols}, {ld, 1},
                       at::TensorOptions(c10::CppTypeToScalarType<scalar_t>::value));
}

}  // namespace

template <class scalar_t>
void matmul(int64_t m, int64_t n, int64_t k, const scalar_t* a, int64_t lda, const scalar_t* b,
            int64_t ldb, scalar_t* c, int64_t ldc, bool accumulate) {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (brgemm_works()) {
      // A part's sum is formed by itself and then added: long chains of roundings cost accuracy.
      for (int64_t k0 = 0; k0 < k; k0 += kPart)
        at::native::cpublas::brgemm(m, n, std::min(kPart, k - k0), lda, ldb, ldc,
                                    accumulate || k0 > 0, a + k0, b + k0 * ldb, c, false);
      return;
    }
  }
#endif
  if constexpr (std::is_floating_point_v<scalar_t>) {
    DLOPS_SIMD(matmul_in_order, scalar_t)(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  } else {
    at::AutoDispatchBelowAutograd below_autograd;
    at::Tensor product = matrix(c, m, n, ldc);
    if (accumulate) {
      product.addmm_(matrix(a, m, k, lda), matrix(b, k, n, ldb));
    } else {
      at::mm_out(product, matrix(a, m, k, lda), matrix(b, k, n, ldb));
    }
  }
}

#if defined(CPUBLAS_BRGEMM_BF16BF16F32) && defined(__x86_64__)

bool multiplies_bfloat16() {
  // Without the instructions, oneDNN does it in float32 and is slower than its product of those.
  static const bool works =
      __builtin_cpu_supports("avx512bf16") && has_brgemm<c10::BFloat16>(/*in_pairs=*/true);
  return works && capability() == kAvx512 && at::globalContext().userEnabledMkldnn();
}

void matmul(int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda,
            const c10::BFloat16* b, int64_t ldb, float* c, int64_t ldc, bool accumulate) {
  for (int64_t k0 = 0; k0 < k; k0 += kPart)
    at::native::cpublas::brgemm(m, n, std::min(kPart, k - k0), lda, ldb, ldc, accumulate || k0 > 0,
                                a + k0, b + k0 * ldb, c, /*is_vnni=*/true);
}

void end_bfloat16_products() { at::native::cpublas::brgemm_release(); }

#else

bool multiplies_bfloat16() { return false; }

void matmul(int64_t, int64_t, int64_t, const c10::BFloat16*, int64_t, const c10::BFloat16*, int64_t,
            float*, int64_t, bool) {
  TORCH_INTERNAL_ASSERT(false, "this build has no product of bfloat16");
}

void end_bfloat16_products() {}

#endif

#define DLOPS_INSTANTIATE(scalar_t)                                                   \
  template void matmul<scalar_t>(int64_t, int64_t, int64_t, const scalar_t*, int64_t, \
                                 const scalar_t*, int64_t, scalar_t*, int64_t, bool);

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
