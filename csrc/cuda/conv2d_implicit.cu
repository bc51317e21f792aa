// Convolution as implicit GEMM on the tensor cores (implicit_gemm.cuh): bfloat16, float16, and
// float32 where torch's switch allows TF32. Factors that are not channels_last are reordered first;
// results are written where they belong, in either memory format.
//
// The gradient of the input is a convolution of grad_output for each residue of the input's rows
// and columns modulo the stride: the rows h = a + stride * i meet the kernel rows r for which a +
// pad - r * dilation is a multiple of the stride, at grad_output's row i + (a + pad - r * dilation)
// / stride. The kernel rows of one residue are evenly spaced, and turned around they make a kernel
// of stride 1. No product is with a zero that the stride put there.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdlib>
#include <numeric>
#include <string_view>
#include <vector>

#include "common/cuda_utils.cuh"
#include "cuda/conv2d.h"
#include "cuda/implicit_gemm.cuh"

#if defined(__CUDACC__)
#include <ATen/cuda/CUDAContext.h>
#endif

namespace dlops::cuda {
namespace {

bool has_tensor_cores() {
#if defined(__CUDACC__)
  return at::cuda::getCurrentDeviceProperties()->major >= 8;
#else
  return true;
#endif
}

bool has_dtype(const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  return dtype == at::kBFloat16 || dtype == at::kHalf ||
         (dtype == at::kFloat && at::globalContext().allowTF32CuBLAS());
}

// Whether every position within an image, and every row of the column matrix, is a 32-bit number.
bool fits(const Conv2dGeometry& g) {
  constexpr int64_t limit = 1 << 28;
  const auto axis = [](int64_t size, int64_t outputs, int64_t stride, int64_t pad, int64_t dilation,
                       int64_t kernel) {
    return size < limit && outputs < limit && pad < limit && stride < limit && dilation < limit &&
           kernel < limit && outputs * stride < limit && kernel * dilation < limit;
  };
  return axis(g.H, g.OH, g.stride_h, g.pad_top, g.dilation_h, g.R) &&
         axis(g.W, g.OW, g.stride_w, g.pad_left, g.dilation_w, g.S) && g.C < limit && g.O < limit &&
         g.R * g.S < limit && g.column_rows() < limit && g.R * g.S * g.outputs_per_group() < limit;
}

at::Tensor channels_last(const at::Tensor& tensor) {
  return tensor.contiguous(at::MemoryFormat::ChannelsLast);
}

// Calls f(scalar_t()).
template <class F>
void with_dtype(const at::Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return f(c10::BFloat16());
    case at::kHalf:
      return f(c10::Half());
    default:
      return f(float());
  }
}

// Whether runs of `channels` elements from these tensors can be copied by 16 bytes.
bool copies_wide(int64_t channels, std::initializer_list<at::Tensor> tensors) {
  intptr_t all = 0;
  for (const at::Tensor& tensor : tensors)
    all |= reinterpret_cast<intptr_t>(tensor.const_data_ptr()) | channels * tensor.element_size();
  return all % 16 == 0;
}

template <class scalar_t>
TensorCoreConv2d<scalar_t> tensor_core_conv2d(const Conv2dGeometry& g, const at::Tensor& input) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {input.const_data_ptr<scalar_t>(),
          g.N,
          narrow(g.H),
          narrow(g.W),
          narrow(g.channels_per_group()),
          narrow(g.groups),
          narrow(g.outputs_per_group()),
          narrow(g.R),
          narrow(g.S),
          narrow(g.OH),
          narrow(g.OW),
          narrow(g.stride_h),
          narrow(g.stride_w),
          narrow(g.pad_top),
          narrow(g.pad_left),
          narrow(g.dilation_h),
          narrow(g.dilation_w)};
}

// ------------------------------------------------------------------------------- the convolution

// Enough tiles to occupy the largest devices, where there are as many.
constexpr int64_t kEnoughTiles = 264;

// `weight` is (groups, O, R, S, C) in memory.
void launch_conv2d(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                   const at::Tensor& bias, const at::Tensor& output, const OutputPlace& place) {
  with_dtype(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto launch = [&](auto tiles) {
      tiles.conv = tensor_core_conv2d<scalar_t>(g, input);
      tiles.weight = weight.const_data_ptr<scalar_t>();
      tiles.bias = data_or_null<scalar_t>(bias);
      tiles.output = output.mutable_data_ptr<scalar_t>();
      tiles.place = place;
      for_each_tile(tiles);
    };
    const int64_t outputs = g.outputs_per_group();
    const int64_t large_tiles =
        g.groups * tiles_of(g.N * g.output_pixels(), 128) * tiles_of(outputs, 128);
    if (!copies_wide(g.channels_per_group(), {input, weight})) {
      launch(Conv2dTiles<scalar_t, 128, 64, sizeof(scalar_t)>());
    } else if (outputs > 64 && large_tiles >= kEnoughTiles) {
      launch(Conv2dTiles<scalar_t, 128, 128, 16>());
    } else if (large_tiles >= kEnoughTiles) {
      launch(Conv2dTiles<scalar_t, 128, 64, 16>());
    } else {
      launch(Conv2dTiles<scalar_t, 64, 64, 16>());
    }
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

// One weight of (groups, C, taps, taps, O) per index.
template <class scalar_t>
struct WeightOfResidue {
  Residue h, w;
  int64_t channels, outputs;                       // of a group
  int64_t stride_o, stride_c, stride_r, stride_s;  // of weight (O, C, R, S)
  const scalar_t* weight;
  scalar_t* to;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t o = i % outputs;
    int64_t rest = i / outputs;
    const int64_t s = w.tap - rest % w.taps * w.spacing;
    rest /= w.taps;
    const int64_t r = h.tap - rest % h.taps * h.spacing;
    rest /= h.taps;
    const int64_t c = rest % channels, group = rest / channels;
    to[i] = weight[(group * outputs + o) * stride_o + c * stride_c + r * stride_r + s * stride_s];
  }
};

void grad_input_of_residue(const Conv2dGeometry& g, const Residue& h, const Residue& w,
                           const at::Tensor& grad_output, const at::Tensor& weight,
                           const at::Tensor& grad_input) {
  const int64_t count = g.C * h.taps * w.taps * g.outputs_per_group();
  const at::Tensor turned = at::empty({count}, weight.options());
  with_dtype(weight, [&](auto zero) {
    using scalar_t = decltype(zero);
    for_each(count, WeightOfResidue<scalar_t>{h, w, g.channels_per_group(), g.outputs_per_group(),
                                              weight.stride(0), weight.stride(1), weight.stride(2),
                                              weight.stride(3), weight.const_data_ptr<scalar_t>(),
                                              turned.mutable_data_ptr<scalar_t>()});
  });
  Conv2dGeometry turned_around = g;
  turned_around.C = g.O;
  turned_around.H = g.OH;
  turned_around.W = g.OW;
  turned_around.O = g.C;
  turned_around.R = h.taps;
  turned_around.S = w.taps;
  turned_around.OH = h.size;
  turned_around.OW = w.size;
  turned_around.stride_h = turned_around.stride_w = 1;
  turned_around.pad_top = h.pad;
  turned_around.pad_left = w.pad;
  turned_around.dilation_h = h.dilation;
  turned_around.dilation_w = w.dilation;
  launch_conv2d(turned_around, grad_output, turned, at::Tensor(), grad_input,
                OutputPlace{h.first * grad_input.stride(2) + w.first * grad_input.stride(3),
                            grad_input.stride(0), grad_input.stride(1),
                            g.stride_h * grad_input.stride(2), g.stride_w * grad_input.stride(3)});
}

// -------------------------------------------------------------------- the gradient of the weight

// One weight per index, in the order of the sums: (groups, O, R, S, C).
template <class scalar_t>
struct AddParts {
  int64_t count, parts;
  int64_t channels, R, S;
  int64_t stride_o, stride_c, stride_r, stride_s;
  const float* sums;
  scalar_t* grad_weight;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    float sum = sums[i];
    for (int64_t part = 1; part < parts; ++part) sum += sums[part * count + i];
    const int64_t c = i % channels;
    int64_t rest = i / channels;
    const int64_t s = rest % S;
    rest /= S;
    const int64_t r = rest % R, o = rest / R;
    grad_weight[o * stride_o + c * stride_c + r * stride_r + s * stride_s] =
        static_cast<scalar_t>(sum);
  }
};

template <class scalar_t, class Tiles>
void launch_grad_weight(Tiles tiles, const Conv2dGeometry& g, const at::Tensor& grad_output,
                        const at::Tensor& input, const at::Tensor& grad_weight) {
  constexpr int64_t kLeastPixels = 256;  // of a part
  const int64_t pixels = g.N * g.output_pixels(), count = grad_weight.numel();
  tiles.conv = tensor_core_conv2d<scalar_t>(g, input);
  tiles.grad_output = grad_output.const_data_ptr<scalar_t>();
  // The cut depends on the shapes alone, and so does the order of every sum.
  const int64_t most =
      std::min(ceil_div(pixels, kLeastPixels), kWorkspaceBytes / (count * int64_t(sizeof(float))));
  const int64_t large_tiles =
      g.groups * tiles_of(g.outputs_per_group(), 128) * tiles_of(g.column_rows(), 128);
  const int64_t parts = std::max<int64_t>(1, std::min(kEnoughTiles / large_tiles, most));
  tiles.part_pixels = ceil_div(ceil_div(pixels, parts), Tiles::kPixels) * Tiles::kPixels;
  const at::Tensor sums =
      at::empty({tiles.parts(), count}, grad_weight.options().dtype(at::kFloat));
  tiles.sums = sums.mutable_data_ptr<float>();
  for_each_tile(tiles);
  for_each(count, AddParts<scalar_t>{
                      count, tiles.parts(), g.channels_per_group(), g.R, g.S, grad_weight.stride(0),
                      grad_weight.stride(1), grad_weight.stride(2), grad_weight.stride(3),
                      sums.const_data_ptr<float>(), grad_weight.mutable_data_ptr<scalar_t>()});
}

}  // namespace

bool asks_for_implicit_gemm() {
  const char* const choice = std::getenv("DLOPS_CUDA_CONV2D");
  const std::string_view value = choice == nullptr ? "im2col" : choice;
  TORCH_CHECK_VALUE(value == "im2col" || value == "implicit_gemm",
                    "DLOPS_CUDA_CONV2D must be im2col (the default) or implicit_gemm, got ", value);
  return value == "implicit_gemm";
}

bool takes_implicit_grad_input(const at::Tensor& tensor, const Conv2dGeometry& g) {
  // Each residue is a launch or two.
  constexpr int64_t kMostResidues = 64;
  return takes_implicit_gemm(tensor, g) &&
         std::min(g.stride_h, g.H) * std::min(g.stride_w, g.W) <= kMostResidues;
}

bool takes_implicit_gemm(const at::Tensor& tensor, const Conv2dGeometry& g) {
  return asks_for_implicit_gemm() && has_dtype(tensor) && fits(g) && has_tensor_cores();
}

void implicit_conv2d(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& output) {
  const at::Tensor dense_bias =
      bias.has_value() && bias->defined() ? bias->contiguous() : at::Tensor();
  launch_conv2d(
      g, channels_last(input), weight.permute({0, 2, 3, 1}).contiguous(), dense_bias, output,
      OutputPlace{0, output.stride(0), output.stride(1), output.stride(2), output.stride(3)});
}

void implicit_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                         const at::Tensor& weight, const at::Tensor& grad_input) {
  const at::Tensor grad = channels_last(grad_output);
  std::vector<Residue> rows, cols;
  for (int64_t a = 0; a < std::min(g.stride_h, g.H); ++a)
    rows.emplace_back(a, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h);
  for (int64_t b = 0; b < std::min(g.stride_w, g.W); ++b)
    cols.emplace_back(b, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w);
  const auto has_taps = [](const Residue& residue) { return residue.taps > 0; };
  if (!std::ranges::all_of(rows, has_taps) || !std::ranges::all_of(cols, has_taps))
    grad_input.zero_();
  for (const Residue& h : rows)
    for (const Residue& w : cols)
      if (has_taps(h) && has_taps(w)) grad_input_of_residue(g, h, w, grad, weight, grad_input);
}

void implicit_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& input, const at::Tensor& grad_weight) {
  const at::Tensor grad = channels_last(grad_output), images = channels_last(input);
  const bool wide =
      copies_wide(g.channels_per_group(), {images}) && copies_wide(g.outputs_per_group(), {grad});
  with_dtype(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto launch = [&](auto tiles) {
      launch_grad_weight<scalar_t>(tiles, g, grad, images, grad_weight);
    };
    if (!wide) {
      launch(GradWeightTiles<scalar_t, 64, 64, sizeof(scalar_t)>());
    } else if (g.outputs_per_group() > 64 && g.column_rows() > 64) {
      launch(GradWeightTiles<scalar_t, 128, 128, 16>());
    } else {
      launch(GradWeightTiles<scalar_t, 64, 64, 16>());
    }
  });
}

}  // namespace dlops::cuda
