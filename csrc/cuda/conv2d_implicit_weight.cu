// The gradient of a convolution's weight as implicit GEMM on the tensor cores
// (conv2d_grad_weight_tiles.cuh). The pixels are cut into parts, which sum side by side; then the
// parts are added in their order.
#include <ATen/ops/empty.h>

#include <algorithm>

#include "common/cuda_utils.cuh"
#include "cuda/conv2d_grad_weight_tiles.cuh"
#include "cuda/conv2d_implicit.h"
#include "cuda/divider.h"

namespace dlops::cuda {
namespace {

// One weight per index, in the order of the sums, (groups, O, R, S, C), which have `padded`
// channels.
template <class scalar_t>
struct AddParts {
  int64_t count, parts;  // sums in a part
  int64_t padded;
  Divider channels, S, R;
  int64_t stride_o, stride_c, stride_r, stride_s;
  const float* sums;
  scalar_t* grad_weight;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    // Each split leaves the remainder in place of what it divides.
    int64_t c = i;
    int64_t s = channels.split(c);
    const float* const first = sums + s * padded + c;
    int64_t r = S.split(s);
    const int64_t o = R.split(r);
    float sum = first[0];
    for (int64_t part = 1; part < parts; ++part) sum += first[part * count];
    grad_weight[o * stride_o + c * stride_c + r * stride_r + s * stride_s] =
        static_cast<scalar_t>(sum);
  }
};

// How the pixels of a call are cut. It depends on the shapes and layouts alone, and so does the
// order of every sum.
int64_t pixels_of_part(const Conv2dGeometry& g, int64_t pixels, int64_t sums) {
  constexpr int64_t kLeastPixels = 256, kMultiple = 32;
  const int64_t most =
      std::min(ceil_div(pixels, kLeastPixels), kWorkspaceBytes / (sums * int64_t(sizeof(float))));
  const int64_t large_tiles =
      g.groups * tiles_of(g.outputs_per_group(), 128) * tiles_of(g.column_rows(), 128);
  const int64_t parts = std::max<int64_t>(1, std::min(kEnoughTiles / large_tiles, most));
  return ceil_div(ceil_div(pixels, parts), kMultiple) * kMultiple;
}

// The parts' sums of these images, in `sums`; `adds`: to what is there.
template <class Tiles, class scalar_t>
void launch_grad_weight(Tiles tiles, const TensorCoreConv2d<scalar_t>& conv, const TileImages& grad,
                        int64_t part_pixels, bool adds, const at::Tensor& sums) {
  static_assert(32 % Tiles::kPixels == 0);
  tiles.conv = conv;
  tiles.grad_output = grad.memory.const_data_ptr<scalar_t>();
  tiles.grad_pixel = grad.col;
  tiles.grad_group = grad.group;
  tiles.sums = sums.mutable_data_ptr<float>();
  tiles.adds = adds;
  tiles.part_pixels = part_pixels;
  for_each_tile(tiles);
}

}  // namespace

void implicit_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& input, const at::Tensor& grad_weight) {
  const bool gathered = gathers(input, g);
  const ImageReader images(input, g.groups, gathered);
  const ImageReader grads(grad_output, g.groups);
  const int64_t at_a_time = std::min(images.at_a_time(), grads.at_a_time());
  const int64_t padded =
      gathered ? g.channels_per_group() : whole_chunks(g.channels_per_group(), input);
  const int64_t count = g.O * g.R * g.S * padded;
  const int64_t part_pixels = pixels_of_part(g, at_a_time * g.output_pixels(), count);
  const int64_t parts = ceil_div(at_a_time * g.output_pixels(), part_pixels);
  const at::Tensor sums = at::empty({parts, count}, grad_weight.options().dtype(at::kFloat));
  with_dtype(input, [&](auto zero) {
    using scalar_t = decltype(zero);
    for (int64_t n = 0; n < g.N; n += at_a_time) {
      const int64_t some = std::min(at_a_time, g.N - n);
      const TileImages memory = images.read(n, some), grad = grads.read(n, some);
      const auto launch = [&](auto tiles) {
        launch_grad_weight(tiles, tensor_core_conv2d<scalar_t>(g, memory), grad, part_pixels, n > 0,
                           sums);
      };
      if constexpr (sizeof(scalar_t) == 2) {
        if (g.outputs_per_group() > 64 && !gathered && asks_for_wgmma()) {
          if (g.column_rows() > 64) {
            launch(GradWeightTiles<scalar_t, 128, 128, false, GroupProducts>());
          } else {
            launch(GradWeightTiles<scalar_t, 128, 64, false, GroupProducts>());
          }
          continue;
        }
      }
      if (gathered) {
        launch(GradWeightTiles<scalar_t, 64, 64, true>());
      } else if (g.outputs_per_group() > 64 && g.column_rows() > 64) {
        launch(GradWeightTiles<scalar_t, 128, 128, false>());
      } else {
        launch(GradWeightTiles<scalar_t, 64, 64, false>());
      }
    }
    for_each(
        grad_weight.numel(),
        AddParts<scalar_t>{count, parts, padded, Divider(g.channels_per_group()), Divider(g.S),
                           Divider(g.R), grad_weight.stride(0), grad_weight.stride(1),
                           grad_weight.stride(2), grad_weight.stride(3),
                           sums.const_data_ptr<float>(), grad_weight.mutable_data_ptr<scalar_t>()});
  });
}

}  // namespace dlops::cuda
