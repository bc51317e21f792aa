// Strips of rows of contiguous images with a few channels, copied with their padding.
#pragma once

#include <algorithm>

#include "conv2d_math.h"

namespace dlops::cpu {

// A strip as [channel][row][column] or [row][channel][column].
struct RowStrip {
  int64_t rows, row;
  // Of what `outputs` rows of outputs meet.
  RowStrip(const Conv2dGeometry& g, int64_t outputs)
      : rows((outputs - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1),
        row((g.OW - 1) * g.stride_w + (g.S - 1) * g.dilation_w + 1) {}
  int64_t plane() const { return rows * row; }
};

// As many output rows as let the channels' strips take about `elements`, and strips of about the
// same size.
inline int64_t strip_rows(const Conv2dGeometry& g, int64_t elements) {
  const RowStrip one(g, 1);
  const int64_t fitting = elements / (g.channels_per_group() * one.row) - one.rows;
  const int64_t most = std::max<int64_t>(4, fitting / g.stride_h + 1);
  return ceil_div(g.OH, ceil_div(g.OH, most));
}

// The padded rows of a plane, which output row y is the first to meet, `ld` apart.
template <class T>
void fill_plane(const Conv2dGeometry& g, const RowStrip& strip, const T* plane, int64_t y, T* to,
                int64_t ld) {
  const int64_t left = std::min(g.pad_left, strip.row);
  const int64_t inside = std::min(g.W, strip.row - left), right = strip.row - left - inside;
  const int64_t first = y * g.stride_h - g.pad_top;
  for (int64_t h = first; h < first + strip.rows; ++h, to += ld) {
    if (!g.row_inside(h)) {
      std::fill_n(to, strip.row, T(0));
      continue;
    }
    std::fill_n(to, left, T(0));
    std::copy_n(plane + h * g.W, inside, to + left);
    std::fill_n(to + left + inside, right, T(0));
  }
}

}  // namespace dlops::cpu
