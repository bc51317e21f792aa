// Depthwise convolution (one input channel a group) on CUDA: no columns and no matrix product,
// which would have a single column or row. Each index makes a pack of outputs (windows.cuh) from
// what its windows hold; the gradient of the weight is summed over parts of the pixels, then over
// the parts (parts.cuh).
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "common/cuda_utils.cuh"
#include "cuda/conv2d.h"
#include "cuda/conv2d_depthwise_3x3.cuh"
#include "cuda/conv2d_depthwise_weight.cuh"
#include "cuda/conv2d_implicit.h"
#include "cuda/parts.cuh"
#include "cuda/windows.cuh"

namespace dlops::cuda {
namespace {

// One pack of outputs per index. Packs are of one value where a channel has several outputs.
template <class scalar_t, class Packs>
struct Forward {
  using T = at::opmath_type<scalar_t>;
  Conv2dGeometry g;
  Packs outputs;
  DepthwiseWeight<scalar_t, Packs> weight;
  Divider multiplier;  // the outputs of a channel
  const scalar_t* input;
  const scalar_t* bias;  // or null
  scalar_t* output;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Pack at = outputs[i];
    const auto channels = weight.channels_of(at);
    const int64_t pixels = g.H * g.W;
    const int64_t step = Packs::channels_last ? g.C : 1;
    const scalar_t* const plane =
        input + (Packs::channels_last ? at.image * pixels * g.C + multiplier(at.channel)
                                      : multiplier(at.image) * pixels);
    T sums[Packs::width] = {};
    typename Packs::template Values<scalar_t> values{};
    for (int64_t r = 0; r < g.R; ++r) {
      const int64_t ih = g.input_row(at.row, r);
      if (!g.row_inside(ih)) continue;
      for (int64_t s = 0; s < g.S; ++s) {
        const int64_t iw = g.input_col(at.col, s);
        if (!g.col_inside(iw)) continue;
        outputs.load(values, plane + (ih * g.W + iw) * step, at, pixels);
        const auto taps = weight.load(channels, r * g.S + s);
        for (int j = 0; j < Packs::width; ++j)
          sums[j] += static_cast<T>(values.of[j]) * static_cast<T>(taps.of[j]);
      }
    }
    for (int j = 0; j < Packs::width; ++j) {
      if (bias != nullptr) sums[j] += static_cast<T>(bias[channels.of[j]]);
      values.of[j] = static_cast<scalar_t>(sums[j]);
    }
    const int64_t to =
        outputs.start(at, g.OH * g.OW) + (at.row * g.OW + at.col) * outputs.pixel_step();
    outputs.store(values, output + to, at, g.OH * g.OW);
  }
};

// One pack of inputs per index, of one value where a channel has several outputs.
template <class scalar_t, class Packs>
struct GradInput {
  using T = at::opmath_type<scalar_t>;
  Conv2dGeometry g;
  Packs inputs;
  WindowAxis rows, cols;
  DepthwiseWeight<scalar_t, Packs> weight;
  int64_t multiplier;
  const scalar_t* grad_output;
  scalar_t* grad_input;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Pack at = inputs[i];
    const int64_t pixels = g.OH * g.OW;
    T sums[Packs::width] = {};
    typename Packs::template Values<scalar_t> values{};
    for (int64_t m = 0; m < multiplier; ++m) {
      // The m-th output of each channel.
      Pack from = at;
      (Packs::channels_last ? from.channel : from.image) *= multiplier;
      (Packs::channels_last ? from.channel : from.image) += m;
      const auto channels = weight.channels_of(from);
      const int64_t step = Packs::channels_last ? g.O : 1;
      const scalar_t* const plane =
          grad_output +
          (Packs::channels_last ? at.image * pixels * g.O + from.channel : from.image * pixels);
      rows.for_each_window(at.row + g.pad_top, [&](int64_t oh, int64_t r) {
        cols.for_each_window(at.col + g.pad_left, [&](int64_t ow, int64_t s) {
          inputs.load(values, plane + (oh * g.OW + ow) * step, at, pixels);
          const auto taps = weight.load(channels, r * g.S + s);
          for (int j = 0; j < Packs::width; ++j)
            sums[j] += static_cast<T>(values.of[j]) * static_cast<T>(taps.of[j]);
        });
      });
    }
    for (int j = 0; j < Packs::width; ++j) values.of[j] = static_cast<scalar_t>(sums[j]);
    const int64_t to = inputs.start(at, g.H * g.W) + (at.row * g.W + at.col) * inputs.pixel_step();
    inputs.store(values, grad_input + to, at, g.H * g.W);
  }
};

// The sums of `width` weights (tap, neighbouring outputs) over one part of the pixels per index, in
// channels_last: neighbouring indices read neighbouring channels. `width` is 1 where a channel has
// several outputs.
template <class scalar_t, int width>
struct PartOfGradWeight {
  using T = at::opmath_type<scalar_t>;
  struct alignas(width * sizeof(scalar_t)) Values {
    scalar_t of[width];
  };
  Conv2dGeometry g;
  int64_t part_pixels;
  Divider packs, taps, S, OH, OW, multiplier;  // packs of outputs
  const scalar_t* grad_output;
  const scalar_t* input;
  T* sums;  // (parts, taps, O)

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    int64_t o = i;
    int64_t s = packs.split(o);
    o *= width;
    const int64_t part = taps.split(s), r = S.split(s), c = multiplier(o);
    const int64_t all = g.N * g.OH * g.OW, first = part * part_pixels;
    const int64_t end = first + part_pixels < all ? first + part_pixels : all;
    int64_t ow = first;
    int64_t oh = OW.split(ow);
    int64_t n = OH.split(oh);
    T own[width] = {};
    for (int64_t pixel = first; pixel < end; ++pixel) {
      const int64_t ih = g.input_row(oh, r), iw = g.input_col(ow, s);
      if (g.row_inside(ih) && g.col_inside(iw)) {
        const Values grad = *reinterpret_cast<const Values*>(grad_output + pixel * g.O + o);
        const Values image =
            *reinterpret_cast<const Values*>(input + ((n * g.H + ih) * g.W + iw) * g.C + c);
        DLOPS_UNROLL
        for (int j = 0; j < width; ++j)
          own[j] += static_cast<T>(grad.of[j]) * static_cast<T>(image.of[j]);
      }
      if (++ow < g.OW) continue;
      ow = 0;
      if (++oh < g.OH) continue;
      oh = 0;
      ++n;
    }
    DLOPS_UNROLL
    for (int j = 0; j < width; ++j) sums[i * width + j] = own[j];
  }
};

// One weight per index, in the order of the sums.
template <class scalar_t>
struct AddParts {
  using T = at::opmath_type<scalar_t>;
  Parts parts;
  Divider outputs, S;
  int64_t stride_o, stride_r, stride_s;  // of grad_weight
  const T* sums;
  scalar_t* grad_weight;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    T sum(0);
    for (int64_t part = 0; part < parts.count; ++part) sum += sums[part * parts.step + i];
    int64_t o = i;
    int64_t s = outputs.split(o);
    const int64_t r = S.split(s);
    grad_weight[o * stride_o + r * stride_r + s * stride_s] = static_cast<scalar_t>(sum);
  }
};

// ------------------------------------------------------------------------------------ launchers

at::Tensor taps_first(const at::Tensor& weight) {
  return weight.permute({2, 3, 1, 0}).contiguous();
}

// Calls f(Packs) for images of C channels and H x W pixels in the memory format of `result`.
template <class scalar_t, class F>
void with_packs(const Conv2dGeometry& g, int64_t C, int64_t H, int64_t W, const at::Tensor& result,
                std::initializer_list<const at::Tensor*> data, const F& f) {
  constexpr int width = std::min<int>(8, 16 / sizeof(scalar_t));
  const bool one_each = g.outputs_per_group() == 1;
  if (!result.is_contiguous(at::MemoryFormat::ChannelsLast)) {
    one_each ? f(Packs<4, false>(g.N, C, H, W)) : f(Packs<1, false>(g.N, C, H, W));
  } else if (one_each && are_aligned(C, width, data)) {
    f(Packs<width, true>(g.N, C, H, W));
  } else {
    f(Packs<1, true>(g.N, C, H, W));
  }
}

// In the memory format of `result`.
at::Tensor like(const at::Tensor& tensor, const at::Tensor& result) {
  return tensor.contiguous(result.is_contiguous(at::MemoryFormat::ChannelsLast)
                               ? at::MemoryFormat::ChannelsLast
                               : at::MemoryFormat::Contiguous);
}

// By the kernels of conv2d_depthwise_3x3.cuh, and whether it could: `g` is that of grad_output
// where the taps are turned.
template <class scalar_t>
bool launch_3x3(const Conv2dGeometry& g, const at::Tensor& images, const at::Tensor& taps,
                const TapOrder& order, const at::Tensor& bias, const at::Tensor& output) {
  const auto launch = [&](auto packs, auto stride) {
    using P = decltype(packs);
    using Rows = Depthwise3x3<scalar_t, P, decltype(stride)::value>;
    const P outputs(g.N, g.O, g.OH, ceil_div(g.OW, Rows::kAcross));
    for_each(outputs.count(), Rows{g,
                                   outputs,
                                   {taps.const_data_ptr<scalar_t>(), Divider(g.O)},
                                   order,
                                   images.const_data_ptr<scalar_t>(),
                                   data_or_null<scalar_t>(bias),
                                   output.mutable_data_ptr<scalar_t>()});
  };
  const auto launch_packs = [&](auto stride) {
    with_packs<scalar_t>(g, g.O, g.OH, g.OW, output, {&images, &taps, &output},
                         [&](auto packs) { launch(packs, stride); });
    return true;
  };
  if (is_3x3(g, 1)) return launch_packs(std::integral_constant<int, 1>{});
  if (is_3x3(g, 2)) return launch_packs(std::integral_constant<int, 2>{});
  return false;
}

// The sums of parts (parts, taps, O), by tiles.
template <class scalar_t, int stride>
at::Tensor sum_3x3(const Conv2dGeometry& g, const at::Tensor& grad, const at::Tensor& images) {
  using Tiles = DepthwiseGradWeightTiles<scalar_t, stride>;
  const int64_t slabs = ceil_div(g.O, Tiles::kChannels), rows = g.N * g.OH;
  // The cut depends on the shapes alone, and so does the order of every sum.
  const int64_t most = ceil_div(4 * kEnoughTiles, slabs);
  const int64_t part_rows = std::max<int64_t>(ceil_div(rows, most), Tiles::kLanes);
  const int64_t parts = ceil_div(rows, part_rows);
  const at::Tensor sums =
      at::empty({parts, 9 * g.O}, images.options().dtype(at::toOpMathType(images.scalar_type())));
  for_each_tile(Tiles{g, part_rows, parts, grad.const_data_ptr<scalar_t>(),
                      images.const_data_ptr<scalar_t>(),
                      sums.mutable_data_ptr<at::opmath_type<scalar_t>>()});
  return sums;
}

// The same of any kernel.
template <class scalar_t>
at::Tensor sum_of_parts(const Conv2dGeometry& g, const at::Tensor& grad, const at::Tensor& images) {
  using T = at::opmath_type<scalar_t>;
  // Enough sums to occupy the largest devices, of enough pixels each.
  constexpr int64_t kEnough = 1 << 18, kLeastPixels = 64, kMostParts = 1024;
  const int64_t pixels = g.N * g.output_pixels(), weights = g.O * g.R * g.S;
  const int64_t most =
      std::min({ceil_div(kEnough, weights), ceil_div(pixels, kLeastPixels), kMostParts});
  const int64_t part_pixels = ceil_div(pixels, most), parts = ceil_div(pixels, part_pixels);
  const at::Tensor sums =
      at::empty({parts, weights}, images.options().dtype(at::toOpMathType(images.scalar_type())));
  const auto sum_parts = [&]<int width>(std::integral_constant<int, width>) {
    for_each(
        parts * weights / width,
        PartOfGradWeight<scalar_t, width>{
            g, part_pixels, Divider(g.O / width), Divider(g.R * g.S), Divider(g.S), Divider(g.OH),
            Divider(g.OW), Divider(g.outputs_per_group()), grad.const_data_ptr<scalar_t>(),
            images.const_data_ptr<scalar_t>(), sums.mutable_data_ptr<T>()});
  };
  constexpr int width = 16 / sizeof(scalar_t);
  g.outputs_per_group() == 1 && are_aligned(g.O, width, {&grad, &images})
      ? sum_parts(std::integral_constant<int, width>{})
      : sum_parts(std::integral_constant<int, 1>{});
  return sums;
}

}  // namespace

bool takes_depthwise(const at::Tensor& tensor, const Conv2dGeometry& g) {
  return asks_for_implicit_gemm() && g.channels_per_group() == 1 && g.groups > 1 &&
         at::isFloatingType(tensor.scalar_type());
}

void depthwise_conv2d(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias, const at::Tensor& output) {
  const at::Tensor images = like(input, output), taps = taps_first(weight);
  const at::Tensor dense_bias =
      bias.has_value() && bias->defined() ? bias->contiguous() : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "conv2d", [&] {
    if (launch_3x3<scalar_t>(g, images, taps, {0, 1}, dense_bias, output)) return;
    with_packs<scalar_t>(g, g.O, g.OH, g.OW, output, {&images, &taps, &output}, [&](auto packs) {
      using P = decltype(packs);
      for_each(packs.count(), Forward<scalar_t, P>{g,
                                                   packs,
                                                   {taps.const_data_ptr<scalar_t>(), Divider(g.O)},
                                                   Divider(g.outputs_per_group()),
                                                   images.const_data_ptr<scalar_t>(),
                                                   data_or_null<scalar_t>(dense_bias),
                                                   output.mutable_data_ptr<scalar_t>()});
    });
  });
}

void depthwise_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& weight, const at::Tensor& grad_input) {
  const at::Tensor grad = like(grad_output, grad_input), taps = taps_first(weight);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_output.scalar_type(), "conv2d_grad_input", [&] {
        if (g.stride_h == 1 && g.stride_w == 1 &&
            launch_3x3<scalar_t>(turned_3x3(g), grad, taps, {8, -1}, at::Tensor(), grad_input))
          return;
        with_packs<scalar_t>(
            g, g.C, g.H, g.W, grad_input, {&grad, &taps, &grad_input}, [&](auto packs) {
              using P = decltype(packs);
              for_each(packs.count(),
                       GradInput<scalar_t, P>{g,
                                              packs,
                                              WindowAxis(g.R, g.stride_h, g.dilation_h, g.OH),
                                              WindowAxis(g.S, g.stride_w, g.dilation_w, g.OW),
                                              {taps.const_data_ptr<scalar_t>(), Divider(g.O)},
                                              g.outputs_per_group(),
                                              grad.const_data_ptr<scalar_t>(),
                                              grad_input.mutable_data_ptr<scalar_t>()});
            });
      });
}

void depthwise_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                           const at::Tensor& input, const at::Tensor& grad_weight) {
  const at::Tensor grad = grad_output.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor images = input.contiguous(at::MemoryFormat::ChannelsLast);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "conv2d_grad_weight", [&] {
        using T = at::opmath_type<scalar_t>;
        constexpr int width = DepthwiseGradWeightTiles<scalar_t, 1>::kWidth;
        const bool fits = are_aligned(g.O, width, {&grad, &images});
        const at::Tensor sums = fits && is_3x3(g, 1)   ? sum_3x3<scalar_t, 1>(g, grad, images)
                                : fits && is_3x3(g, 2) ? sum_3x3<scalar_t, 2>(g, grad, images)
                                                       : sum_of_parts<scalar_t>(g, grad, images);
        const int64_t weights = grad_weight.numel();
        const Parts left = add_shares(sums.mutable_data_ptr<T>(), sums.size(0), weights);
        for_each(weights, AddParts<scalar_t>{left, Divider(g.O), Divider(g.S),
                                             grad_weight.stride(0), grad_weight.stride(2),
                                             grad_weight.stride(3), sums.const_data_ptr<T>(),
                                             grad_weight.mutable_data_ptr<scalar_t>()});
      });
}

}  // namespace dlops::cuda
