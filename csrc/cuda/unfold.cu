// im2col and col2im as ops of their own: torch.nn.functional.unfold and fold.
#include <ATen/Dispatch_v2.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/cuda_utils.cuh"
#include "cuda/windows.cuh"

namespace dlops::cuda {
namespace {

// One element of the columns (N, C, R, S, OH, OW) per index.
template <class bits_t>
struct Unfold {
  Conv2dGeometry g;
  Divider OW, OH, S, R;
  const bits_t* input;
  bits_t* columns;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    // Each split leaves the remainder in place of what it divides.
    int64_t ow = i;
    int64_t oh = OW.split(ow);
    int64_t s = OH.split(oh);
    int64_t r = S.split(s);
    const int64_t plane = R.split(r);
    const int64_t ih = g.input_row(oh, r), iw = g.input_col(ow, s);
    const bool inside = g.row_inside(ih) && g.col_inside(iw);
    columns[i] = inside ? input[(plane * g.H + ih) * g.W + iw] : bits_t{};
  }
};

// One pixel of the image per index: the sum of the column elements that stand on it.
template <class scalar_t>
struct Fold {
  using sum_t = at::opmath_type<scalar_t>;
  Conv2dGeometry g;
  Packs<1, false> pixels;
  WindowAxis rows, cols;
  const scalar_t* columns;
  scalar_t* image;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Pack at = pixels[i];
    sum_t sum(0);
    rows.for_each_window(at.row + g.pad_top, [&](int64_t oh, int64_t r) {
      cols.for_each_window(at.col + g.pad_left, [&](int64_t ow, int64_t s) {
        const int64_t row = (at.image * g.R + r) * g.S + s;
        sum += static_cast<sum_t>(columns[(row * g.OH + oh) * g.OW + ow]);
      });
    });
    image[i] = static_cast<scalar_t>(sum);
  }
};

at::Tensor unfold(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef dilation,
                  at::IntArrayRef padding, at::IntArrayRef stride) {
  const Conv2dGeometry g =
      unfold_geometry(input.sizes(), kernel_size, dilation, padding, stride, "unfold");
  const c10::DeviceGuard guard(input.device());
  at::Tensor result = at::empty({g.N, g.C * g.R * g.S, g.output_pixels()}, input.options());
  if (result.numel() == 0) return result;
  const at::Tensor dense = input.contiguous();
  AT_DISPATCH_V2(
      input.scalar_type(), "unfold", AT_WRAP([&] {
        using bits_t = Bits<sizeof(scalar_t)>;
        for_each(result.numel(),
                 Unfold<bits_t>{g, Divider(g.OW), Divider(g.OH), Divider(g.S), Divider(g.R),
                                static_cast<const bits_t*>(dense.const_data_ptr()),
                                static_cast<bits_t*>(result.mutable_data_ptr())});
      }),
      AT_EXPAND(AT_FLOATING_TYPES), AT_EXPAND(AT_COMPLEX_TYPES), at::kHalf, at::kBFloat16,
      at::kBool);
  return result;
}

at::Tensor fold(const at::Tensor& input, at::IntArrayRef output_size, at::IntArrayRef kernel_size,
                at::IntArrayRef dilation, at::IntArrayRef padding, at::IntArrayRef stride) {
  const Conv2dGeometry g =
      fold_geometry(input.sizes(), output_size, kernel_size, dilation, padding, stride, "fold");
  const c10::DeviceGuard guard(input.device());
  at::Tensor result = at::empty({g.N, g.C, g.H, g.W}, input.options());
  if (result.numel() == 0) return result;
  const at::Tensor dense = input.contiguous();
  AT_DISPATCH_V2(
      input.scalar_type(), "fold", AT_WRAP([&] {
        for_each(result.numel(), Fold<scalar_t>{g, Packs<1, false>(g.N, g.C, g.H, g.W),
                                                WindowAxis(g.R, g.stride_h, g.dilation_h, g.OH),
                                                WindowAxis(g.S, g.stride_w, g.dilation_w, g.OW),
                                                dense.const_data_ptr<scalar_t>(),
                                                result.mutable_data_ptr<scalar_t>()});
      }),
      AT_EXPAND(AT_FLOATING_TYPES), AT_EXPAND(AT_COMPLEX_TYPES), at::kHalf, at::kBFloat16,
      at::kBool);
  return result;
}

}  // namespace
}  // namespace dlops::cuda

TORCH_LIBRARY_IMPL(dlops, DLOPS_CUDA_KEY, m) {
  m.impl("unfold", &dlops::cuda::unfold);
  m.impl("fold", &dlops::cuda::fold);
}
