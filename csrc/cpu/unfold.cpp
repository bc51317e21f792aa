// im2col and col2im as ops of their own: torch.nn.functional.unfold and fold.
#include <ATen/Dispatch.h>
#include <ATen/Dispatch_v2.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "cpu/capability.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d.h"

namespace dlops::cpu {
namespace {

constexpr int64_t kElementsPerThread = 1 << 15;

at::Tensor unfold(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef dilation,
                  at::IntArrayRef padding, at::IntArrayRef stride) {
  const Conv2dGeometry g =
      unfold_geometry(input.sizes(), kernel_size, dilation, padding, stride, "unfold");
  const int64_t cells = g.R * g.S, pixels = g.output_pixels();
  at::Tensor result = at::empty({g.N, g.C * cells, pixels}, input.options());
  const at::Tensor dense = input.contiguous();
  AT_DISPATCH_V2(input.scalar_type(), "unfold", AT_WRAP([&] {
                   if (result.numel() == 0) return;
                   const auto fill = DLOPS_SIMD(fill_columns, scalar_t, scalar_t);
                   const scalar_t* from = dense.const_data_ptr<scalar_t>();
                   scalar_t* to = result.mutable_data_ptr<scalar_t>();
                   const int64_t grain =
                       std::max<int64_t>(1, kElementsPerThread / (cells * pixels));
                   at::parallel_for(0, g.N * g.C, grain, [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t n = i / g.C, c = i % g.C;
                       fill(g, {c, c + 1, n * pixels, (n + 1) * pixels}, from,
                            to + i * cells * pixels, pixels);
                     }
                   });
                 }),
                 AT_EXPAND(AT_FLOATING_TYPES), AT_EXPAND(AT_COMPLEX_TYPES), at::kHalf,
                 at::kBFloat16, at::kBool);
  return result;
}

template <class scalar_t>
void fold_planes(const Conv2dGeometry& g, const scalar_t* from, scalar_t* to) {
  using sum_t = at::opmath_type<scalar_t>;
  const auto scatter = DLOPS_SIMD(scatter_columns, scalar_t, sum_t);
  const int64_t cells = g.R * g.S, pixels = g.output_pixels(), plane = g.H * g.W;
  Conv2dGeometry one = g;
  one.N = one.C = 1;
  const auto add_up = [&](int64_t i, sum_t* sums) {
    std::fill_n(sums, plane, sum_t(0));
    scatter(one, {0, 1, 0, pixels}, from + i * cells * pixels, pixels, sums);
  };
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (cells * pixels));
  at::parallel_for(0, g.N * g.C, grain, [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<scalar_t, sum_t>) {
      for (int64_t i = begin; i < end; ++i) add_up(i, to + i * plane);
    } else {
      // Low-precision sums are kept in float32 until all of them are in.
      Scratch scratch(Scratch::size<sum_t>(plane));
      sum_t* sums = scratch.take<sum_t>(plane);
      for (int64_t i = begin; i < end; ++i) {
        add_up(i, sums);
        DLOPS_SIMD(convert_row, sum_t, scalar_t)(sums, to + i * plane, plane);
      }
    }
  });
}

at::Tensor fold(const at::Tensor& input, at::IntArrayRef output_size, at::IntArrayRef kernel_size,
                at::IntArrayRef dilation, at::IntArrayRef padding, at::IntArrayRef stride) {
  const Conv2dGeometry g =
      fold_geometry(input.sizes(), output_size, kernel_size, dilation, padding, stride, "fold");
  at::Tensor result = at::empty({g.N, g.C, g.H, g.W}, input.options());
  const at::Tensor dense = input.contiguous();
  AT_DISPATCH_V2(
      input.scalar_type(), "fold", AT_WRAP([&] {
        if (result.numel() == 0) return;
        fold_planes(g, dense.const_data_ptr<scalar_t>(), result.mutable_data_ptr<scalar_t>());
      }),
      AT_EXPAND(AT_FLOATING_TYPES), AT_EXPAND(AT_COMPLEX_TYPES), at::kHalf, at::kBFloat16,
      at::kBool);
  return result;
}

}  // namespace
}  // namespace dlops::cpu

TORCH_LIBRARY_IMPL(dlops, CPU, m) {
  m.impl("unfold", &dlops::cpu::unfold);
  m.impl("fold", &dlops::cpu::fold);
}
