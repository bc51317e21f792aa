#include "cpu/matmul.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/util/complex.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/environment.h"
#include "cpu/matmul_tiles.h"
#include "cpu/simd/matmul.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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

namespace {

bool has_pairs() {
#if defined(__x86_64__)
  return capability() == kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Intel's CPUs with AMX leave bfloat16 to it. Their vdpbf16ps, which is what is left where a
// virtual machine hides the tiles, takes four times as long as a multiply-add of float32, for twice
// the products. They are those with arithmetic in float16.
bool has_slow_pairs() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kFloat16 = 1U << 23;
  return __builtin_cpu_is("intel") && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 &&
         (d & kFloat16) != 0;
#else
  return false;
#endif
}

bool find_pairs() {
  const bool wanted = switch_of("DLOPS_CPU_AVX512_BF16",
                                "unset (where it is faster than float32), 0 (never) or 1 (always)")
                          .value_or(has_pairs() && !has_slow_pairs());
  TORCH_CHECK(has_pairs() || !wanted,
              "DLOPS_CPU_AVX512_BF16=1 needs a CPU with AVX512_BF16 (avx512_bf16 in "
              "/proc/cpuinfo) and torch's AVX512 kernels; this process runs the ",
              capability_name(capability()), " ones");
  return wanted;
}

}  // namespace

bool multiplies_bfloat16() {
  if (takes_tiles()) return true;
  static const bool by_pairs = find_pairs();
  return by_pairs;
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
