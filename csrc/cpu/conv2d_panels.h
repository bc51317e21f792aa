// How the CPU convolution is cut into panels: which pixels and channels a panel holds, and the
// matrices it is made of.
//
// Every product is row-major and runs on panels that fit the L2 cache:
//                 contiguous (NCHW)                    channels_last (NHWC)
//   forward       out[Og x P]   = W[Og x K] col[K x P]      out[P x Og]  = col[P x K] W'[K x Og]
//   grad_input    col[K x P]    = W'[K x Og] gout[Og x P]   col[P x K]   = gout[P x Og] W[Og x K]
//   grad_weight   gw'[K x Og]  += col[K x P] gout'[P x Og]  gw[Og x K]  += gout'[Og x P] col[P x K]
// with Og outputs of a group, P pixels, K column rows; ' marks a transposed copy.
#pragma once

#include <ATen/OpMathType.h>

#include <algorithm>

#include "conv2d_math.h"
#include "cpu/capability.h"
#include "cpu/simd/conv2d.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {

// What a panel of columns may take: half of a small L2 cache, in elements of 4 bytes.
constexpr int64_t kPanelElements = 64 * 1024;
constexpr int64_t kMinPixels = 128, kMaxPixels = 512;
// What the outputs of a panel's pixels may take, where there are very many output channels.
constexpr int64_t kOutputElements = 256 * 1024;

// The batch's output pixels, cut into blocks that lie in one image or hold whole images.
class PixelBlocks {
 public:
  // Blocks of about `pixels` pixels; with `whole_images`, never a part of an image.
  PixelBlocks(const Conv2dGeometry& g, int64_t pixels, bool whole_images = false)
      : image_(g.output_pixels()), total_(g.N * g.output_pixels()) {
    if (image_ > pixels && !whole_images) {
      per_image_ = ceil_div(image_, pixels);
      size_ = ceil_div(ceil_div(image_, per_image_), 16) * 16;  // full vectors
      per_image_ = ceil_div(image_, size_);
    } else {
      size_ = std::max<int64_t>(1, pixels / std::max<int64_t>(1, image_)) * image_;
    }
  }
  int64_t count() const {
    if (total_ == 0) return 0;
    return per_image_ > 1 ? total_ / image_ * per_image_ : ceil_div(total_, size_);
  }
  int64_t max_pixels() const { return std::min(size_, total_); }
  Interval operator[](int64_t i) const {
    if (per_image_ > 1) {
      const int64_t start = i / per_image_ * image_, within = i % per_image_ * size_;
      return {start + within, start + std::min(image_, within + size_)};
    }
    return {i * size_, std::min(total_, (i + 1) * size_)};
  }

 private:
  int64_t image_, total_, size_ = 0, per_image_ = 1;
};

// A group's input channels, cut into blocks whose columns fit a panel.
struct ChannelBlocks {
  int64_t channels, size;
  ChannelBlocks(int64_t channels, int64_t rows_per_channel, int64_t max_rows) : channels(channels) {
    const int64_t wanted = std::max<int64_t>(1, max_rows / rows_per_channel);
    size = ceil_div(channels, std::max<int64_t>(1, ceil_div(channels, wanted)));
  }
  int64_t count() const { return channels == 0 ? 0 : ceil_div(channels, size); }
  Interval operator[](int64_t i) const { return {i * size, std::min(channels, (i + 1) * size)}; }
};

// As many pixels as let all of a group's columns fit a panel, and its outputs theirs, within
// bounds.
inline int64_t pixels_per_panel(const Conv2dGeometry& g) {
  const int64_t by_columns = kPanelElements / std::max<int64_t>(1, g.column_rows());
  const int64_t by_outputs = kOutputElements / std::max<int64_t>(1, g.outputs_per_group());
  return std::clamp(std::min(by_columns, by_outputs) / 16 * 16, kMinPixels, kMaxPixels);
}

// A matrix in row-major order, its rows `ld` apart.
template <class T>
struct Matrix {
  const T* data;
  int64_t ld;
};

// The panels of one convolution on tensors of type scalar_t, whose products are summed in sum_t.
// `group` offsets are applied here; nothing else knows how groups lie in memory.
template <class scalar_t, bool last>
struct Panels {
  using sum_t = at::opmath_type<scalar_t>;
  static constexpr bool same_type = std::is_same_v<scalar_t, sum_t>;
  const Conv2dGeometry& g;

  bool pointwise() const {
    return g.R == 1 && g.S == 1 && g.stride_h == 1 && g.stride_w == 1 && g.OH == g.H &&
           g.OW == g.W && g.pad_top == 0 && g.pad_left == 0;
  }
  bool one_image(Interval q) const {
    return q.begin / g.output_pixels() == (q.end - 1) / g.output_pixels();
  }

  // im2col of channels `c` of a group, K x P or P x K; a 1x1 convolution's columns are its input.
  Matrix<sum_t> columns(const scalar_t* input, int64_t group, Interval c, Interval q,
                        sum_t* space) const {
    const int64_t c0 = group * g.channels_per_group() + c.begin;
    const ColumnBlock block{c0, c0 + (c.end - c.begin), q.begin, q.end};
    if constexpr (same_type) {
      if (pointwise() && last) return {input + q.begin * g.C + c0, g.C};
      if (pointwise() && one_image(q)) {
        const int64_t plane = g.output_pixels();
        return {input + (q.begin / plane * g.C + c0) * plane + q.begin % plane, plane};
      }
    }
    const int64_t ld = last ? (c.end - c.begin) * g.R * g.S : q.end - q.begin;
    if constexpr (last) {
      DLOPS_SIMD(fill_columns_last, scalar_t, sum_t)(g, block, input, space, ld);
    } else {
      DLOPS_SIMD(fill_columns, scalar_t, sum_t)(g, block, input, space, ld);
    }
    return {space, ld};
  }

  // Calls f(pointer to output channel 0 of the group at the run's first pixel, run's offset in the
  // block, pixels) for each image of a contiguous output that the block touches.
  template <class pointer_t, class F>
  void for_each_image(pointer_t output, int64_t group, Interval q, const F& f) const {
    const int64_t plane = g.output_pixels();
    for (int64_t at = q.begin; at < q.end;) {
      const int64_t n = at / plane, within = at % plane;
      const int64_t count = std::min(plane - within, q.end - at);
      f(output + (n * g.O + group * g.outputs_per_group()) * plane + within, at - q.begin, count);
      at += count;
    }
  }

  // A group's part of an output-sized tensor, Og x P or P x Og.
  Matrix<sum_t> outputs(const scalar_t* output, int64_t group, Interval q, sum_t* space) const {
    const int64_t Og = g.outputs_per_group(), plane = g.output_pixels(), pixels = q.end - q.begin;
    const auto convert = DLOPS_SIMD(convert_row, scalar_t, sum_t);
    if constexpr (last) {
      const scalar_t* from = output + q.begin * g.O + group * Og;
      if constexpr (same_type) return {from, g.O};
      for (int64_t p = 0; p < pixels; ++p) convert(from + p * g.O, space + p * Og, Og);
      return {space, Og};
    } else {
      if constexpr (same_type) {
        if (one_image(q))
          return {output + (q.begin / plane * g.O + group * Og) * plane + q.begin % plane, plane};
      }
      for_each_image(output, group, q, [&](const scalar_t* from, int64_t offset, int64_t count) {
        for (int64_t o = 0; o < Og; ++o)
          convert(from + o * plane, space + o * pixels + offset, count);
      });
      return {space, pixels};
    }
  }

  // The same, transposed: P x Og or Og x P.
  Matrix<sum_t> outputs_transposed(const scalar_t* output, int64_t group, Interval q,
                                   sum_t* space) const {
    const int64_t Og = g.outputs_per_group(), pixels = q.end - q.begin;
    const auto flip = DLOPS_SIMD(transpose, scalar_t, sum_t);
    if constexpr (last) {
      flip(output + q.begin * g.O + group * Og, g.O, pixels, Og, space, pixels);
      return {space, pixels};
    } else {
      for_each_image(output, group, q, [&](const scalar_t* from, int64_t offset, int64_t count) {
        flip(from, g.output_pixels(), Og, count, space + offset * Og, Og);
      });
      return {space, Og};
    }
  }

  // Writes outputs [o0, o1) of a group from a panel of theirs, with the bias.
  void store(Matrix<sum_t> panel, const sum_t* bias, int64_t group, Interval o, Interval q,
             scalar_t* output) const {
    const int64_t Og = g.outputs_per_group(), plane = g.output_pixels(), count = o.end - o.begin;
    const sum_t* group_bias = bias == nullptr ? nullptr : bias + group * Og + o.begin;
    if constexpr (last) {
      const auto add = DLOPS_SIMD(convert_row_plus_row, sum_t, scalar_t);
      const auto convert = DLOPS_SIMD(convert_row, sum_t, scalar_t);
      for (int64_t p = 0; p < q.end - q.begin; ++p) {
        scalar_t* to = output + (q.begin + p) * g.O + group * Og + o.begin;
        const sum_t* from = panel.data + p * panel.ld;
        group_bias == nullptr ? convert(from, to, count) : add(from, group_bias, to, count);
      }
    } else {
      const auto add = DLOPS_SIMD(convert_row_plus, sum_t, scalar_t);
      for_each_image(output, group, q, [&](scalar_t* to, int64_t offset, int64_t pixels) {
        for (int64_t i = 0; i < count; ++i)
          add(panel.data + i * panel.ld + offset, group_bias == nullptr ? sum_t(0) : group_bias[i],
              to + (o.begin + i) * plane, pixels);
      });
    }
  }
};

}  // namespace dlops::cpu
