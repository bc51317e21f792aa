// Convolution on CUDA: im2col into a bounded workspace, multiplied by the library's matrix product
// (cuBLAS, so TF32 follows torch's switches).
//
// Everything runs in channels_last order. The column matrix has one row per output pixel and one
// column per (group, r, s, channel):
//   output (pixels x O)         = columns (pixels x K)        x weight^T (K x O)
//   grad_weight (O x K)         = grad_output^T (O x pixels)  x columns (pixels x K)
//   grad_columns (pixels x K)   = grad_output (pixels x O)    x weight (O x K)
// group by group, where grad_input = col2im(grad_columns). The batch is cut into chunks of whole
// images or, where one image is too much, of some of its pixels; contiguous (NCHW) tensors are
// reordered chunk by chunk. The cut depends on the shapes alone and every sum has one fixed order.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "common/conv2d_checks.h"
#include "common/cuda_utils.cuh"
#include "cuda/conv2d.h"
#include "cuda/conv2d_grad_bias.h"
#include "cuda/windows.cuh"

namespace dlops::cuda {
namespace {

// Some images, or some pixels of one image, whose column matrix is made at a time.
struct Chunk {
  int64_t images;  // how many
  int64_t pixel;   // the first output pixel of each image
  int64_t pixels;  // how many of each
  int64_t rows() const { return images * pixels; }
};

// One stretch of neighbouring channels of the columns per index, as plain bits: the geometry's
// channels are counted in such stretches.
template <class bits_t>
struct Im2col {
  Conv2dGeometry g;
  Chunk chunk;
  Divider channels, S, R, groups, pixels, OW;
  const bits_t* input;
  bits_t* columns;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    // Each split leaves the remainder in place of what it divides.
    int64_t c = i;
    int64_t s = channels.split(c);
    int64_t r = S.split(s);
    int64_t group = R.split(r);
    int64_t pixel = groups.split(group);
    const int64_t n = pixels.split(pixel);
    c += group * channels.divisor();
    int64_t ow = pixel + chunk.pixel;
    const int64_t oh = OW.split(ow);
    const int64_t ih = g.input_row(oh, r), iw = g.input_col(ow, s);
    const bool inside = g.row_inside(ih) && g.col_inside(iw);
    columns[i] = inside ? input[((n * g.H + ih) * g.W + iw) * g.C + c] : bits_t{};
  }
};

// One element of the images per index: the sum of the column elements that stand on it, added to
// what earlier chunks of the same image gave.
template <class sum_t, class image_t>
struct Col2im {
  Conv2dGeometry g;
  Chunk chunk;
  Packs<1, true> pixels;
  WindowAxis rows, cols;
  Divider channels;  // of a group
  const sum_t* columns;
  image_t* images;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Pack at = pixels[i];
    int64_t c = at.channel;
    const int64_t group = channels.split(c);
    sum_t sum = chunk.pixel > 0 ? static_cast<sum_t>(images[i]) : sum_t(0);
    rows.for_each_window(at.row + g.pad_top, [&](int64_t oh, int64_t r) {
      cols.for_each_window(at.col + g.pad_left, [&](int64_t ow, int64_t s) {
        const int64_t pixel = oh * g.OW + ow - chunk.pixel;
        if (pixel < 0 || pixel >= chunk.pixels) return;
        const int64_t row = (at.image * chunk.pixels + pixel) * g.groups + group;
        sum += columns[((row * g.R + r) * g.S + s) * channels.divisor() + c];
      });
    });
    images[i] = static_cast<image_t>(sum);
  }
};

// ------------------------------------------------------------------------------------- chunks

// How a batch is cut so that the columns of one chunk, of `element_size` bytes each, fit the
// workspace.
struct Chunks {
  int64_t images, pixels;

  Chunks(const Conv2dGeometry& g, int64_t element_size) {
    const int64_t pixel_bytes = g.groups * g.column_rows() * element_size;
    const int64_t rows = std::max<int64_t>(1, kWorkspaceBytes / std::max<int64_t>(1, pixel_bytes));
    pixels = std::min(g.output_pixels(), rows);
    images = std::min(g.N, std::max<int64_t>(1, rows / g.output_pixels()));
  }
  // Calls f(first image, how many) for whole images, in order.
  template <class F>
  void for_each_images(const Conv2dGeometry& g, const F& f) const {
    for (int64_t n = 0; n < g.N; n += images) f(n, std::min(images, g.N - n));
  }
  // Calls f(Chunk) for the parts of these images, in order.
  template <class F>
  void for_each_chunk(const Conv2dGeometry& g, int64_t count, const F& f) const {
    for (int64_t p = 0; p < g.output_pixels(); p += pixels)
      f(Chunk{count, p, std::min(pixels, g.output_pixels() - p)});
  }
};

at::Tensor channels_last_images(const at::Tensor& tensor, int64_t n, int64_t count) {
  return tensor.narrow(0, n, count).contiguous(at::MemoryFormat::ChannelsLast);
}

// Where a chunk of `images` (count, C, H, W) is written: the tensor itself where its memory is
// already in channels_last order, else a buffer for it.
at::Tensor channels_last_target(const at::Tensor& images, at::ScalarType dtype) {
  if (images.scalar_type() == dtype && images.is_contiguous(at::MemoryFormat::ChannelsLast))
    return images;
  return at::empty(images.sizes(),
                   images.options().dtype(dtype).memory_format(at::MemoryFormat::ChannelsLast));
}

// ----------------------------------------------------------------------------------- matrices

// The pixels of a chunk of channels_last images as (groups, pixels, channels / groups).
at::Tensor pixel_matrix(const at::Tensor& images, const Conv2dGeometry& g, const Chunk& chunk) {
  const int64_t channels = images.size(1);
  return images.permute({0, 2, 3, 1})
      .view({images.size(0) * images.size(2) * images.size(3), channels})
      .narrow(0, chunk.pixel, chunk.rows())
      .view({chunk.rows(), g.groups, channels / g.groups})
      .transpose(0, 1);
}

// weight as (groups, O / groups, K), K running over (r, s, channel).
at::Tensor weight_matrix(const at::Tensor& weight, const Conv2dGeometry& g) {
  return weight.permute({0, 2, 3, 1}).reshape({g.groups, g.outputs_per_group(), g.column_rows()});
}

// result (+)= a x b, batch by batch. The result may be float32 where a and b are of low precision.
void multiply(at::Tensor result, const at::Tensor& a, const at::Tensor& b, bool accumulate) {
  if (result.scalar_type() == a.scalar_type()) {
    result.baddbmm_(a, b, accumulate ? 1 : 0);
  } else {
    at::baddbmm_out(result, result, a, b, result.scalar_type(), accumulate ? 1 : 0);
  }
}

// The column matrix of a chunk of channels_last images as (groups, pixels, K). It lies in
// `workspace` or, for a 1 x 1 convolution, is the images themselves.
at::Tensor column_matrix(const at::Tensor& images, const Conv2dGeometry& g, const Chunk& chunk,
                         const at::Tensor& workspace) {
  if (is_pointwise(g)) return pixel_matrix(images, g, chunk);
  // The widest stretch, a power of two, that a group's channels and the images' address allow.
  const int64_t group_bytes = g.channels_per_group() * images.element_size();
  const int64_t aligned = reinterpret_cast<intptr_t>(images.const_data_ptr()) | group_bytes | 16;
  const int64_t bytes = aligned & -aligned;
  Conv2dGeometry stretches = g;
  stretches.C = g.C * images.element_size() / bytes;
  with_bits(bytes, [&](auto bits) {
    using bits_t = decltype(bits);
    for_each(chunk.rows() * g.groups * stretches.column_rows(),
             Im2col<bits_t>{stretches, chunk, Divider(stretches.channels_per_group()), Divider(g.S),
                            Divider(g.R), Divider(g.groups), Divider(chunk.pixels), Divider(g.OW),
                            static_cast<const bits_t*>(images.const_data_ptr()),
                            static_cast<bits_t*>(workspace.mutable_data_ptr())});
  });
  return workspace.narrow(0, 0, chunk.rows()).transpose(0, 1);
}

// Memory for the columns of the largest chunk as (pixels, groups, K), empty where none is needed.
at::Tensor column_workspace(const Conv2dGeometry& g, const Chunks& chunks,
                            const at::TensorOptions& options) {
  const int64_t rows = is_pointwise(g) ? 0 : chunks.images * chunks.pixels;
  return at::empty({rows, g.groups, g.column_rows()}, options);
}

// The type that products are summed in.
at::ScalarType sum_type(const at::Tensor& tensor) { return at::toOpMathType(tensor.scalar_type()); }

// The types that the library's matrix product takes.
void check_dtype(const at::Tensor& tensor, const char* name, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      at::isFloatingType(tensor.scalar_type()) || at::isComplexType(tensor.scalar_type()), op,
      ": on CUDA ", name, " must be floating-point or complex, got ", tensor.scalar_type());
}

// ------------------------------------------------------------------------------------ forward

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Conv2dGeometry g =
      check_conv2d(input, weight, bias, {stride, padding, dilation, groups}, "conv2d");
  const bool has_bias = bias.has_value() && bias->defined();
  check_dtype(input, "input", "conv2d");
  if (is_complex_half(input)) {
    return conv2d(complex_float(input), complex_float(weight), complex_float(bias), stride, padding,
                  dilation, groups)
        .to(at::kComplexHalf);
  }
  const c10::DeviceGuard guard(input.device());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  at::Tensor output = at::empty({g.N, g.O, g.OH, g.OW},
                                input.options().memory_format(memory_format(input, weight)));
  if (output.numel() == 0) return output;
  if (takes_depthwise(input, g)) {
    depthwise_conv2d(g, input, weight, bias, output);
    return output;
  }
  if (takes_implicit_gemm(input, g)) {
    implicit_conv2d(g, input, weight, bias, output);
    return output;
  }
  const Chunks chunks(g, input.element_size());
  const at::Tensor workspace = column_workspace(g, chunks, input.options());
  const at::Tensor matrix = weight_matrix(weight, g).transpose(1, 2);
  chunks.for_each_images(g, [&](int64_t n, int64_t count) {
    const at::Tensor images = channels_last_images(input, n, count);
    const at::Tensor result = output.narrow(0, n, count);
    // The product is added to the bias before it is rounded, once: the library may cut sums of low
    // precision in parts, which it rounds.
    const at::Tensor target = channels_last_target(result, sum_type(output));
    if (has_bias) target.copy_(bias->view({1, g.O, 1, 1}));
    chunks.for_each_chunk(g, count, [&](const Chunk& chunk) {
      multiply(pixel_matrix(target, g, chunk), column_matrix(images, g, chunk, workspace), matrix,
               has_bias);
    });
    if (!target.is_same(result)) result.copy_(target);
  });
  return output;
}

// --------------------------------------------------------------------------------- grad_input

// images (+)= col2im(columns).
void add_columns(const at::Tensor& columns, const Conv2dGeometry& g, const Chunk& chunk,
                 const at::Tensor& images) {
  AT_DISPATCH_FLOATING_AND_COMPLEX_TYPES_AND2(
      at::kHalf, at::kBFloat16, images.scalar_type(), "conv2d_grad_input", [&] {
        using sum_t = at::opmath_type<scalar_t>;
        for_each(images.numel(),
                 Col2im<sum_t, scalar_t>{g, chunk, Packs<1, true>(images.size(0), g.C, g.H, g.W),
                                         WindowAxis(g.R, g.stride_h, g.dilation_h, g.OH),
                                         WindowAxis(g.S, g.stride_w, g.dilation_w, g.OW),
                                         Divider(g.channels_per_group()),
                                         columns.const_data_ptr<sum_t>(),
                                         images.mutable_data_ptr<scalar_t>()});
      });
}

at::Tensor conv2d_grad_input(const at::Tensor& grad_output, const at::Tensor& weight,
                             at::IntArrayRef input_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Conv2dGeometry g = check_conv2d_grad_input(
      grad_output, weight, input_size, {stride, padding, dilation, groups}, "conv2d_grad_input");
  check_dtype(grad_output, "grad_output", "conv2d_grad_input");
  if (is_complex_half(grad_output)) {
    return conv2d_grad_input(complex_float(grad_output), complex_float(weight), input_size, stride,
                             padding, dilation, groups)
        .to(at::kComplexHalf);
  }
  const c10::DeviceGuard guard(grad_output.device());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const at::MemoryFormat format = memory_format(grad_output, weight);
  at::Tensor grad_input = at::empty(input_size, grad_output.options().memory_format(format));
  if (grad_input.numel() == 0) return grad_input;
  if (takes_depthwise(grad_output, g)) {
    depthwise_grad_input(g, grad_output, weight, grad_input);
    return grad_input;
  }
  if (takes_implicit_grad_input(grad_output, g)) {
    implicit_grad_input(g, grad_output, weight, grad_input);
    return grad_input;
  }
  const auto sum_options = grad_output.options().dtype(sum_type(grad_output));
  const Chunks chunks(g, static_cast<int64_t>(sum_options.dtype().itemsize()));
  const at::Tensor workspace = column_workspace(g, chunks, sum_options);
  const at::Tensor matrix = weight_matrix(weight, g);
  // An image whose columns come in several chunks collects them in the type of the sums.
  const bool whole_images = chunks.pixels == g.output_pixels() || is_pointwise(g);
  const at::ScalarType dtype = whole_images ? grad_input.scalar_type() : sum_type(grad_output);
  chunks.for_each_images(g, [&](int64_t n, int64_t count) {
    const at::Tensor grad = channels_last_images(grad_output, n, count);
    const at::Tensor result = grad_input.narrow(0, n, count);
    const at::Tensor target = channels_last_target(result, dtype);
    chunks.for_each_chunk(g, count, [&](const Chunk& chunk) {
      if (is_pointwise(g)) {
        multiply(pixel_matrix(target, g, chunk), pixel_matrix(grad, g, chunk), matrix, false);
        return;
      }
      const at::Tensor columns = workspace.narrow(0, 0, chunk.rows());
      multiply(columns.transpose(0, 1), pixel_matrix(grad, g, chunk), matrix, false);
      add_columns(columns, g, chunk, target);
    });
    if (!target.is_same(result)) result.copy_(target);
  });
  return grad_input;
}

// -------------------------------------------------------------------------------- grad_weight

at::Tensor conv2d_grad_weight(const at::Tensor& grad_output, const at::Tensor& input,
                              at::IntArrayRef kernel_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Conv2dGeometry g = check_conv2d_grad_weight(
      grad_output, input, kernel_size, {stride, padding, dilation, groups}, "conv2d_grad_weight");
  check_dtype(grad_output, "grad_output", "conv2d_grad_weight");
  if (is_complex_half(grad_output)) {
    return conv2d_grad_weight(complex_float(grad_output), complex_float(input), kernel_size, stride,
                              padding, dilation, groups)
        .to(at::kComplexHalf);
  }
  const c10::DeviceGuard guard(grad_output.device());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  at::Tensor grad_weight =
      at::empty({g.O, g.channels_per_group(), g.R, g.S},
                grad_output.options().memory_format(memory_format(input, grad_output)));
  if (grad_weight.numel() == 0) return grad_weight;
  if (g.N == 0) return grad_weight.zero_();
  if (takes_depthwise(grad_output, g)) {
    depthwise_grad_weight(g, grad_output, input, grad_weight);
    return grad_weight;
  }
  if (takes_implicit_gemm(grad_output, g)) {
    implicit_grad_weight(g, grad_output, input, grad_weight);
    return grad_weight;
  }
  const Chunks chunks(g, input.element_size());
  const at::Tensor workspace = column_workspace(g, chunks, input.options());
  const at::Tensor sums = at::empty({g.groups, g.outputs_per_group(), g.column_rows()},
                                    grad_output.options().dtype(sum_type(grad_output)));
  chunks.for_each_images(g, [&](int64_t n, int64_t count) {
    const at::Tensor images = channels_last_images(input, n, count);
    const at::Tensor grad = channels_last_images(grad_output, n, count);
    chunks.for_each_chunk(g, count, [&](const Chunk& chunk) {
      multiply(sums, pixel_matrix(grad, g, chunk).transpose(1, 2),
               column_matrix(images, g, chunk, workspace), n + chunk.pixel > 0);
    });
  });
  return grad_weight.copy_(
      sums.view({g.O, g.R, g.S, g.channels_per_group()}).permute({0, 3, 1, 2}));
}

// ---------------------------------------------------------------------------------- grad_bias

at::Tensor conv2d_grad_bias(const at::Tensor& grad_output) {
  check_dim(grad_output, "grad_output", 4, "conv2d_grad_bias");
  const c10::DeviceGuard guard(grad_output.device());
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return sum_of_pixels(grad_output);
}

}  // namespace
}  // namespace dlops::cuda

TORCH_LIBRARY_IMPL(dlops, DLOPS_CUDA_KEY, m) {
  m.impl("conv2d", &dlops::cuda::conv2d);
  m.impl("conv2d_grad_input", &dlops::cuda::conv2d_grad_input);
  m.impl("conv2d_grad_weight", &dlops::cuda::conv2d_grad_weight);
  m.impl("conv2d_grad_bias", &dlops::cuda::conv2d_grad_bias);
}
