// What the launchers of implicit GEMM share: which convolutions it takes, and images and weights as
// its tiles read them.
#pragma once

#include <ATen/core/Tensor.h>

#include "cuda/boxes.h"
#include "cuda/conv2d.h"
#include "cuda/tiles.cuh"

namespace dlops::cuda {

// Whether float32 may be multiplied as TF32: as matrix products, by either of torch's switches.
// (allowTF32CuBLAS() raises where only torch.backends.cuda.matmul.fp32_precision was used.)
bool allows_tf32();

// Whether Hopper's products of groups of warps are asked for, DLOPS_CUDA_CONV2D=implicit_gemm_wgmma
// or implicit_gemm_tma, and the latter's copies of boxes: an error where the device or the build
// has none. Where nothing is asked for, whether both are there. float64, and float32 with all its
// digits, have no such products and do not ask.
bool asks_for_wgmma();
bool asks_for_boxes();

// Enough tiles to occupy the largest devices: where the gradient of the weight is cut into parts,
// the same on every device, for the cut decides on the order of its sums. Fewer in tests, so that
// small cases are cut and meet large tiles.
#if !defined(DLOPS_ENOUGH_TILES)
#define DLOPS_ENOUGH_TILES 264
#endif
constexpr int64_t kEnoughTiles = DLOPS_ENOUGH_TILES;

// Enough tiles for two thirds of the current device's multiprocessors. Tiles of half the size would
// occupy more of it, but they bring up to half as many numbers again for the same products, and the
// smallest do without wgmma. In tests kEnoughTiles.
int64_t occupying_tiles();

// Calls f(scalar_t()).
template <class F>
void with_dtype(const at::Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return f(c10::BFloat16());
    case at::kHalf:
      return f(c10::Half());
    case at::kDouble:
      return f(double());
    default:
      return f(float());
  }
}

// Elements in the 16 bytes that tiles copy at once.
inline int64_t chunk_elements(const at::Tensor& tensor) { return 16 / tensor.element_size(); }
inline int64_t whole_chunks(int64_t elements, const at::Tensor& tensor) {
  return ceil_div(elements, chunk_elements(tensor)) * chunk_elements(tensor);
}

// Some images in memory, whose channels are neighbours, with the steps to the next image, group,
// row and pixel. Pixels follow one another at one step, `col`.
struct TileImages {
  at::Tensor memory;
  int64_t image, group, row, col;
  int64_t channels;  // of a group, with the zeros that fill its last chunk
};

// Images as tiles read them: where they are, or copied to channels_last order, some images at a
// time, so that the copy takes little memory and is read again while the cache still has it.
class ImageReader {
 public:
  ImageReader(const at::Tensor& images, int64_t groups);
  // Most images in a call of read.
  int64_t at_a_time() const { return at_a_time_; }
  // What read gives: the channels of a group and the step from pixel to pixel.
  int64_t channels() const;
  int64_t pixel() const;
  TileImages read(int64_t first, int64_t count) const;

 private:
  at::Tensor images_;
  int64_t groups_, at_a_time_;
  bool in_place_;
};

// Where a convolution's weights are, in elements from the first: the steps to the next group, row
// of the matrix, channel, and row and column of the kernel.
struct WeightPlace {
  int64_t first, group, row, channel, kernel_row, kernel_col;
};

// weight as rows for the convolution `g` of images with `channels` to a group: (groups, rows,
// row_length).
at::Tensor weight_rows(const Conv2dGeometry& g, const at::Tensor& weight, const WeightPlace& place,
                       int64_t channels);

// 1 x 1 convolutions of contiguous images (conv2d_pointwise.cu), or of grad_output: whether these
// are such, and what both passes give.
bool takes_pointwise(const Conv2dGeometry& g, const at::Tensor& images, const at::Tensor& result);
void pointwise_conv2d(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                      const at::Tensor& bias, const at::Tensor& output);
void pointwise_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& weight, const at::Tensor& grad_input);

// Channels of a group in whole boxes.
inline int64_t whole_boxes(int64_t channels, const at::Tensor& tensor) {
  const int64_t row = kBoxBytes / tensor.element_size();
  return ceil_div(channels, row) * row;
}
inline BoxNumbers box_numbers(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 ? BoxNumbers::bfloat16
         : tensor.scalar_type() == at::kHalf   ? BoxNumbers::float16
                                               : BoxNumbers::tf32;
}

// Whether boxes are asked for and serve images of this dtype, so many channels to a group, and this
// step from pixel to pixel: with few channels of zeros, and none of the next group.
bool takes_boxes(const Conv2dGeometry& g, const at::Tensor& images, int64_t channels,
                 int64_t pixel);
BoxMap pixel_boxes(const Conv2dGeometry& g, const TileImages& images, int box_pixels);

// The convolution of these images.
template <class scalar_t>
TileConv2d<scalar_t> tile_conv2d(const Conv2dGeometry& g, const TileImages& images) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {images.memory.const_data_ptr<scalar_t>(),
          images.image,
          images.group,
          images.row,
          images.col,
          images.memory.size(0),
          narrow(g.H),
          narrow(g.W),
          narrow(images.channels),
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

}  // namespace dlops::cuda
