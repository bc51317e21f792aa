// The argument checks of every op, for CPU and CUDA alike: each kernel gets a geometry that is
// known to be sound, so that it never reads or writes out of range. A refusal names the argument
// and its value and is of the type that the native op raises.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <array>

#include "conv2d_math.h"
#include "max_pool2d_math.h"

namespace dlops {

// ------------------------------------------------------------------------------------ tensors

inline void check_dim(const at::Tensor& tensor, const char* name, int64_t dim, const char* op) {
  TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got shape ",
              tensor.sizes());
}

// Same device and dtype as the tensor that leads.
inline void check_like(const at::Tensor& tensor, const char* name, const at::Tensor& lead,
                       const char* lead_name, const char* op) {
  TORCH_CHECK(tensor.device() == lead.device(), op,
              ": expected all tensors to be on the same device, ", "but ", lead_name, " is on ",
              lead.device(), " and ", name, " is on ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == lead.scalar_type(), op, ": ", lead_name, " and ", name,
              " must have the same dtype, got ", lead_name, " of ", lead.scalar_type(), " and ",
              name, " of ", tensor.scalar_type());
}

inline void check_sizes(const at::Tensor& tensor, const char* name, at::IntArrayRef expected,
                        const char* op) {
  TORCH_CHECK(tensor.sizes() == expected, op, ": expected ", name, " of shape ", expected, ", got ",
              tensor.sizes());
}

// Refuses sizes whose product does not fit in 63 bits.
inline int64_t checked_product(at::IntArrayRef sizes, const char* what) {
  uint64_t product = 0;
  const bool overflow = c10::safe_multiplies_u64(sizes, &product);
  TORCH_CHECK(!overflow && product <= static_cast<uint64_t>(INT64_MAX), what,
              " is too large: the product of ", sizes, " does not fit in 64 bits");
  return static_cast<int64_t>(product);
}

// -------------------------------------------------------------------------------------- lists

// What sums of two sizes may be made of without overflow.
constexpr int64_t kLargestSize = int64_t(1) << 62;

// One value for every entry of an argument such as stride, each between `minimum` and `maximum`.
template <size_t count>
std::array<int64_t, count> check_list(at::IntArrayRef values, const char* name, int64_t minimum,
                                      const char* op, int64_t maximum = INT64_MAX) {
  TORCH_CHECK(values.size() == count, op, ": ", name, " must have ", count, " values, got ",
              values);
  std::array<int64_t, count> result{};
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK(values[i] >= minimum, op, ": ", name, " must be ",
                minimum > 0 ? "greater than zero" : "non-negative", ", got ", values);
    TORCH_CHECK(values[i] <= maximum, op, ": ", name, " must be at most ", maximum, ", got ",
                values);
    result[i] = values[i];
  }
  return result;
}

// ------------------------------------------------------------------------------------ geometry

// The size of the padded input, along which every position of a window must fit in 62 bits.
inline int64_t padded_size(int64_t size, int64_t before, int64_t after, const char* op) {
  int64_t padded = 0;
  const bool overflow = __builtin_add_overflow(before, after, &padded) ||
                        __builtin_add_overflow(padded, size, &padded);
  TORCH_CHECK(!overflow && padded <= kLargestSize, op, ": padding is too large: an input of size ",
              size, " with padding ", before, " and ", after, " does not fit in 62 bits");
  return padded;
}

// The distance from the first to the last element of a window, and one; at most INT64_MAX.
inline int64_t window_span(int64_t kernel, int64_t dilation) {
  int64_t span = 0;
  const bool overflow = __builtin_mul_overflow(kernel - 1, dilation, &span) ||
                        __builtin_add_overflow(span, int64_t(1), &span);
  return overflow ? INT64_MAX : span;
}

struct Conv2dArguments {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
};

// From the sizes of input (N, C, H, W) and weight (O, C / groups, R, S).
inline Conv2dGeometry conv2d_geometry(at::IntArrayRef input, at::IntArrayRef weight,
                                      const Conv2dArguments& arguments, const char* op) {
  const auto stride = check_list<2>(arguments.stride, "stride", 1, op);
  const auto padding = check_list<4>(arguments.padding, "padding", 0, op);
  const auto dilation = check_list<2>(arguments.dilation, "dilation", 1, op);
  const int64_t groups = arguments.groups;
  TORCH_CHECK(input.size() == 4, op, ": input must have 4 dimensions (N, C, H, W), got shape ",
              input);
  TORCH_CHECK(
      weight.size() == 4, op,
      ": weight must have 4 dimensions (out_channels, in_channels / groups, kernel_h, kernel_w)"
      ", got shape ",
      weight);
  TORCH_CHECK(groups > 0, op, ": groups must be greater than zero, got ", groups);
  TORCH_CHECK(weight[0] % groups == 0 && weight[0] >= groups, op, ": weight's out_channels (",
              weight[0], ") must be a positive multiple of groups (", groups,
              "), weight has shape ", weight);
  TORCH_CHECK(input[1] == weight[1] * groups, op, ": given groups=", groups,
              " and weight of shape ", weight, ", expected input to have ", weight[1] * groups,
              " channels, got ", input[1], " (input of shape ", input, ")");
  TORCH_CHECK(input[2] > 0 && input[3] > 0, op,
              ": height and width of input must be greater than zero, got shape ", input);
  TORCH_CHECK(weight[2] > 0 && weight[3] > 0, op, ": kernel size must be greater than zero, got (",
              weight[2], ", ", weight[3], ")");
  Conv2dGeometry g{};
  g.N = input[0], g.C = input[1], g.H = input[2], g.W = input[3];
  g.O = weight[0], g.R = weight[2], g.S = weight[3];
  g.pad_top = padding[0], g.pad_left = padding[1];
  g.groups = groups;
  const int64_t padded_h = padded_size(g.H, padding[0], padding[2], op);
  const int64_t padded_w = padded_size(g.W, padding[1], padding[3], op);
  const int64_t span_h = window_span(g.R, dilation[0]), span_w = window_span(g.S, dilation[1]);
  TORCH_CHECK(span_h <= padded_h && span_w <= padded_w, op,
              ": kernel size can't be greater than the padded input: kernel (", g.R, " x ", g.S,
              ") with dilation (", dilation[0], " x ", dilation[1], ") spans (", span_h, " x ",
              span_w, "), padded input is (", padded_h, " x ", padded_w, ")");
  // The least that mean the same, so that the index maps cannot overflow.
  g.stride_h = std::min(stride[0], padded_h), g.stride_w = std::min(stride[1], padded_w);
  g.dilation_h = g.R == 1 ? 1 : dilation[0], g.dilation_w = g.S == 1 ? 1 : dilation[1];
  g.OH = (padded_h - span_h) / g.stride_h + 1;
  g.OW = (padded_w - span_w) / g.stride_w + 1;
  checked_product({g.N, g.O, g.OH, g.OW}, "the output of the convolution");
  checked_product({g.C, g.R, g.S}, "the kernel of the convolution");
  return g;
}

// unfold is a convolution's im2col: one output per column row stands for the weight.
inline Conv2dGeometry unfold_geometry(at::IntArrayRef input, at::IntArrayRef kernel_size,
                                      at::IntArrayRef dilation, at::IntArrayRef padding,
                                      at::IntArrayRef stride, const char* op) {
  TORCH_CHECK(input.size() == 4 && input[1] > 0, op,
              ": input must have shape (N, C, H, W) with at least one channel, got shape ", input);
  const auto kernel = check_list<2>(kernel_size, "kernel_size", 1, op);
  const auto pad = check_list<2>(padding, "padding", 0, op);
  const std::array<int64_t, 4> weight{1, input[1], kernel[0], kernel[1]};
  const std::array<int64_t, 4> sides{pad[0], pad[1], pad[0], pad[1]};
  const Conv2dGeometry g = conv2d_geometry(input, weight, {stride, sides, dilation, 1}, op);
  checked_product({g.N, g.C, g.R, g.S, g.OH, g.OW}, "the unfolded output");
  return g;
}

// fold's input is what unfold makes of (N, C, output_size): (N, C * kernel cells, positions).
inline Conv2dGeometry fold_geometry(at::IntArrayRef input, at::IntArrayRef output_size,
                                    at::IntArrayRef kernel_size, at::IntArrayRef dilation,
                                    at::IntArrayRef padding, at::IntArrayRef stride,
                                    const char* op) {
  TORCH_CHECK(input.size() == 3 && input[1] > 0 && input[2] > 0, op,
              ": input must have shape (N, C * kernel cells, positions), got shape ", input);
  const auto size = check_list<2>(output_size, "output_size", 1, op);
  const auto kernel = check_list<2>(kernel_size, "kernel_size", 1, op);
  const int64_t cells = checked_product({kernel[0], kernel[1]}, "kernel_size");
  TORCH_CHECK(input[1] % cells == 0, op, ": input's second dimension must be divisible by the ",
              cells, " cells of kernel_size ", kernel_size, ", got shape ", input);
  const std::array<int64_t, 4> image{input[0], input[1] / cells, size[0], size[1]};
  const Conv2dGeometry g = unfold_geometry(image, kernel_size, dilation, padding, stride, op);
  TORCH_CHECK(input[2] == g.output_pixels(), op, ": for output_size ", output_size,
              ", kernel_size ", kernel_size, ", dilation ", dilation, ", padding ", padding,
              " and stride ", stride, " input must hold ", g.OH, " x ", g.OW, " = ",
              g.output_pixels(), " positions, got ", input[2], " (shape ", input, ")");
  return g;
}

inline Pool2dGeometry pool2d_geometry(at::IntArrayRef input, at::IntArrayRef kernel_size,
                                      at::IntArrayRef stride, at::IntArrayRef padding,
                                      at::IntArrayRef dilation, bool ceil_mode, const char* op) {
  TORCH_CHECK(input.size() == 4, op, ": input must have 4 dimensions (N, C, H, W), got shape ",
              input);
  TORCH_CHECK(input[1] > 0 && input[2] > 0 && input[3] > 0, op,
              ": channels, height and width of input must be greater than zero, got shape ", input);
  const auto kernel = check_list<2>(kernel_size, "kernel_size", 1, op, INT32_MAX);
  const auto steps = check_list<2>(stride, "stride", 1, op, INT32_MAX);
  const auto pad = check_list<2>(padding, "padding", 0, op, INT32_MAX);
  const auto spread = check_list<2>(dilation, "dilation", 1, op, INT32_MAX);
  Pool2dGeometry g{};
  g.N = input[0], g.C = input[1], g.H = input[2], g.W = input[3];
  g.kernel_h = kernel[0], g.kernel_w = kernel[1];
  g.stride_h = steps[0], g.stride_w = steps[1];
  g.pad_h = pad[0], g.pad_w = pad[1];
  g.dilation_h = spread[0], g.dilation_w = spread[1];
  TORCH_CHECK(g.pad_h <= g.kernel_h / 2 && g.pad_w <= g.kernel_w / 2, op,
              ": padding must be at most half of the kernel size, got padding ", padding,
              " for kernel_size ", kernel_size);
  g.cell_step = g.kernel_w;
  g.OH = pool_output_size(g.H, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h, ceil_mode);
  g.OW = pool_output_size(g.W, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w, ceil_mode);
  TORCH_CHECK(g.OH > 0 && g.OW > 0, op, ": kernel_size ", kernel_size, " with dilation ", dilation,
              " is larger than the padded input: the output would be (", g.OH, " x ", g.OW,
              ") for input of shape ", input, " and padding ", padding);
  return g;
}

// For the ops that start from an output-sized tensor: its own height and width stand in for
// ceil_mode, which input and output size cannot always tell apart.
inline Pool2dGeometry pool2d_geometry_of_output(at::IntArrayRef input, at::IntArrayRef output,
                                                at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                                at::IntArrayRef padding, at::IntArrayRef dilation,
                                                const char* op) {
  Pool2dGeometry g =
      pool2d_geometry(input, kernel_size, stride, padding, dilation, /*ceil_mode=*/true, op);
  TORCH_CHECK(output.size() == 4 && output[0] == g.N && output[1] == g.C, op,
              ": expected an output of ", g.N, " images and ", g.C, " channels, got shape ",
              output);
  TORCH_CHECK(output[2] >= 1 && output[2] <= g.OH && output[3] >= 1 && output[3] <= g.OW, op,
              ": expected an output of at most (", g.OH, " x ", g.OW, ") pixels, got shape ",
              output);
  g.OH = output[2], g.OW = output[3];
  return g;
}

inline void check_cells(const at::Tensor& cells, const Pool2dGeometry& g, const char* op) {
  const auto expected = g.cells() <= kMaxByteCells ? at::kByte : at::kLong;
  TORCH_CHECK(cells.scalar_type() == expected, op, ": cells must be ", expected, " for ", g.cells(),
              " window cells, got ", cells.scalar_type());
  check_sizes(cells, "cells", {g.N, g.C, g.OH, g.OW}, op);
}

}  // namespace dlops
