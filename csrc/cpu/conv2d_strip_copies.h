// Strips of images in channels_last order and the type of the sums, whatever order and type the
// images have.
#pragma once

#include <algorithm>

#include "cpu/capability.h"
#include "cpu/conv2d_taps.h"
#include "cpu/simd/conv2d.h"

namespace dlops::cpu {

// N images of `channels` channels, dense in either memory format.
template <class scalar_t>
struct ImageView {
  const scalar_t* data;
  int64_t channels, H, W;
  bool last;
  int64_t pixel() const { return last ? channels : 1; }
  int64_t plane() const { return H * W; }
  const scalar_t* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    return last ? data + ((n * H + h) * W + w) * channels + c
                : data + ((n * channels + c) * H + h) * W + w;
  }
};

inline int64_t length(Interval i) { return i.end - i.begin; }
inline Interval intersect(Interval a, Interval b) {
  const int64_t begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}

// Channels `c` of rows `h` and columns `w` of image n as [row][column][channel]. Rows and columns
// outside the image are zeros.
template <class scalar_t, class sum_t>
void fill_strip(const ImageView<scalar_t>& from, int64_t n, Interval c, Interval h, Interval w,
                sum_t* to) {
  const auto flip = DLOPS_SIMD(transpose, scalar_t, sum_t);
  const auto convert = DLOPS_SIMD(convert_row, scalar_t, sum_t);
  const int64_t channels = length(c), width = length(w);
  const Interval inside = intersect(w, {0, from.W});
  const int64_t count = length(inside), before = count > 0 ? inside.begin - w.begin : width;
  if (!from.last && count == width && width == from.W && h.begin >= 0 && h.end <= from.H) {
    flip(from.at(n, c.begin, h.begin, 0), from.plane(), channels, length(h) * width, to, channels);
    return;
  }
  for (int64_t row = h.begin; row < h.end; ++row, to += width * channels) {
    if (row < 0 || row >= from.H || count == 0) {
      std::fill_n(to, width * channels, sum_t(0));
      continue;
    }
    const scalar_t* pixels = from.at(n, c.begin, row, inside.begin);
    sum_t* body = to + before * channels;
    std::fill_n(to, before * channels, sum_t(0));
    std::fill_n(body + count * channels, (width - before - count) * channels, sum_t(0));
    if (!from.last) {
      flip(pixels, from.plane(), channels, count, body, channels);
    } else if (channels == from.channels) {
      convert(pixels, body, count * channels);
    } else {
      for (int64_t i = 0; i < count; ++i)
        convert(pixels + i * from.channels, body + i * channels, channels);
    }
  }
}

// For each output row in `y`, the source rows of all its taps side by side:
// [y][column][tap][channel] for few channels. `space` holds taps * channels * columns elements.
template <class scalar_t, class sum_t>
void fill_stacked(const ImageView<scalar_t>& from, int64_t n, Interval c, const TapAxis& rows,
                  Interval y, Interval w, sum_t* space, sum_t* to) {
  const auto flip = DLOPS_SIMD(transpose, sum_t, sum_t);
  const int64_t channels = length(c), width = length(w), depth = rows.taps() * channels;
  const Interval inside = intersect(w, {0, from.W});
  const int64_t count = length(inside), before = count > 0 ? inside.begin - w.begin : width;
  for (int64_t out = y.begin; out < y.end; ++out, to += width * depth) {
    sum_t* line = space;
    for (int64_t t = 0; t < rows.taps(); ++t) {
      const int64_t row = out * rows.step + rows.offset(t);
      for (int64_t i = 0; i < channels; ++i, line += width) {
        if (row < 0 || row >= from.H) {
          std::fill_n(line, width, sum_t(0));
          continue;
        }
        std::fill_n(line, before, sum_t(0));
        std::fill_n(line + before + count, width - before - count, sum_t(0));
        if (count == 0) continue;
        const scalar_t* pixels = from.at(n, c.begin + i, row, inside.begin);
        const int64_t step = from.pixel();
        for (int64_t x = 0; x < count; ++x) line[before + x] = static_cast<sum_t>(pixels[x * step]);
      }
    }
    flip(space, width, depth, width, to, depth);
  }
}

}  // namespace dlops::cpu
