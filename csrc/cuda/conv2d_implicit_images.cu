// Which convolutions implicit GEMM takes, and how its tiles come by their images and weights.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "common/cuda_utils.cuh"
#include "cuda/channels_last_tiles.cuh"
#include "cuda/conv2d_implicit.h"
#include "cuda/divider.h"

#if defined(__CUDACC__)
#include <ATen/cuda/CUDAContext.h>
#endif

namespace dlops::cuda {
namespace {

enum class Choice { fastest, im2col, implicit_gemm, wgmma, tma };

Choice choice() {
  const char* const asked = std::getenv("DLOPS_CUDA_CONV2D");
  if (asked == nullptr) return Choice::fastest;
  const std::string_view value = asked;
  if (value == "im2col") return Choice::im2col;
  if (value == "implicit_gemm") return Choice::implicit_gemm;
  if (value == "implicit_gemm_wgmma") return Choice::wgmma;
  TORCH_CHECK_VALUE(value == "implicit_gemm_tma",
                    "DLOPS_CUDA_CONV2D must be unset (the fastest), im2col, implicit_gemm, "
                    "implicit_gemm_wgmma or implicit_gemm_tma, got ",
                    value);
  return Choice::tma;
}

// Whether the device and the build have Hopper's own instructions.
bool device_has_wgmma() {
#if defined(__CUDACC__)
  const cudaDeviceProp& device = *at::cuda::getCurrentDeviceProperties();
  return device.major == 9 && device.minor == 0;
#else
  return true;
#endif
}
bool build_has_wgmma() {
#if defined(__CUDACC__)
  return std::string_view(DLOPS_CUDA_ARCH_LIST).find("9.0a") != std::string_view::npos;
#else
  return true;
#endif
}

// What tiles are copied and multiplied by.
bool has_instructions() {
#if defined(__CUDACC__)
  return at::cuda::getCurrentDeviceProperties()->major >= 8;
#else
  return true;
#endif
}

bool has_dtype(const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  return dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat ||
         dtype == at::kDouble;
}

// Whether every position within an image, and every row of the column matrix, is a 32-bit number,
// channels being counted in whole chunks.
bool fits(const Conv2dGeometry& g) {
  constexpr int64_t limit = 1 << 28;
  const auto axis = [](int64_t size, int64_t outputs, int64_t stride, int64_t pad, int64_t dilation,
                       int64_t kernel) {
    return size < limit && outputs < limit && pad < limit && stride < limit && dilation < limit &&
           kernel < limit && outputs * stride < limit && kernel * dilation < limit;
  };
  return axis(g.H, g.OH, g.stride_h, g.pad_top, g.dilation_h, g.R) &&
         axis(g.W, g.OW, g.stride_w, g.pad_left, g.dilation_w, g.S) && g.C < limit && g.O < limit &&
         g.R * g.S < limit && g.R * g.S * (g.channels_per_group() + 7) < limit &&
         g.R * g.S * (g.outputs_per_group() + 7) < limit;
}

// Whether a group's channels are neighbours, in whole chunks at addresses that are multiples of 16,
// and pixels follow one another at one step.
bool has_chunks(const at::Tensor& images, int64_t groups) {
  const int64_t pixel = images.stride(3), row = images.size(3) * pixel;
  const bool is_even = (images.size(2) == 1 || images.stride(2) == row) &&
                       (images.size(0) == 1 || images.stride(0) == images.size(2) * row);
  return is_even && images.stride(1) == 1 &&
         (pixel | images.size(1) / groups) % chunk_elements(images) == 0 &&
         reinterpret_cast<intptr_t>(images.const_data_ptr()) % 16 == 0;
}

BoxesOfPixels boxes_of_pixels(const Conv2dGeometry& g, const at::Tensor& images, int64_t channels,
                              int64_t pixel) {
  return {box_numbers(images), nullptr,   g.N,        g.H,  g.W,
          g.groups * channels, pixel,     g.OH,       g.OW, g.stride_h,
          g.stride_w,          g.pad_top, g.pad_left, 0};
}

// One weight per index of (groups, rows, row_length), which tiles copy by 16 bytes: a row runs over
// the kernel's cells and their channels, and is filled up with zeros as the images are.
template <class scalar_t>
struct WeightRows {
  WeightPlace place;
  int64_t channels, cells;  // that are there
  Divider row_length, rows, padded, S;
  const scalar_t* weight;
  scalar_t* to;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    // Each split leaves the remainder in place of what it divides.
    int64_t c = i;
    int64_t row = row_length.split(c);
    const int64_t group = rows.split(row);
    int64_t s = padded.split(c);
    const bool there = c < channels && s < cells;
    const int64_t r = S.split(s);
    to[i] = there ? weight[place.first + group * place.group + row * place.row + c * place.channel +
                           r * place.kernel_row + s * place.kernel_col]
                  : scalar_t(0);
  }
};

}  // namespace

int64_t occupying_tiles() {
#if defined(__CUDACC__)
  return ceil_div(2 * at::cuda::getCurrentDeviceProperties()->multiProcessorCount, 3);
#else
  return kEnoughTiles;
#endif
}

bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

bool asks_for_implicit_gemm() { return choice() != Choice::im2col; }

bool asks_for_wgmma() {
  if (choice() == Choice::fastest) return device_has_wgmma() && build_has_wgmma();
  if (choice() < Choice::wgmma) return false;
  const char* const asked = std::getenv("DLOPS_CUDA_CONV2D");
  TORCH_CHECK(device_has_wgmma(), "DLOPS_CUDA_CONV2D=", asked,
              " needs a device of compute capability 9.0; implicit_gemm serves all from 8.0 on");
#if defined(__CUDACC__)
  TORCH_CHECK(build_has_wgmma(), "DLOPS_CUDA_CONV2D=", asked,
              " needs a build for 9.0a, this one is for ", DLOPS_CUDA_ARCH_LIST,
              "; set TORCH_CUDA_ARCH_LIST=9.0a and build again");
#endif
  return true;
}

bool asks_for_boxes() {
  return asks_for_wgmma() && (choice() == Choice::fastest || choice() == Choice::tma);
}

// Where nothing is asked for, products with all digits of float32 and float64 are the library's.
bool serves(const at::Tensor& tensor) {
  return choice() != Choice::fastest || tensor.element_size() == 2 ||
         (tensor.scalar_type() == at::kFloat && allows_tf32());
}

bool takes_implicit_gemm(const at::Tensor& tensor, const Conv2dGeometry& g) {
  return asks_for_implicit_gemm() && has_dtype(tensor) && serves(tensor) && fits(g) &&
         has_instructions();
}

bool takes_implicit_grad_input(const at::Tensor& tensor, const Conv2dGeometry& g) {
  // Each residue is a launch or two.
  constexpr int64_t kMostResidues = 64;
  return takes_implicit_gemm(tensor, g) &&
         std::min(g.stride_h, g.H) * std::min(g.stride_w, g.W) <= kMostResidues;
}

ImageReader::ImageReader(const at::Tensor& images, int64_t groups)
    : images_(images),
      groups_(groups),
      at_a_time_(images.size(0)),
      in_place_(has_chunks(images, groups)) {
  if (in_place_) return;
  const int64_t bytes = pixel() * images.size(2) * images.size(3) * images.element_size();
  at_a_time_ =
      std::clamp<int64_t>(kWorkspaceBytes / 2 / std::max<int64_t>(bytes, 1), 1, at_a_time_);
}

int64_t ImageReader::channels() const {
  const int64_t channels = images_.size(1) / groups_;
  return in_place_ ? channels : whole_chunks(channels, images_);
}
int64_t ImageReader::pixel() const { return in_place_ ? images_.stride(3) : groups_ * channels(); }

TileImages ImageReader::read(int64_t first, int64_t count) const {
  const at::Tensor images = images_.narrow(0, first, count);
  const int64_t channels = images.size(1) / groups_, H = images.size(2), W = images.size(3);
  if (in_place_)
    return {images, images.stride(0), channels, images.stride(2), images.stride(3), channels};
  const int64_t padded = this->channels(), places = pixel();
  const at::Tensor memory = at::empty({count, H, W, places}, images.options());
  const int64_t chunk = chunk_elements(images);
  const auto lie_together = [&](int64_t pixels) {
    return images.stride(3) == 1 && images.stride(2) == W && H * W % pixels == 0 &&
           images.stride(1) % pixels == 0 && images.stride(0) % pixels == 0 &&
           reinterpret_cast<intptr_t>(images.const_data_ptr()) % (pixels * images.element_size()) ==
               0;
  };
  const int64_t together = lie_together(chunk)                    ? chunk
                           : chunk > 2 && lie_together(chunk / 2) ? chunk / 2
                                                                  : 1;
  with_dtype(images, [&](auto zero) {
    using scalar_t = decltype(zero);
    using Pixels = ChannelsLastPixels<scalar_t>;
    if (groups_ == 1 && padded <= Pixels::kMostChunks * chunk)
      return for_each(
          memory.numel() / chunk,
          Pixels{images.const_data_ptr<scalar_t>(), images.stride(0), images.stride(1),
                 images.stride(2), images.stride(3), Divider(padded / chunk), Divider(W),
                 Divider(H), static_cast<int>(channels), memory.mutable_data_ptr<scalar_t>()});
    for_each_tile(ChannelsLastTiles<scalar_t>{
        images.const_data_ptr<scalar_t>(), images.stride(0), images.stride(1), images.stride(2),
        images.stride(3), count, H * W, static_cast<int>(W), static_cast<int>(channels),
        static_cast<int>(padded), places, static_cast<int>(together),
        memory.mutable_data_ptr<scalar_t>()});
  });
  return {memory, H * W * places, padded, W * places, places, padded};
}

at::Tensor weight_rows(const Conv2dGeometry& g, const at::Tensor& weight, const WeightPlace& place,
                       int64_t channels) {
  const int64_t rows = g.outputs_per_group();
  const int64_t row_length = whole_chunks(g.R * g.S * channels, weight);
  const at::Tensor matrix = at::empty({g.groups, rows, row_length}, weight.options());
  with_dtype(weight, [&](auto zero) {
    using scalar_t = decltype(zero);
    for_each(matrix.numel(),
             WeightRows<scalar_t>{place, g.channels_per_group(), g.R * g.S, Divider(row_length),
                                  Divider(rows), Divider(channels), Divider(g.S),
                                  weight.const_data_ptr<scalar_t>(),
                                  matrix.mutable_data_ptr<scalar_t>()});
  });
  return matrix;
}

bool takes_boxes(const Conv2dGeometry& g, const at::Tensor& images, int64_t channels,
                 int64_t pixel) {
  const int64_t whole = whole_boxes(channels, images);
  const bool has_numbers =
      images.element_size() == 2 || (images.scalar_type() == at::kFloat && allows_tf32());
  return has_numbers && asks_for_boxes() && whole * 3 <= channels * 4 &&
         (g.groups == 1 || whole == channels) && pixel >= g.groups * channels &&
         boxes_reach(boxes_of_pixels(g, images, channels, pixel), (g.R - 1) * g.dilation_h,
                     (g.S - 1) * g.dilation_w);
}

BoxMap pixel_boxes(const Conv2dGeometry& g, const TileImages& images, int box_pixels) {
  BoxesOfPixels boxes = boxes_of_pixels(g, images.memory, images.channels, images.col);
  boxes.start = images.memory.const_data_ptr();
  boxes.N = images.memory.size(0);
  boxes.box_pixels = box_pixels;
  return map_pixels(boxes);
}

}  // namespace dlops::cuda
