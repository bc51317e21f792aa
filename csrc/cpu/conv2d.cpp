// Convolution on the CPU: checks, and the choice between its kernels.
//   conv2d_strips.h        products that read channels_last pixels where they are: floating-point
//                          types
//   conv2d_pairs_weight.h  the weight's gradient from bfloat16 images
//   conv2d_parts.h         float32 by sums of bfloat16 products
//   conv2d_winograd.h      3x3 kernels of stride 1 with fewer products
//   conv2d_rows.h          contiguous images of few channels: forward, and the weight's gradient
//   conv2d_panels.h        im2col panels that stay in cache: few input channels and 1x1 kernels of
//                          contiguous images, integers and complex numbers; its forward,
//                          grad_input and grad_weight are in this file
//   conv2d_few_pixels.h    batches of few pixels under large weights
//   conv2d_planes.h        thin groups of contiguous tensors
//   conv2d_depthwise.h     depthwise, channels_last
// Their products are in matmul.h.
//
// The cut into panels depends on the shapes alone, never on the number of threads, and every sum
// has one fixed order: the same call gives the same bits on any number of threads.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <vector>

#include "common/conv2d_checks.h"
#include "cpu/conv2d_correlation.h"
#include "cpu/conv2d_depthwise.h"
#include "cpu/conv2d_few_pixels.h"
#include "cpu/conv2d_pairs_weight.h"
#include "cpu/conv2d_panels.h"
#include "cpu/conv2d_parts.h"
#include "cpu/conv2d_planes.h"
#include "cpu/conv2d_rows.h"
#include "cpu/conv2d_strips.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/transpose.h"
#include "cpu/sums.h"

namespace dlops::cpu {
namespace {

// What native convolves on the CPU.
void check_dtype(const at::Tensor& tensor, const char* op) {
  const at::ScalarType dtype = tensor.scalar_type();
  const bool floating =
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  const bool complex =
      dtype == at::kComplexDouble || dtype == at::kComplexFloat || dtype == at::kComplexHalf;
  const bool integer =
      at::isIntegralType(dtype, /*includeBool=*/false) && !at::isBarebonesUnsignedType(dtype);
  TORCH_CHECK_NOT_IMPLEMENTED(floating || complex || integer, op, ": not implemented for ", dtype);
}

// The type that products of `dtype` are summed in.
at::ScalarType sum_type(at::ScalarType dtype) { return at::toOpMathType(dtype); }

// Ops on a tensor cost more than a tiny convolution, also where they have nothing to do: what
// follows has few of them.

at::Tensor in_sum_type(const at::Tensor& tensor) {
  const at::ScalarType type = sum_type(tensor.scalar_type());
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

// weight in the type of the sums, contiguous.
at::Tensor dense_weight(const at::Tensor& weight) { return in_sum_type(weight).contiguous(); }

// matrices[batch][rows][cols] as [batch][cols][rows].
template <class from_t, class to_t>
void transpose_all(const from_t* from, int64_t batch, int64_t rows, int64_t cols, to_t* to) {
  constexpr int64_t kStrip = 64;
  const int64_t strips = ceil_div(cols, kStrip);
  const auto flip = DLOPS_SIMD(transpose, from_t, to_t);
  at::parallel_for(0, batch * strips, grain(kStrip * rows), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t matrix = i / strips * rows * cols, col = i % strips * kStrip;
      flip(from + matrix + col, cols, rows, std::min(kStrip, cols - col), to + matrix + col * rows,
           rows);
    }
  });
}

at::Tensor transposed(const at::Tensor& matrices, int64_t batch, int64_t rows, int64_t cols) {
  at::Tensor result = at::empty({batch, cols, rows}, matrices.options());
  AT_DISPATCH_ALL_TYPES_AND_COMPLEX(matrices.scalar_type(), "conv2d", [&] {
    transpose_all(matrices.const_data_ptr<scalar_t>(), batch, rows, cols,
                  result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

// The weight of each channel block as (groups, Og, R S c) matrices: the order in which a
// channels_last panel holds its columns.
std::vector<at::Tensor> channels_last_weights(const at::Tensor& weight, const Conv2dGeometry& g,
                                              const ChannelBlocks& blocks) {
  const int64_t Og = g.outputs_per_group();
  const at::Tensor grouped = in_sum_type(weight).unflatten(0, {g.groups, Og});
  std::vector<at::Tensor> result;
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const int64_t c0 = blocks[i].begin, count = blocks[i].end - c0;
    result.push_back(grouped.narrow(2, c0, count)
                         .permute({0, 1, 3, 4, 2})
                         .contiguous()
                         .view({g.groups, Og, g.R * g.S * count}));
  }
  return result;
}

// Groups with few channels make thin matrices in channels_last: those run contiguous.
at::MemoryFormat compute_format(const Conv2dGeometry& g, at::MemoryFormat format) {
  return has_thin_groups(g) ? at::MemoryFormat::Contiguous : format;
}

// ------------------------------------------------------------------------------------ forward

template <class scalar_t, bool last>
void forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
             const at::Tensor& bias, const at::Tensor& output) {
  using sum_t = at::opmath_type<scalar_t>;
  const Panels<scalar_t, last> panels{g};
  // The product writes the outputs of one image where they belong.
  constexpr bool in_place = !last && panels.same_type && std::is_floating_point_v<scalar_t>;
  const int64_t Og = g.outputs_per_group(), cells = g.R * g.S;
  const PixelBlocks pixels(g, pixels_per_panel(g));
  const ChannelBlocks channels(g.channels_per_group(), cells, kPanelElements / kMinPixels);
  // A few large pixel blocks alone would leave threads idle: then the outputs are split as well.
  const int64_t wanted = ceil_div(8, std::max<int64_t>(1, pixels.count() * g.groups));
  const int64_t outputs = std::max<int64_t>(std::min<int64_t>(Og, 64), ceil_div(Og, wanted));
  const int64_t splits = ceil_div(Og, outputs);

  std::vector<at::Tensor> weights;
  if constexpr (last) {
    for (const at::Tensor& part : channels_last_weights(weight, g, channels))
      weights.push_back(transposed(part, g.groups, Og, part.size(2)));
  } else {
    weights.push_back(dense_weight(weight));
  }
  const scalar_t* input_data = input.const_data_ptr<scalar_t>();
  const sum_t* bias_data = bias.defined() ? bias.const_data_ptr<sum_t>() : nullptr;
  scalar_t* output_data = output.mutable_data_ptr<scalar_t>();
  const int64_t panel = channels.size * cells * pixels.max_pixels();
  const int64_t product = outputs * pixels.max_pixels();
  const int64_t tasks = g.groups * pixels.count() * splits;
  at::parallel_for(0, tasks, grain(product * g.column_rows()), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::size<sum_t>(panel) + Scratch::size<sum_t>(product));
    sum_t* space = scratch.take<sum_t>(panel);
    sum_t* out = scratch.take<sum_t>(product);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task % splits, group = task / splits / pixels.count();
      const Interval q = pixels[task / splits % pixels.count()];
      const Interval o{split * outputs, std::min(Og, (split + 1) * outputs)};
      const int64_t P = q.end - q.begin, outs = o.end - o.begin;
      sum_t* to = out;
      int64_t ld = last ? outs : P;
      const sum_t* added = nullptr;
      if constexpr (in_place) {
        if (panels.one_image(q)) {
          const int64_t first = group * Og + o.begin, plane = g.output_pixels();
          to = output_data + (q.begin / plane * g.O + first) * plane + q.begin % plane;
          ld = plane;
          if (bias_data != nullptr) added = bias_data + first;
        }
      }
      for (int64_t i = 0; i < channels.count(); ++i) {
        const Interval c = channels[i];
        const int64_t K = (c.end - c.begin) * cells;
        const Matrix<sum_t> columns = panels.columns(input_data, group, c, q, space);
        if constexpr (last) {
          const sum_t* w = weights[i].template const_data_ptr<sum_t>() + group * K * Og + o.begin;
          matmul(P, outs, K, columns.data, columns.ld, w, Og, out, outs, i > 0);
        } else {
          const sum_t* w = weights[0].template const_data_ptr<sum_t>() +
                           (group * Og + o.begin) * g.column_rows() + c.begin * cells;
          matmul(outs, P, K, w, g.column_rows(), columns.data, columns.ld, to, ld, i > 0,
                 i + 1 < channels.count() ? nullptr : added);
        }
      }
      if (to == out) panels.store({out, ld}, bias_data, group, o, q, output_data);
    }
  });
}

// `winograd`: whether it may be taken.
at::Tensor conv2d_by(const at::Tensor& input, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                     at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                     bool winograd) {
  const Conv2dGeometry g =
      check_conv2d(input, weight, bias, {stride, padding, dilation, groups}, "conv2d");
  check_dtype(input, "conv2d");
  if (is_complex_half(input)) {
    return conv2d_by(complex_float(input), complex_float(weight), complex_float(bias), stride,
                     padding, dilation, groups, winograd)
        .to(at::kComplexHalf);
  }
  at::Tensor sum_bias;
  if (bias.has_value() && bias->defined()) sum_bias = in_sum_type(*bias).contiguous();
  const at::MemoryFormat format = memory_format(input, weight);
  at::Tensor output = at::empty({g.N, g.O, g.OH, g.OW}, input.options().memory_format(format));
  if (output.numel() == 0) return output;
  if (g.C == 0) {
    sum_bias.defined() ? output.copy_(sum_bias.view({1, g.O, 1, 1})) : output.zero_();
    return output;
  }
  if (format == at::MemoryFormat::ChannelsLast && takes_depthwise(g, input.scalar_type())) {
    depthwise_forward(g, input.contiguous(format), weight, sum_bias, output);
    return output;
  }
  const at::MemoryFormat computed = compute_format(g, format);
  const at::Tensor dense = input.contiguous(computed);
  at::Tensor result = computed == format ? output : at::empty(output.sizes(), output.options());
  if (computed == at::MemoryFormat::Contiguous && takes_planes(g, input.scalar_type())) {
    planes_forward(g, dense, dense_weight(weight), sum_bias, result);
    return result.contiguous(format);
  }
  if (takes_parts(input.scalar_type(), g.channels_per_group()) &&
      takes_strips(g, at::kBFloat16, computed) &&
      strips_forward_by_parts(g, dense, weight, sum_bias, result, computed)) {
    return result.contiguous(format);
  }
  if (winograd && takes_winograd(g, input.scalar_type())) {
    for (const int64_t n : winograd_forward(g, dense, weight, sum_bias, result, computed))
      result.narrow(0, n, 1).copy_(conv2d_by(dense.narrow(0, n, 1), weight, bias, stride, padding,
                                             dilation, groups, /*winograd=*/false));
    return result.contiguous(format);
  }
  if (computed == at::MemoryFormat::Contiguous && takes_rows(g, input.scalar_type())) {
    rows_forward(g, dense, dense_weight(weight), sum_bias, result);
    return result.contiguous(format);
  }
  const bool by_rows =
      has_few_channels(g) && computed == at::MemoryFormat::Contiguous &&
      (g.column_rows() <= 32 || input.scalar_type() != at::kBFloat16 || !multiplies_bfloat16());
  if (takes_strips(g, input.scalar_type(), computed) && !by_rows) {
    if (!few_pixels_forward(g, dense, weight, sum_bias, result, computed))
      strips_forward(g, dense, weight, sum_bias, result, computed);
    return result.contiguous(format);
  }
  AT_DISPATCH_ALL_TYPES_AND_COMPLEX_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "conv2d", [&] {
        if (computed == at::MemoryFormat::ChannelsLast) {
          forward<scalar_t, true>(g, dense, weight, sum_bias, result);
        } else {
          forward<scalar_t, false>(g, dense, weight, sum_bias, result);
        }
      });
  return result.contiguous(format);
}

at::Tensor conv2d(const at::Tensor& input, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                  at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return conv2d_by(input, weight, bias, stride, padding, dilation, groups, /*winograd=*/true);
}

// --------------------------------------------------------------------------------- grad_input

template <class scalar_t, bool last>
void grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output, const at::Tensor& weight,
                const at::Tensor& result) {
  using sum_t = at::opmath_type<scalar_t>;
  const Panels<scalar_t, last> panels{g};
  const int64_t Og = g.outputs_per_group(), Cg = g.channels_per_group(), cells = g.R * g.S;
  // A task owns some channels of whole images, so that no two threads add to the same element.
  const PixelBlocks images(g, kMinPixels, /*whole_images=*/true);
  const ChannelBlocks channels(Cg, cells, kPanelElements / kMinPixels);
  const int64_t strip = std::min<int64_t>(images.max_pixels(), kMinPixels);

  const std::vector<at::Tensor> weights =
      last ? channels_last_weights(weight, g, channels)
           : std::vector<at::Tensor>{transposed(dense_weight(weight), g.groups, Og, Cg * cells)};
  // Sums of a low-precision type are kept in float32 until all of them are in.
  const bool same_type = std::is_same_v<scalar_t, sum_t>;
  const at::Tensor sums =
      same_type ? result
                : at::empty_like(result, result.options().dtype(sum_type(result.scalar_type())));
  sums.zero_();
  const scalar_t* grad_data = grad_output.const_data_ptr<scalar_t>();
  sum_t* sum_data = sums.mutable_data_ptr<sum_t>();
  const int64_t panel = channels.size * cells * strip;
  const int64_t tasks = images.count() * g.groups * channels.count();
  const int64_t work = images.max_pixels() * channels.size * cells * Og;
  at::parallel_for(0, tasks, grain(work), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::size<sum_t>(panel) + Scratch::size<sum_t>(Og * strip));
    sum_t* columns = scratch.take<sum_t>(panel);
    sum_t* space = scratch.take<sum_t>(Og * strip);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task % channels.count(), group = task / channels.count() % g.groups;
      const Interval c = channels[i], image = images[task / channels.count() / g.groups];
      const int64_t K = (c.end - c.begin) * cells, c0 = group * Cg + c.begin;
      for (int64_t q0 = image.begin; q0 < image.end; q0 += strip) {
        const Interval q{q0, std::min(image.end, q0 + strip)};
        const int64_t P = q.end - q.begin;
        const ColumnBlock block{c0, c0 + c.end - c.begin, q.begin, q.end};
        const Matrix<sum_t> grad = panels.outputs(grad_data, group, q, space);
        if constexpr (last) {
          const sum_t* w = weights[i].template const_data_ptr<sum_t>() + group * Og * K;
          matmul(P, K, Og, grad.data, grad.ld, w, K, columns, K, false);
          DLOPS_SIMD(scatter_columns_last, sum_t, sum_t)(g, block, columns, K, sum_data);
        } else {
          const sum_t* w =
              weights[0].template const_data_ptr<sum_t>() + (group * Cg + c.begin) * cells * Og;
          matmul(K, P, Og, w, Og, grad.data, grad.ld, columns, P, false);
          DLOPS_SIMD(scatter_columns, sum_t, sum_t)(g, block, columns, P, sum_data);
        }
      }
    }
  });
  if (!same_type) result.copy_(sums);
}

at::Tensor conv2d_grad_input_by(const at::Tensor& grad_output, const at::Tensor& weight,
                                at::IntArrayRef input_size, at::IntArrayRef stride,
                                at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                                bool winograd) {
  const Conv2dGeometry g = check_conv2d_grad_input(
      grad_output, weight, input_size, {stride, padding, dilation, groups}, "conv2d_grad_input");
  check_dtype(grad_output, "conv2d_grad_input");
  if (is_complex_half(grad_output)) {
    return conv2d_grad_input_by(complex_float(grad_output), complex_float(weight), input_size,
                                stride, padding, dilation, groups, winograd)
        .to(at::kComplexHalf);
  }
  const at::MemoryFormat format = memory_format(grad_output, weight);
  const at::MemoryFormat computed = compute_format(g, format);
  at::Tensor result = at::empty(input_size, grad_output.options().memory_format(computed));
  if (result.numel() == 0) return result.contiguous(format);
  if (format == at::MemoryFormat::ChannelsLast && takes_depthwise(g, grad_output.scalar_type())) {
    result = at::empty(input_size, grad_output.options().memory_format(format));
    depthwise_grad_input(g, grad_output.contiguous(format), weight, result);
    return result;
  }
  const at::Tensor dense = grad_output.contiguous(computed);
  if (computed == at::MemoryFormat::Contiguous && takes_planes(g, grad_output.scalar_type()) &&
      planes_grad_input(g, dense, dense_weight(weight), result)) {
    return result.contiguous(format);
  }
  if (takes_parts(grad_output.scalar_type(), g.outputs_per_group()) &&
      takes_strips(g, at::kBFloat16, computed) &&
      strips_grad_input_by_parts(g, dense, weight, result, computed)) {
    return result.contiguous(format);
  }
  if (winograd && takes_winograd(g, grad_output.scalar_type())) {
    const std::array<int64_t, 4> size{1, g.C, g.H, g.W};
    for (const int64_t n : winograd_grad_input(g, dense, weight, result, computed))
      result.narrow(0, n, 1).copy_(conv2d_grad_input_by(dense.narrow(0, n, 1), weight, size, stride,
                                                        padding, dilation, groups,
                                                        /*winograd=*/false));
    return result.contiguous(format);
  }
  // A few channels alone are too few columns of a product.
  const bool by_cells = has_few_channels(g) &&
                        (computed == at::MemoryFormat::Contiguous || g.channels_per_group() <= 4) &&
                        sum_type(grad_output.scalar_type()) == grad_output.scalar_type();
  if (takes_strips(g, grad_output.scalar_type(), computed) && !by_cells) {
    if (!few_pixels_grad_input(g, dense, weight, result, computed))
      strips_grad_input(g, dense, weight, result, computed);
    return result.contiguous(format);
  }
  AT_DISPATCH_ALL_TYPES_AND_COMPLEX_AND2(at::kHalf, at::kBFloat16, grad_output.scalar_type(),
                                         "conv2d_grad_input", [&] {
                                           if (computed == at::MemoryFormat::ChannelsLast) {
                                             grad_input<scalar_t, true>(g, dense, weight, result);
                                           } else {
                                             grad_input<scalar_t, false>(g, dense, weight, result);
                                           }
                                         });
  return result.contiguous(format);
}

at::Tensor conv2d_grad_input(const at::Tensor& grad_output, const at::Tensor& weight,
                             at::IntArrayRef input_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return conv2d_grad_input_by(grad_output, weight, input_size, stride, padding, dilation, groups,
                              /*winograd=*/true);
}

// -------------------------------------------------------------------------------- grad_weight

// Independent parts of the sum over pixels: enough to keep threads busy, few enough to stay small.
int64_t pixel_chunks(const Conv2dGeometry& g, int64_t blocks, int64_t tasks_per_chunk) {
  constexpr int64_t kTasks = 32, kPartialElements = 256 * 1024;
  const int64_t weight_elements = std::max<int64_t>(1, g.O * g.column_rows());
  const int64_t wanted = ceil_div(kTasks, std::max<int64_t>(1, tasks_per_chunk));
  return std::max<int64_t>(1, std::min({wanted, blocks, kPartialElements / weight_elements}));
}

// Writes grad_weight from sums that lie as grad_weight's products leave them.
template <class scalar_t, bool last>
void store_weight_sums(const Conv2dGeometry& g, const ChannelBlocks& channels,
                       const at::opmath_type<scalar_t>* sums, const at::Tensor& grad_weight) {
  using sum_t = at::opmath_type<scalar_t>;
  const int64_t Og = g.outputs_per_group(), Cg = g.channels_per_group(), cells = g.R * g.S;
  const auto convert = DLOPS_SIMD(convert_row, sum_t, scalar_t);
  const auto flip = DLOPS_SIMD(transpose, sum_t, scalar_t);
  scalar_t* const to = grad_weight.mutable_data_ptr<scalar_t>();
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t i = 0; i < channels.count(); ++i) {
      const int64_t c0 = channels[i].begin, count = channels[i].end - c0;
      const int64_t first = group * Og * Cg * cells;
      const sum_t* sum = sums + first + c0 * cells * Og;
      if constexpr (last) {
        for (int64_t row = 0; row < Og * cells; ++row)
          convert(sum + row * count, to + first + row * Cg + c0, count);
      } else {
        flip(sum, Og, count * cells, Og, to + first + c0 * cells, Cg * cells);
      }
    }
  }
}

// `result` is dense, in the layout of the computation.
template <class scalar_t, bool last>
void grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output, const at::Tensor& input,
                 const at::Tensor& result) {
  using sum_t = at::opmath_type<scalar_t>;
  const Panels<scalar_t, last> panels{g};
  const int64_t Og = g.outputs_per_group(), Cg = g.channels_per_group(), cells = g.R * g.S;
  const PixelBlocks pixels(g, pixels_per_panel(g));
  const ChannelBlocks channels(Cg, cells, kPanelElements / kMinPixels);
  const int64_t chunks = pixel_chunks(g, pixels.count(), g.groups * channels.count());
  const int64_t tasks = chunks * g.groups * channels.count();

  // One chunk's sums: for each group and channel block a K x Og (channels_last: Og x K) matrix.
  const at::Tensor sums =
      at::empty({chunks, g.O * Cg * cells}, result.options().dtype(sum_type(result.scalar_type())));
  sum_t* sum_data = sums.mutable_data_ptr<sum_t>();
  const scalar_t* input_data = input.const_data_ptr<scalar_t>();
  const scalar_t* grad_data = grad_output.const_data_ptr<scalar_t>();
  const int64_t panel = channels.size * cells * pixels.max_pixels();
  const int64_t flipped = Og * pixels.max_pixels();
  const int64_t work = g.N * g.output_pixels() / chunks * channels.size * cells * Og;
  at::parallel_for(0, tasks, grain(work), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::size<sum_t>(panel) + Scratch::size<sum_t>(flipped));
    sum_t* column_space = scratch.take<sum_t>(panel);
    sum_t* grad_space = scratch.take<sum_t>(flipped);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task % channels.count(), group = task / channels.count() % g.groups;
      const int64_t chunk = task / channels.count() / g.groups;
      const Interval c = channels[i];
      const int64_t K = (c.end - c.begin) * cells;
      sum_t* sum = sum_data + (chunk * g.O + group * Og) * Cg * cells + c.begin * cells * Og;
      std::fill_n(sum, K * Og, sum_t(0));
      for (int64_t b = chunk * pixels.count() / chunks; b < (chunk + 1) * pixels.count() / chunks;
           ++b) {
        const Interval q = pixels[b];
        const int64_t P = q.end - q.begin;
        const Matrix<sum_t> columns = panels.columns(input_data, group, c, q, column_space);
        const Matrix<sum_t> grad = panels.outputs_transposed(grad_data, group, q, grad_space);
        if constexpr (last) {
          matmul(Og, K, P, grad.data, grad.ld, columns.data, columns.ld, sum, K, true);
        } else {
          matmul(K, Og, P, columns.data, columns.ld, grad.data, grad.ld, sum, Og, true);
        }
      }
    }
  });
  add_chunks<sum_t>(sums);
  store_weight_sums<scalar_t, last>(g, channels, sum_data, result);
}

at::Tensor conv2d_grad_weight(const at::Tensor& grad_output, const at::Tensor& input,
                              at::IntArrayRef kernel_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Conv2dGeometry g = check_conv2d_grad_weight(
      grad_output, input, kernel_size, {stride, padding, dilation, groups}, "conv2d_grad_weight");
  check_dtype(grad_output, "conv2d_grad_weight");
  if (is_complex_half(grad_output)) {
    return conv2d_grad_weight(complex_float(grad_output), complex_float(input), kernel_size, stride,
                              padding, dilation, groups)
        .to(at::kComplexHalf);
  }
  const at::MemoryFormat format = memory_format(input, grad_output);
  at::Tensor result = at::empty({g.O, g.channels_per_group(), g.R, g.S},
                                grad_output.options().memory_format(format));
  if (result.numel() == 0) return result;
  if (g.N == 0) return result.zero_();
  if (format == at::MemoryFormat::ChannelsLast && takes_depthwise(g, input.scalar_type())) {
    depthwise_grad_weight(g, grad_output.contiguous(format), input.contiguous(format), result);
    return result;
  }
  const at::MemoryFormat computed = compute_format(g, format);
  const at::Tensor dense_input = input.contiguous(computed);
  const at::Tensor dense_grad = grad_output.contiguous(computed);
  if (computed == at::MemoryFormat::Contiguous && takes_planes(g, input.scalar_type())) {
    if (format == computed) {
      planes_grad_weight(g, dense_grad, dense_input, result);
      return result;
    }
    const at::Tensor plain = at::empty(result.sizes(), result.options());
    planes_grad_weight(g, dense_grad, dense_input, plain);
    return result.copy_(plain);
  }
  if (computed == format && takes_parts(input.scalar_type(), g.channels_per_group()) &&
      parts_grad_weight(g, dense_grad, dense_input, result, format))
    return result;
  if (computed == format && takes_winograd_weight(g, input.scalar_type()) &&
      winograd_grad_weight(g, dense_grad, dense_input, result, format))
    return result;
  if (computed == format && few_pixels_grad_weight(g, dense_grad, dense_input, result, format))
    return result;
  if (computed == at::MemoryFormat::Contiguous && takes_rows_grad_weight(g, input.scalar_type())) {
    rows_grad_weight(g, dense_grad, dense_input, result);
    return result;
  }
  // Rows of columns are copied faster than columns one after another.
  const bool by_rows = has_few_channels(g) && computed == at::MemoryFormat::Contiguous &&
                       (g.column_rows() > 32 || g.outputs_per_group() < 64);
  if (computed == format && takes_pairs(g, input.scalar_type()) &&
      pairs_grad_weight(g, dense_grad, dense_input, result, format))
    return result;
  if (computed == format && takes_strips(g, input.scalar_type(), format) && !by_rows) {
    strips_grad_weight(g, dense_grad, dense_input, result, format);
    return result;
  }
  const at::Tensor plain =
      computed == format ? result : at::empty(result.sizes(), result.options());
  AT_DISPATCH_ALL_TYPES_AND_COMPLEX_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "conv2d_grad_weight", [&] {
        if (computed == at::MemoryFormat::ChannelsLast) {
          grad_weight<scalar_t, true>(g, dense_grad, dense_input, plain);
        } else {
          grad_weight<scalar_t, false>(g, dense_grad, dense_input, plain);
        }
      });
  return computed == format ? result : result.copy_(plain);
}

// ---------------------------------------------------------------------------------- grad_bias

template <class scalar_t>
void grad_bias(const at::Tensor& grad_output, bool last, const at::Tensor& result) {
  using sum_t = at::opmath_type<scalar_t>;
  constexpr int64_t kPixels = kTerms;  // longer chains of roundings cost accuracy
  const int64_t O = grad_output.size(1), pixels = grad_output.numel() / O;
  const int64_t plane = grad_output.size(2) * grad_output.size(3);
  // The sums of some pixels, or of an image, in the order in which they lie in memory.
  const int64_t chunks = last ? ceil_div(pixels, kPixels) : grad_output.size(0);
  const at::Tensor sums =
      at::empty({chunks, O}, result.options().dtype(sum_type(result.scalar_type())));
  const scalar_t* grad = grad_output.const_data_ptr<scalar_t>();
  sum_t* sum_data = sums.mutable_data_ptr<sum_t>();
  if (last) {
    const auto sum = DLOPS_SIMD(sum_rows, scalar_t, sum_t);
    at::parallel_for(0, chunks, grain(kPixels * O), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        sum(grad + i * kPixels * O, std::min(kPixels, pixels - i * kPixels), O, sum_data + i * O);
    });
  } else {
    const auto sum = DLOPS_SIMD(sum_row, scalar_t, sum_t);
    at::parallel_for(0, chunks * O, grain(plane), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) sum_data[i] = sum(grad + i * plane, plane);
    });
  }
  add_chunks<sum_t>(sums);
  DLOPS_SIMD(convert_row, sum_t, scalar_t)(sum_data, result.mutable_data_ptr<scalar_t>(), O);
}

at::Tensor conv2d_grad_bias(const at::Tensor& grad_output) {
  check_dim(grad_output, "grad_output", 4, "conv2d_grad_bias");
  check_dtype(grad_output, "conv2d_grad_bias");
  if (is_complex_half(grad_output))
    return conv2d_grad_bias(complex_float(grad_output)).to(at::kComplexHalf);
  at::Tensor result = at::empty({grad_output.size(1)}, grad_output.options());
  if (grad_output.numel() == 0) return result.zero_();
  const at::MemoryFormat format = grad_output.suggest_memory_format();
  const at::Tensor dense = grad_output.contiguous(format);
  const bool last = format == at::MemoryFormat::ChannelsLast;
  AT_DISPATCH_ALL_TYPES_AND_COMPLEX_AND2(at::kHalf, at::kBFloat16, grad_output.scalar_type(),
                                         "conv2d_grad_bias",
                                         [&] { grad_bias<scalar_t>(dense, last, result); });
  return result;
}

}  // namespace
}  // namespace dlops::cpu

TORCH_LIBRARY_IMPL(dlops, CPU, m) {
  m.impl("conv2d", &dlops::cpu::conv2d);
  m.impl("conv2d_grad_input", &dlops::cpu::conv2d_grad_input);
  m.impl("conv2d_grad_weight", &dlops::cpu::conv2d_grad_weight);
  m.impl("conv2d_grad_bias", &dlops::cpu::conv2d_grad_bias);
}
