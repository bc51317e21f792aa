// The gradient of a convolution's bias: grad_output's sums over images and pixels. Parts of it are
// added up side by side, 16 bytes at a time, then the parts (parts.cuh).
#include "cuda/conv2d_grad_bias.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>

#include <algorithm>

#include "common/cuda_utils.cuh"
#include "cuda/conv2d.h"
#include "cuda/parts.cuh"

namespace dlops::cuda {
namespace {

template <class scalar_t>
struct alignas(16) Pack {
  static constexpr int width = 16 / sizeof(scalar_t);
  scalar_t of[width];
};

// Calls f(i) for first, first + step, ... below end, eight at a time, so that as many loads are
// under way.
template <class F>
DLOPS_HOST_DEVICE void every(int64_t first, int64_t end, int64_t step, const F& f) {
  constexpr int kAtATime = 8;
  int64_t i = first;
  for (; i + (kAtATime - 1) * step < end; i += kAtATime * step) {
    DLOPS_UNROLL
    for (int j = 0; j < kAtATime; ++j) f(i + j * step);
  }
  for (; i < end; i += step) f(i);
}

// Of pixels whose channels are neighbours: the sums of one part's pixels, of one pack of channels
// per index.
template <class scalar_t>
struct PartOfPixels {
  using T = at::opmath_type<scalar_t>;
  using P = Pack<scalar_t>;
  int64_t pixels, part_pixels;
  Divider packs;
  const P* grad_output;
  T* sums;  // (parts, channels)

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    int64_t pack = i;
    const int64_t first = packs.split(pack) * part_pixels, step = packs.divisor();
    const int64_t end = first + part_pixels < pixels ? first + part_pixels : pixels;
    T own[P::width] = {};
    every(first * step + pack, end * step, step, [&](int64_t at) {
      const P values = grad_output[at];
      DLOPS_UNROLL
      for (int j = 0; j < P::width; ++j) own[j] += static_cast<T>(values.of[j]);
    });
    DLOPS_UNROLL
    for (int j = 0; j < P::width; ++j) sums[i * P::width + j] = own[j];
  }
};

// Of contiguous planes: the sum of every kLanes-th pack of one plane of some images, per index;
// neighbouring indices have neighbouring packs.
template <class scalar_t>
struct PartOfPlanes {
  using T = at::opmath_type<scalar_t>;
  using P = Pack<scalar_t>;
  static constexpr int kLanes = 32;
  int64_t images, part_images, packs;  // of a plane
  Divider channels;
  const P* grad_output;
  T* sums;  // (parts, kLanes, channels)

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t lane = i % kLanes;
    int64_t channel = i / kLanes;
    const int64_t part = channels.split(channel), first = part * part_images;
    const int64_t end = first + part_images < images ? first + part_images : images;
    T sum(0);
    for (int64_t n = first; n < end; ++n) {
      const P* const plane = grad_output + (n * channels.divisor() + channel) * packs;
      every(lane, packs, kLanes, [&](int64_t at) {
        const P values = plane[at];
        DLOPS_UNROLL
        for (int j = 0; j < P::width; ++j) sum += static_cast<T>(values.of[j]);
      });
    }
    sums[(part * kLanes + lane) * channels.divisor() + channel] = sum;
  }
};

template <class scalar_t>
struct AddParts {
  using T = at::opmath_type<scalar_t>;
  Parts parts;
  const T* sums;
  scalar_t* grad_bias;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    T sum(0);
    for (int64_t part = 0; part < parts.count; ++part) sum += sums[part * parts.step + i];
    grad_bias[i] = static_cast<scalar_t>(sum);
  }
};

// Enough threads to occupy the largest devices, and enough for each to do.
constexpr int64_t kEnough = 1 << 16, kLeast = 16;

// How many of `count` to a part, where each part has `threads` threads. It depends on the shapes
// alone, and so does the order of every sum.
int64_t size_of_part(int64_t count, int64_t threads, int64_t least) {
  const int64_t parts = std::min(ceil_div(kEnough, threads), ceil_div(count, least));
  return ceil_div(count, parts);
}

template <class scalar_t>
void add_up(const at::Tensor& sums, const at::Tensor& grad_bias) {
  using T = at::opmath_type<scalar_t>;
  const int64_t count = grad_bias.numel(), parts = sums.numel() / count;
  const Parts left = add_shares(sums.mutable_data_ptr<T>(), parts, count);
  for_each(count, AddParts<scalar_t>{left, sums.const_data_ptr<T>(),
                                     grad_bias.mutable_data_ptr<scalar_t>()});
}

}  // namespace

at::Tensor sum_of_pixels(const at::Tensor& grad_output) {
  const int64_t N = grad_output.size(0), O = grad_output.size(1);
  const int64_t plane = grad_output.size(2) * grad_output.size(3), pixels = N * plane;
  const int64_t width = 16 / grad_output.element_size();
  const bool pixels_in_packs = grad_output.is_contiguous(at::MemoryFormat::ChannelsLast) &&
                               are_aligned(O, width, {&grad_output});
  const bool planes_in_packs =
      grad_output.is_contiguous() && are_aligned(plane, width, {&grad_output});
  if (grad_output.numel() == 0 || !at::isFloatingType(grad_output.scalar_type()) ||
      !(pixels_in_packs || planes_in_packs)) {
    return at::sum(grad_output, at::IntArrayRef{0, 2, 3}, /*keepdim=*/false,
                   grad_output.scalar_type());
  }
  const at::Tensor grad_bias = at::empty({O}, grad_output.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_output.scalar_type(), "conv2d_grad_bias", [&] {
        using T = at::opmath_type<scalar_t>;
        using P = Pack<scalar_t>;
        const auto options =
            grad_output.options().dtype(at::toOpMathType(grad_output.scalar_type()));
        const auto* const data = reinterpret_cast<const P*>(grad_output.const_data_ptr<scalar_t>());
        if (pixels_in_packs) {
          const int64_t part = size_of_part(pixels, O / width, kLeast),
                        parts = ceil_div(pixels, part);
          const at::Tensor sums = at::empty({parts, O}, options);
          for_each(parts * (O / width), PartOfPixels<scalar_t>{pixels, part, Divider(O / width),
                                                               data, sums.mutable_data_ptr<T>()});
          return add_up<scalar_t>(sums, grad_bias);
        }
        constexpr int64_t lanes = PartOfPlanes<scalar_t>::kLanes;
        const int64_t packs = plane / width;
        const int64_t part = size_of_part(N, O * lanes, ceil_div(kLeast * lanes, packs));
        const int64_t parts = ceil_div(N, part);
        const at::Tensor sums = at::empty({parts, lanes, O}, options);
        for_each(parts * O * lanes, PartOfPlanes<scalar_t>{N, part, packs, Divider(O), data,
                                                           sums.mutable_data_ptr<T>()});
        add_up<scalar_t>(sums, grad_bias);
      });
  return grad_bias;
}

}  // namespace dlops::cuda
