#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <type_traits>

#include "cpu/conv2d_few_pixels.h"
#include "cpu/conv2d_few_pixels_columns.h"
#include "cpu/conv2d_taps.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {
namespace {

// The gradients of some outputs as rows of all pixels, with zeros behind them up to `ld`.
template <class scalar_t, bool last>
void gradient_rows(const Conv2dGeometry& g, const scalar_t* grad_output, Interval outputs,
                   int64_t ld, scalar_t* to) {
  const int64_t count = length(outputs), plane = g.output_pixels(), P = g.N * plane;
  const scalar_t* image = grad_output + outputs.begin * (last ? 1 : plane);
  for (int64_t n = 0; n < g.N; ++n, image += g.O * plane) {
    if constexpr (last) {
      DLOPS_SIMD(transpose, scalar_t, scalar_t)(image, g.O, plane, count, to + n * plane, ld);
    } else {
      for (int64_t o = 0; o < count; ++o)
        std::copy_n(image + o * plane, plane, to + o * ld + n * plane);
    }
  }
  for (int64_t o = 0; o < count; ++o) std::fill(to + o * ld + P, to + (o + 1) * ld, scalar_t(0));
}

// A task's outputs: a block of rows of the weight.
template <class scalar_t>
void multiply_rows(int64_t count, int64_t K, int64_t P, const scalar_t* grad, int64_t ld,
                   const scalar_t* columns, scalar_t* to) {
  using sum_t = at::opmath_type<scalar_t>;
  const FactorStrides strides{.lda = ld, .ldb = K};
  if constexpr (std::is_same_v<scalar_t, sum_t>) {
    const Factors<scalar_t> factors{grad, columns};
    matmul_of_factors(count, K, P, &factors, 1, strides, to, K, Addend<sum_t>{});
  } else {
    // Sums that are converted before they leave the first-level cache.
    constexpr int64_t kRows = 24, kColumns = 256;
    alignas(64) sum_t sums[kRows * kColumns];
    for (int64_t k = 0; k < K; k += kColumns) {
      const int64_t width = std::min(kColumns, K - k);
      for (int64_t i = 0; i < count; i += kRows) {
        const int64_t rows = std::min(kRows, count - i);
        const Factors<scalar_t> factors{grad + i * ld, columns + 2 * k};
        matmul_of_factors(rows, width, P, &factors, 1, strides, sums, kColumns, Addend<sum_t>{});
        for (int64_t row = 0; row < rows; ++row) DLOPS_SIMD(convert_row, sum_t, scalar_t)
        (sums + row * kColumns, to + (i + row) * K + k, width);
      }
    }
  }
}

template <class scalar_t, bool last>
void multiply(const Conv2dGeometry& g, const scalar_t* grad_output, const scalar_t* input,
              scalar_t* grad_weight) {
  constexpr int64_t kOutputs = 64;  // of a task
  const int64_t P = g.N * g.output_pixels(), K = g.column_rows(), Og = g.outputs_per_group();
  const int64_t ld = std::is_same_v<scalar_t, c10::BFloat16> ? ceil_div(P, int64_t{2}) * 2 : P;
  const int64_t blocks = ceil_div(Og, kOutputs);
  for (int64_t group = 0; group < g.groups; ++group) {
    const at::Tensor columns = FewColumns<scalar_t, last, false>(g, group, K).fill(input);
    const scalar_t* b = columns.const_data_ptr<scalar_t>();
    at::parallel_for(0, blocks, grain(kOutputs * P * K), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<scalar_t>(kOutputs * ld));
      scalar_t* const grad = scratch.take<scalar_t>(kOutputs * ld);
      for (int64_t i = begin; i < end; ++i) {
        const Interval o{group * Og + i * kOutputs, group * Og + std::min(Og, (i + 1) * kOutputs)};
        gradient_rows<scalar_t, last>(g, grad_output, o, ld, grad);
        multiply_rows(length(o), K, ld, grad, ld, b, grad_weight + o.begin * K);
      }
    });
  }
}

}  // namespace

bool few_pixels_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                            const at::Tensor& input, const at::Tensor& grad_weight,
                            at::MemoryFormat format) {
  if (!are_few_pixels(g.N * g.output_pixels(), g.column_rows(), g.outputs_per_group(),
                      input.scalar_type()))
    return false;
  return AT_DISPATCH_FLOATING_TYPES_AND(
      at::kBFloat16, input.scalar_type(), "conv2d_grad_weight", [&] {
        const scalar_t* grad = grad_output.const_data_ptr<scalar_t>();
        if (!DLOPS_SIMD(all_finite, scalar_t)(grad, grad_output.numel())) return false;
        const scalar_t* from = input.const_data_ptr<scalar_t>();
        scalar_t* to = grad_weight.mutable_data_ptr<scalar_t>();
        if (format == at::MemoryFormat::ChannelsLast) {
          multiply<scalar_t, true>(g, grad, from, to);
        } else {
          multiply<scalar_t, false>(g, grad, from, to);
        }
        return true;
      });
}

}  // namespace dlops::cpu
