// The gradient of a convolution's weight as implicit GEMM (conv2d_grad_weight_tiles.cuh). The
// pixels are cut into parts, which sum side by side; then the parts are added up (parts.cuh).
#include <ATen/ops/empty.h>

#include <algorithm>

#include "common/cuda_utils.cuh"
#include "cuda/conv2d_grad_weight_tiles.cuh"
#include "cuda/conv2d_implicit.h"
#include "cuda/divider.h"
#include "cuda/parts.cuh"
#include "cuda/write_at_once.cuh"

namespace dlops::cuda {
namespace {

// Some weights per index, `width` neighbouring channels in the order of the sums, (groups, O, R, S,
// C), which have `padded` channels.
template <class scalar_t, int width>
struct AddParts {
  using T = at::opmath_type<scalar_t>;
  struct alignas(width * sizeof(T)) Sums {
    T of[width];
  };
  struct alignas(width * sizeof(scalar_t)) Values {
    scalar_t of[width];
  };
  Parts parts;
  int64_t padded;
  Divider packs, S, R;  // packs of channels
  int64_t stride_o, stride_c, stride_r, stride_s;
  bool together;  // packs are neighbours in grad_weight too
  const T* sums;
  scalar_t* grad_weight;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    // Each split leaves the remainder in place of what it divides.
    int64_t c = i;
    int64_t s = packs.split(c);
    c *= width;
    const T* const first = sums + s * padded + c;
    int64_t r = S.split(s);
    const int64_t o = R.split(r);
    Sums sum = *reinterpret_cast<const Sums*>(first);
    for (int64_t part = 1; part < parts.count; ++part) {
      const Sums next = *reinterpret_cast<const Sums*>(first + part * parts.step);
      DLOPS_UNROLL
      for (int j = 0; j < width; ++j) sum.of[j] += next.of[j];
    }
    Values values;
    DLOPS_UNROLL
    for (int j = 0; j < width; ++j) values.of[j] = static_cast<scalar_t>(sum.of[j]);
    scalar_t* const to = grad_weight + o * stride_o + c * stride_c + r * stride_r + s * stride_s;
    if (together) {
      write_at_once(to, values);
    } else {
      DLOPS_UNROLL
      for (int j = 0; j < width; ++j) to[j * stride_c] = values.of[j];
    }
  }
};

constexpr int64_t kPartMultiple = 64;

// How the pixels of a call are cut. It depends on the shapes and layouts alone, and so does the
// order of every sum.
int64_t pixels_of_part(const Conv2dGeometry& g, int64_t pixels, int64_t bytes_of_sums) {
  constexpr int64_t kLeastPixels = 256;
  const int64_t most = std::min(ceil_div(pixels, kLeastPixels), kWorkspaceBytes / bytes_of_sums);
  const int64_t tiles =
      g.groups * tiles_of(g.outputs_per_group(), 128) * tiles_of(g.column_rows(), 128);
  // Rounds of tiles that the device takes, each as long as a part: the fewest in all, and of as
  // many the fewest parts, for their sums are written and read again.
  int64_t best = 1;
  const auto cost = [&](int64_t parts) {
    return ceil_div(tiles * parts, kEnoughTiles) * ceil_div(pixels, parts);
  };
  for (int64_t parts = 2; parts <= std::min(most, kEnoughTiles); ++parts)
    if (cost(parts) * 10 < cost(best) * 9) best = parts;
  return ceil_div(ceil_div(pixels, best), kPartMultiple) * kPartMultiple;
}

// The parts' sums of some images, in `sums`; `adds`: to what is there.
struct GradWeightCall {
  const Conv2dGeometry& g;
  const TileImages& images;
  const TileImages& grad;
  int64_t channels;  // to a group, in sums
  int64_t part_pixels;
  bool adds;
  const at::Tensor& sums;

  template <class scalar_t, int kOutputs, int kColumns, Copies copies,
            template <class, int, int> class Multiply>
  void launch() const {
    using Tiles = GradWeightTiles<scalar_t, kOutputs, kColumns, copies, Multiply>;
    static_assert(kPartMultiple % Tiles::kPixels == 0);
    Tiles tiles;
    tiles.conv = tile_conv2d<scalar_t>(g, images);
    tiles.conv.C = static_cast<int>(channels);
    tiles.grad_output = grad.memory.const_data_ptr<scalar_t>();
    tiles.grad_pixel = grad.col;
    tiles.grad_group = grad.group;
    tiles.sums = sums.mutable_data_ptr<at::opmath_type<scalar_t>>();
    tiles.adds = adds;
    tiles.part_pixels = part_pixels;
    if constexpr (copies == Copies::boxes) {
      tiles.boxes.pixels = pixel_boxes(g, images, Tiles::kPixels);
      tiles.boxes.grad_output = map_rows({box_numbers(grad.memory), grad.memory.const_data_ptr(),
                                          g.groups * grad.channels, 1, tiles.conv.pixels(),
                                          grad.col, grad.col, Tiles::kPixels});
    }
    for_each_tile(tiles);
  }
};

// By products of warps, or of threads. Of float64 the largest tiles would take all registers.
template <class scalar_t, template <class, int, int> class Multiply>
void launch_by_size(const GradWeightCall& call, bool large) {
  using enum Copies;
  if constexpr (sizeof(scalar_t) < 8) {
    if (large) return call.launch<scalar_t, 128, 128, chunks, Multiply>();
  }
  call.launch<scalar_t, 64, 64, chunks, Multiply>();
}

// By products of groups of warps.
template <class scalar_t, Copies copies>
void launch_by_groups(const GradWeightCall& call, bool wide, bool many) {
  if (!wide) return call.launch<scalar_t, 64, 128, copies, GroupProducts>();
  many ? call.launch<scalar_t, 128, 128, copies, GroupProducts>()
       : call.launch<scalar_t, 128, 64, copies, GroupProducts>();
}

// Of so many outputs, tiles of 64 would be mostly empty.
constexpr int64_t kFewOutputs = 8;

void launch_grad_weight(const GradWeightCall& call, bool by_boxes) {
  const Conv2dGeometry& g = call.g;
  const bool wide = g.outputs_per_group() > 64, many = g.column_rows() > 64;
  with_dtype(call.grad.memory, [&](auto zero) {
    using scalar_t = decltype(zero);
    using enum Copies;
    if constexpr (sizeof(scalar_t) == 2) {
      if (by_boxes) return launch_by_groups<scalar_t, boxes>(call, wide, many);
      if (g.outputs_per_group() > kFewOutputs && asks_for_wgmma())
        return launch_by_groups<scalar_t, chunks>(call, wide, many);
    }
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (!allows_tf32()) return launch_by_size<float, ThreadProducts>(call, wide && many);
    }
    launch_by_size<scalar_t, WarpProducts>(call, wide && many);
  });
}

bool sums_by_boxes(const Conv2dGeometry& g, const at::Tensor& input, const ImageReader& images,
                   const ImageReader& grads) {
  return input.element_size() == 2 && g.outputs_per_group() > kFewOutputs &&
         takes_boxes(g, input, images.channels(), images.pixel()) &&
         grads.pixel() >= g.groups * grads.channels() &&
         grads.pixel() < int64_t(1) << 38 &&  // a step of the TMA's
         g.N * g.output_pixels() < int64_t(1) << 31;
}

}  // namespace

void implicit_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& input, const at::Tensor& grad_weight) {
  const ImageReader images(input, g.groups);
  const ImageReader grads(grad_output, g.groups);
  const bool by_boxes = sums_by_boxes(g, input, images, grads);
  const int64_t at_a_time = std::min(images.at_a_time(), grads.at_a_time());
  const int64_t channels = by_boxes ? whole_boxes(images.channels(), input) : images.channels();
  const int64_t count = g.O * g.R * g.S * channels;
  const at::ScalarType sum_type = at::toOpMathType(input.scalar_type());
  const int64_t part_pixels = pixels_of_part(g, at_a_time * g.output_pixels(),
                                             count * static_cast<int64_t>(elementSize(sum_type)));
  const int64_t parts = ceil_div(at_a_time * g.output_pixels(), part_pixels);
  const at::Tensor sums = at::empty({parts, count}, grad_weight.options().dtype(sum_type));
  for (int64_t n = 0; n < g.N; n += at_a_time) {
    const int64_t some = std::min(at_a_time, g.N - n);
    launch_grad_weight(
        {g, images.read(n, some), grads.read(n, some), channels, part_pixels, n > 0, sums},
        by_boxes);
  }
  with_dtype(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    auto* const first = sums.mutable_data_ptr<at::opmath_type<scalar_t>>();
    const Parts left = add_shares(first, parts, count);
    const int64_t C = g.channels_per_group();
    const auto add_parts = [&]<int width>(std::integral_constant<int, width>) {
      const bool together =
          grad_weight.stride(1) == 1 &&
          are_aligned(grad_weight.stride(0) | grad_weight.stride(2) | grad_weight.stride(3), width,
                      {&grad_weight});
      for_each(grad_weight.numel() / width,
               AddParts<scalar_t, width>{left, channels, Divider(C / width), Divider(g.S),
                                         Divider(g.R), grad_weight.stride(0), grad_weight.stride(1),
                                         grad_weight.stride(2), grad_weight.stride(3), together,
                                         first, grad_weight.mutable_data_ptr<scalar_t>()});
    };
    constexpr int width = 16 / sizeof(at::opmath_type<scalar_t>);
    C % width == 0 ? add_parts(std::integral_constant<int, width>{})
                   : add_parts(std::integral_constant<int, 1>{});
  });
}

}  // namespace dlops::cuda
