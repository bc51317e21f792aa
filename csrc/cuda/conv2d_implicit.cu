// Convolution as implicit GEMM (conv2d_tiles.cuh): on the tensor cores, but for float32 where
// torch's switch does not allow TF32. Results are written where they belong, in either memory
// format.
//
// The gradient of the input is a convolution of grad_output for each residue of the input's rows
// and columns modulo the stride: the rows h = a + stride * i meet the kernel rows r for which a +
// pad - r * dilation is a multiple of the stride, at grad_output's row i + (a + pad - r * dilation)
// / stride. The kernel rows of one residue are evenly spaced, and turned around they make a kernel
// of stride 1. No product is with a zero that the stride put there.
#include <algorithm>
#include <numeric>
#include <vector>

#include "common/cuda_utils.cuh"
#include "cuda/conv2d_implicit.h"
#include "cuda/conv2d_tiles.cuh"

namespace dlops::cuda {
namespace {

// Whether weight (O, C, R, S) is a matrix of such rows already (weight_rows).
bool is_matrix(const Conv2dGeometry& g, const at::Tensor& weight, int64_t channels) {
  return channels == g.channels_per_group() && g.column_rows() % chunk_elements(weight) == 0 &&
         weight.permute({0, 2, 3, 1}).is_contiguous() &&
         reinterpret_cast<intptr_t>(weight.const_data_ptr()) % 16 == 0;
}

// ------------------------------------------------------------------------------- the convolution

// The products of one call: `weight` is a matrix of such rows.
struct Conv2dCall {
  const Conv2dGeometry& g;
  const TileImages& images;
  const at::Tensor& weight;
  const at::Tensor& bias;
  const at::Tensor& output;
  const OutputPlace& place;

  template <class scalar_t, int kPixels, int kOutputs, Copies copies,
            template <class, int, int> class Multiply>
  void launch() const {
    Conv2dTiles<scalar_t, kPixels, kOutputs, copies, Multiply> tiles;
    tiles.conv = tile_conv2d<scalar_t>(g, images);
    tiles.weight = weight.const_data_ptr<scalar_t>();
    tiles.weight_row = static_cast<int>(weight.numel() / g.O);
    tiles.bias = data_or_null<scalar_t>(bias);
    tiles.output = output.mutable_data_ptr<scalar_t>();
    tiles.place = place;
    tiles.order = order_of(place, g.outputs_per_group(), g.output_pixels(), g.OW,
                           chunk_elements(output), tiles.output);
    if constexpr (copies == Copies::boxes) {
      tiles.conv.C = static_cast<int>(whole_boxes(images.channels, images.memory));
      tiles.boxes.pixels = pixel_boxes(g, images, kPixels);
      tiles.boxes.weights =
          map_rows({box_numbers(weight), weight.const_data_ptr(), images.channels, g.R * g.S, g.O,
                    images.channels, weight.numel() / g.O, kOutputs});
    }
    for_each_tile(tiles);
  }
};

// Whether tiles of so many pixels and outputs are enough to occupy the device.
bool occupies(const Conv2dCall& call, int64_t pixels, int64_t outputs) {
  const Conv2dGeometry& g = call.g;
  return g.groups * tiles_of(call.images.memory.size(0) * g.output_pixels(), pixels) *
             tiles_of(g.outputs_per_group(), outputs) >=
         occupying_tiles();
}

// By products of warps, or of threads. Of float64 the largest tiles would take all registers.
template <class scalar_t, template <class, int, int> class Multiply>
void launch_by_size(const Conv2dCall& call, bool large, bool wide) {
  using enum Copies;
  if constexpr (sizeof(scalar_t) < 8) {
    if (wide) return call.launch<scalar_t, 128, 128, chunks, Multiply>();
  }
  if (large) return call.launch<scalar_t, 128, 64, chunks, Multiply>();
  call.launch<scalar_t, 64, 64, chunks, Multiply>();
}

// By products of groups of warps. Whether these are asked for and serve the call.
template <class scalar_t>
bool launch_by_groups(const Conv2dCall& call, bool by_boxes, bool wide) {
  using enum Copies;
  if (by_boxes) {
    wide ? call.launch<scalar_t, 128, 128, boxes, GroupProducts>()
         : call.launch<scalar_t, 128, 64, boxes, GroupProducts>();
    return true;
  }
  if constexpr (sizeof(scalar_t) == 2) {
    if (!asks_for_wgmma()) return false;
    if (wide) {
      call.launch<scalar_t, 128, 128, chunks, GroupProducts>();
    } else {
      call.launch<scalar_t, 128, 64, chunks, GroupProducts>();
    }
    return true;
  }
  return false;
}

// Tiles of every size add up an output's products in the same order. Only where wgmma takes over
// from mma.sync, and boxes from chunks, may the number of images change a result's bits.
void launch_conv2d(const Conv2dCall& call) {
  const bool wide = call.g.outputs_per_group() > 64 && occupies(call, 128, 128);
  const bool large = occupies(call, 128, 64);
  // Boxes by half as many are faster than chunks by tiles enough.
  const bool by_boxes =
      (large || occupies(call, 128, 32)) &&
      takes_boxes(call.g, call.images.memory, call.images.channels, call.images.col);
  with_dtype(call.weight, [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (sizeof(scalar_t) < 8) {
      if ((large || by_boxes) && launch_by_groups<scalar_t>(call, by_boxes, wide)) return;
    }
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (!allows_tf32()) return launch_by_size<float, ThreadProducts>(call, large, wide);
    }
    launch_by_size<scalar_t, WarpProducts>(call, large, wide);
  });
}

// --------------------------------------------------------------------- the gradient of the input

// One axis of the input modulo the stride.
struct Residue {
  int64_t first;               // the first row of the input
  int64_t size;                // how many rows
  int64_t tap, taps, spacing;  // the kernel's rows: from the last to the first, one every `spacing`
  int64_t pad, dilation;       // of the convolution of grad_output

  Residue(int64_t a, int64_t input, int64_t kernel, int64_t stride, int64_t padding,
          int64_t dilation_)
      : first(a), size(ceil_div(input - a, stride)), spacing(stride / std::gcd(stride, dilation_)) {
    const int64_t position = a + padding;
    int64_t lowest = 0;
    while (lowest < std::min(kernel, spacing) && (position - lowest * dilation_) % stride != 0)
      ++lowest;
    taps = lowest < std::min(kernel, spacing) ? ceil_div(kernel - lowest, spacing) : 0;
    tap = lowest + (taps - 1) * spacing;
    pad = taps > 0 ? -(position - tap * dilation_) / stride : 0;
    dilation = dilation_ / std::gcd(stride, dilation_);
  }
};

// What gives the input's pixels of one residue of rows and columns.
struct ResidueConv2d {
  Conv2dGeometry g;
  at::Tensor weight;  // turned around, as rows
  OutputPlace place;
};

// `channels` to a group of grad_output, as tiles read it.
ResidueConv2d residue_conv2d(const Conv2dGeometry& g, const Residue& h, const Residue& w,
                             const at::Tensor& weight, int64_t channels,
                             const at::Tensor& grad_input) {
  Conv2dGeometry turned = g;
  turned.C = g.O;
  turned.H = g.OH;
  turned.W = g.OW;
  turned.O = g.C;
  turned.R = h.taps;
  turned.S = w.taps;
  turned.OH = h.size;
  turned.OW = w.size;
  turned.stride_h = turned.stride_w = 1;
  turned.pad_top = h.pad;
  turned.pad_left = w.pad;
  turned.dilation_h = h.dilation;
  turned.dilation_w = w.dilation;
  const int64_t step_h = weight.stride(2), step_w = weight.stride(3);
  const WeightPlace from{h.tap * step_h + w.tap * step_w,
                         g.outputs_per_group() * weight.stride(0),
                         weight.stride(1),
                         weight.stride(0),
                         -h.spacing * step_h,
                         -w.spacing * step_w};
  return {turned, weight_rows(turned, weight, from, channels),
          OutputPlace{h.first * grad_input.stride(2) + w.first * grad_input.stride(3),
                      grad_input.stride(0), grad_input.stride(1), g.stride_h * grad_input.stride(2),
                      g.stride_w * grad_input.stride(3)}};
}

}  // namespace

void implicit_conv2d(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& output) {
  const at::Tensor dense_bias =
      bias.has_value() && bias->defined() ? bias->contiguous() : at::Tensor();
  if (takes_pointwise(g, input, output))
    return pointwise_conv2d(g, input, weight, dense_bias, output);
  const int64_t channels = whole_chunks(g.channels_per_group(), input);
  const WeightPlace from{0,
                         g.outputs_per_group() * weight.stride(0),
                         weight.stride(0),
                         weight.stride(1),
                         weight.stride(2),
                         weight.stride(3)};
  const at::Tensor matrix =
      is_matrix(g, weight, channels) ? weight : weight_rows(g, weight, from, channels);
  const OutputPlace place{0, output.stride(0), output.stride(1), output.stride(2),
                          output.stride(3)};
  const ImageReader images(input, g.groups);
  for (int64_t n = 0; n < g.N; n += images.at_a_time()) {
    const int64_t count = std::min(images.at_a_time(), g.N - n);
    launch_conv2d(
        {g, images.read(n, count), matrix, dense_bias, output.narrow(0, n, count), place});
  }
}

void implicit_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                         const at::Tensor& weight, const at::Tensor& grad_input) {
  if (takes_pointwise(g, grad_output, grad_input))
    return pointwise_grad_input(g, grad_output, weight, grad_input);
  const int64_t channels = whole_chunks(g.outputs_per_group(), weight);
  const int64_t count_h = std::min(g.stride_h, g.H), count_w = std::min(g.stride_w, g.W);
  std::vector<ResidueConv2d> residues;
  for (int64_t a = 0; a < count_h; ++a) {
    const Residue h(a, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h);
    for (int64_t b = 0; b < count_w; ++b) {
      const Residue w(b, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w);
      if (h.taps > 0 && w.taps > 0)
        residues.push_back(residue_conv2d(g, h, w, weight, channels, grad_input));
    }
  }
  if (static_cast<int64_t>(residues.size()) < count_h * count_w) grad_input.zero_();
  const ImageReader images(grad_output, g.groups);
  for (int64_t n = 0; n < g.N; n += images.at_a_time()) {
    const int64_t count = std::min(images.at_a_time(), g.N - n);
    const TileImages grad = images.read(n, count);
    for (const ResidueConv2d& residue : residues)
      launch_conv2d({residue.g, grad, residue.weight, at::Tensor(), grad_input.narrow(0, n, count),
                     residue.place});
  }
}

}  // namespace dlops::cuda
