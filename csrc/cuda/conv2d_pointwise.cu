// 1 x 1 convolution of contiguous images as implicit GEMM (conv2d_pointwise_tiles.cuh), and the
// gradient of the input, which is one of grad_output with the weight transposed.
#include "cuda/conv2d_pointwise_tiles.cuh"

#include <type_traits>

#include "common/cuda_utils.cuh"
#include "cuda/conv2d_implicit.h"

namespace dlops::cuda {
namespace {

// Whether pixels lie together, in whole chunks at addresses that are multiples of 16.
bool has_planes(const at::Tensor& images) {
  const int64_t chunk = chunk_elements(images), pixels = images.size(2) * images.size(3);
  return images.stride(3) == 1 && images.stride(2) == images.size(3) && pixels % chunk == 0 &&
         images.stride(1) % chunk == 0 && images.stride(0) % chunk == 0 &&
         reinterpret_cast<intptr_t>(images.const_data_ptr()) % 16 == 0;
}

// Whether an image's pixels fill its tiles to three quarters: no tile has those of two images.
bool fill_tiles(int64_t pixels, int64_t size) {
  return pixels * 4 >= tiles_of(pixels, size) * size * 3;
}

template <class scalar_t, class tensor_scalar_t>
Planes<scalar_t> planes(tensor_scalar_t* start, const at::Tensor& images, int64_t groups) {
  return {start, images.stride(0), images.size(1) / groups * images.stride(1), images.stride(1)};
}

// `weight` holds a row of outputs, in whole chunks, for every channel of a group.
struct PointwiseCall {
  const at::Tensor& images;
  const at::Tensor& weight;
  const at::Tensor& bias;
  const at::Tensor& output;
  int64_t groups;

  int64_t outputs() const { return output.size(1) / groups; }
  int64_t pixels() const { return images.size(2) * images.size(3); }

  template <class scalar_t, int kOutputs, int kPixels, template <class, int, int> class Multiply>
  void launch() const {
    PointwiseTiles<scalar_t, kOutputs, kPixels, Multiply> tiles;
    tiles.images = images.size(0);
    tiles.groups = static_cast<int>(groups);
    tiles.C = static_cast<int>(images.size(1) / groups);
    tiles.O = static_cast<int>(outputs());
    tiles.pixels = pixels();
    tiles.input = planes<const scalar_t>(images.const_data_ptr<scalar_t>(), images, groups);
    tiles.weight = weight.const_data_ptr<scalar_t>();
    tiles.weight_row = static_cast<int>(weight.size(-1));
    tiles.bias = data_or_null<scalar_t>(bias);
    tiles.output = planes<scalar_t>(output.mutable_data_ptr<scalar_t>(), output, groups);
    for_each_tile(tiles);
  }
};

template <class scalar_t, template <class, int, int> class Multiply>
void launch_by_size(const PointwiseCall& call, bool wide) {
  if constexpr (sizeof(scalar_t) < 8) {
    if (wide) return call.launch<scalar_t, 128, 128, Multiply>();
  }
  call.launch<scalar_t, 64, 64, Multiply>();
}

// Tiles of either size add up an output's products in the same order.
void launch_pointwise(const PointwiseCall& call) {
  const int64_t large = call.images.size(0) * call.groups * tiles_of(call.outputs(), 128) *
                        tiles_of(call.pixels(), 128);
  const bool wide =
      call.outputs() > 64 && fill_tiles(call.pixels(), 128) && large >= occupying_tiles();
  with_dtype(call.weight, [&](auto zero) {
    using scalar_t = decltype(zero);
    if constexpr (sizeof(scalar_t) == 2) {
      if (wide && asks_for_wgmma()) return call.launch<scalar_t, 128, 128, GroupProducts>();
    }
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (!allows_tf32()) return launch_by_size<float, ThreadProducts>(call, wide);
    }
    launch_by_size<scalar_t, WarpProducts>(call, wide);
  });
}

}  // namespace

bool takes_pointwise(const Conv2dGeometry& g, const at::Tensor& images, const at::Tensor& result) {
  return is_pointwise(g) && fill_tiles(g.output_pixels(), 64) && has_planes(images) &&
         has_planes(result);
}

void pointwise_conv2d(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                      const at::Tensor& bias, const at::Tensor& output) {
  Conv2dGeometry turned = g;  // of which a row is a channel's outputs
  turned.C = g.O;
  turned.O = g.C;
  const WeightPlace from{
      0, g.outputs_per_group() * weight.stride(0), weight.stride(1), weight.stride(0), 0, 0};
  const at::Tensor matrix =
      weight_rows(turned, weight, from, whole_chunks(g.outputs_per_group(), weight));
  launch_pointwise({input, matrix, bias, output, g.groups});
}

void pointwise_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& weight, const at::Tensor& grad_input) {
  const WeightPlace from{
      0, g.outputs_per_group() * weight.stride(0), weight.stride(0), weight.stride(1), 0, 0};
  const at::Tensor matrix =
      weight_rows(g, weight, from, whole_chunks(g.channels_per_group(), weight));
  launch_pointwise({grad_output, matrix, at::Tensor(), grad_input, g.groups});
}

}  // namespace dlops::cuda
