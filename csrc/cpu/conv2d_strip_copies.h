// Strips of images in channels_last order and the type of the sums, whatever order and type the
// images have.
#pragma once

#include <algorithm>

#include "cpu/capability.h"
#include "cpu/conv2d_taps.h"
#include "cpu/simd/conv2d.h"
#include "cpu/simd/transpose.h"

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

// im2col of few channels, for the output rows `y`: [y][column][row tap][column tap][channel], with
// `pad` zeros behind each column.
template <class scalar_t, class sum_t>
class Unfolder {
 public:
  Unfolder(const ImageView<scalar_t>& from, int64_t channels, const TapAxis& rows,
           const TapAxis& cols, int64_t pad = 0)
      : from_(from), channels_(channels), rows_(rows), cols_(cols), pad_(pad) {
    if (rows.taps() == 0 || cols.taps() == 0) return;
    columns_ = {cols.offset(0), (cols.outputs - 1) * cols.step + cols.offset(cols.taps() - 1) + 1};
    // Taps that stand side by side are copied as one run.
    const bool adjacent = cols.offset(cols.taps() - 1) - cols.offset(0) == cols.taps() - 1;
    for (int64_t j = 0; j < (adjacent ? 1 : cols.taps()); ++j) runs_.push_back(j);
    run_ = (adjacent ? cols.taps() : 1) * channels;
  }
  // What fill() needs for `rows` output rows, in elements; both end in room for whole vectors.
  int64_t space_size(int64_t rows) const {
    const int64_t span = (rows - 1) * rows_.step + extent();
    return span * length(columns_) * channels_ + kRunSlack;
  }
  int64_t size(int64_t rows) const {
    return rows * cols_.outputs * (rows_.taps() * cols_.taps() * channels_ + pad_) + kRunSlack;
  }

  void fill(int64_t n, int64_t c0, Interval y, sum_t* space, sum_t* to) const {
    if (runs_.empty()) return;
    const Interval h{y.begin * rows_.step + rows_.offset(0),
                     (y.end - 1) * rows_.step + rows_.offset(rows_.taps() - 1) + 1};
    fill_strip(from_, n, {c0, c0 + channels_}, h, columns_, space);
    const auto copy = DLOPS_SIMD(copy_runs, sum_t);
    const int64_t row = length(columns_) * channels_;
    std::vector<const sum_t*> runs(static_cast<size_t>(rows_.taps()) * runs_.size());
    for (int64_t out = 0; out < length(y); ++out) {
      auto run = runs.begin();
      for (int64_t i = 0; i < rows_.taps(); ++i)
        for (const int64_t j : runs_)
          *run++ = space + (out * rows_.step + rows_.offset(i) - rows_.offset(0)) * row +
                   (cols_.offset(j) - columns_.begin) * channels_;
      to = copy(runs.data(), static_cast<int64_t>(runs.size()), run_, pad_, cols_.step * channels_,
                cols_.outputs, to);
    }
  }

 private:
  int64_t extent() const {
    return rows_.taps() == 0 ? 1 : rows_.offset(rows_.taps() - 1) - rows_.offset(0) + 1;
  }
  ImageView<scalar_t> from_;
  int64_t channels_;
  TapAxis rows_, cols_;
  int64_t pad_;
  Interval columns_{0, 0};
  std::vector<int64_t> runs_;
  int64_t run_ = 0;
};

}  // namespace dlops::cpu
