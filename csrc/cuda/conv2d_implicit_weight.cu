// The gradient of a convolution's weight as implicit GEMM (conv2d_grad_weight_tiles.cuh). The
// pixels are cut into parts, which sum side by side; then the parts are added up (parts.cuh).
#include <ATen/ops/empty.h>

#include <algorithm>

#include "common/cuda_utils.cuh"
#include "cuda/conv2d_grad_weight_tiles.cuh"
#include "cuda/conv2d_implicit.h"
#include "cuda/divider.h"
#include "cuda/parts.cuh"

namespace dlops::cuda {
namespace {

// One weight per index, in the order of the sums, (groups, O, R, S, C), which have `padded`
// channels.
template <class scalar_t>
struct AddParts {
  Parts parts;
  int64_t padded;
  Divider channels, S, R;
  int64_t stride_o, stride_c, stride_r, stride_s;
  const at::opmath_type<scalar_t>* sums;
  scalar_t* grad_weight;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    // Each split leaves the remainder in place of what it divides.
    int64_t c = i;
    int64_t s = channels.split(c);
    const auto* const first = sums + s * padded + c;
    int64_t r = S.split(s);
    const int64_t o = R.split(r);
    at::opmath_type<scalar_t> sum = first[0];
    for (int64_t part = 1; part < parts.count; ++part) sum += first[part * parts.step];
    grad_weight[o * stride_o + c * stride_c + r * stride_r + s * stride_s] =
        static_cast<scalar_t>(sum);
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
void launch_by_size(const GradWeightCall& call, Copies copies, bool large) {
  using enum Copies;
  if (copies == gathered) return call.launch<scalar_t, 64, 64, gathered, Multiply>();
  if constexpr (sizeof(scalar_t) < 8) {
    if (large) return call.launch<scalar_t, 128, 128, chunks, Multiply>();
  }
  call.launch<scalar_t, 64, 64, chunks, Multiply>();
}

void launch_grad_weight(const GradWeightCall& call, Copies copies) {
  const Conv2dGeometry& g = call.g;
  const bool wide = g.outputs_per_group() > 64, many = g.column_rows() > 64;
  with_dtype(call.grad.memory, [&](auto zero) {
    using scalar_t = decltype(zero);
    using enum Copies;
    if constexpr (sizeof(scalar_t) == 2) {
      if (!wide && asks_for_wgmma() && g.outputs_per_group() > 16) {
        if (copies == boxes) return call.launch<scalar_t, 64, 128, boxes, GroupProducts>();
        if (copies == chunks) return call.launch<scalar_t, 64, 128, chunks, GroupProducts>();
      }
      if (copies == boxes && asks_for_tall_tiles() && g.column_rows() >= 192)
        return call.launch<scalar_t, 128, 256, boxes, GroupProducts>();
      if (copies == boxes && many) return call.launch<scalar_t, 128, 128, boxes, GroupProducts>();
      if (copies == boxes) return call.launch<scalar_t, 128, 64, boxes, GroupProducts>();
      if (wide && copies == chunks && asks_for_wgmma()) {
        if (many) return call.launch<scalar_t, 128, 128, chunks, GroupProducts>();
        return call.launch<scalar_t, 128, 64, chunks, GroupProducts>();
      }
    }
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (!allows_tf32()) return launch_by_size<float, ThreadProducts>(call, copies, wide && many);
    }
    launch_by_size<scalar_t, WarpProducts>(call, copies, wide && many);
  });
}

// How the columns come.
Copies copies_of(const Conv2dGeometry& g, const at::Tensor& input, const ImageReader& images,
                 const ImageReader& grads) {
  if (gathers(input, g)) return Copies::gathered;
  const int64_t outputs = g.outputs_per_group();
  const bool by_boxes = input.element_size() == 2 && outputs > 16 &&
                        takes_boxes(g, input, images.channels(), images.pixel()) &&
                        grads.pixel() >= g.groups * grads.channels() &&
                        grads.pixel() < int64_t(1) << 38 &&  // a step of the TMA's
                        g.N * g.output_pixels() < int64_t(1) << 31;
  return by_boxes ? Copies::boxes : Copies::chunks;
}

}  // namespace

void implicit_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& input, const at::Tensor& grad_weight) {
  const ImageReader images(input, g.groups, gathers(input, g));
  const ImageReader grads(grad_output, g.groups);
  const Copies copies = copies_of(g, input, images, grads);
  const int64_t at_a_time = std::min(images.at_a_time(), grads.at_a_time());
  const int64_t channels =
      copies == Copies::boxes ? whole_boxes(images.channels(), input) : images.channels();
  const int64_t count = g.O * g.R * g.S * channels;
  const at::ScalarType sum_type = at::toOpMathType(input.scalar_type());
  const int64_t part_pixels = pixels_of_part(g, at_a_time * g.output_pixels(),
                                             count * static_cast<int64_t>(elementSize(sum_type)));
  const int64_t parts = ceil_div(at_a_time * g.output_pixels(), part_pixels);
  const at::Tensor sums = at::empty({parts, count}, grad_weight.options().dtype(sum_type));
  for (int64_t n = 0; n < g.N; n += at_a_time) {
    const int64_t some = std::min(at_a_time, g.N - n);
    launch_grad_weight(
        {g, images.read(n, some), grads.read(n, some), channels, part_pixels, n > 0, sums}, copies);
  }
  with_dtype(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    auto* const first = sums.mutable_data_ptr<at::opmath_type<scalar_t>>();
    const Parts left = add_shares(first, parts, count);
    for_each(grad_weight.numel(),
             AddParts<scalar_t>{left, channels, Divider(g.channels_per_group()), Divider(g.S),
                                Divider(g.R), grad_weight.stride(0), grad_weight.stride(1),
                                grad_weight.stride(2), grad_weight.stride(3), first,
                                grad_weight.mutable_data_ptr<scalar_t>()});
  });
}

}  // namespace dlops::cuda
