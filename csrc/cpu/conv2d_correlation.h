// A convolution, or the gradient of its input, as one correlation: which source pixels and weights
// make an output pixel. Free of torch.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/conv2d_taps.h"

namespace dlops::cpu {

// Outputs whose weights stand together: four vectors of AVX-512, eight of AVX2.
constexpr int64_t kBlock = 64;

// The output pixels (row0 + y * row_step, col0 + x * col_step) of a correlation.
struct Phase {
  TapAxis rows, cols;
  std::vector<Segment> segments;
  int64_t row0, col0;
  int64_t first_tap;  // among the taps of all phases
};

// output[n, row, col, o] = sum over taps and c of source[n, row', col', c] * weight[tap, c, o], for
// each group. The forward pass is one; the gradient of the input is one with a phase for each
// position within the stride.
struct Correlation {
  int64_t images, groups;
  int64_t in_channels, out_channels;  // of a group
  int64_t H_in, W_in, H_out, W_out;
  int64_t row_step, col_step;
  bool from_outputs;  // the source is in the place of the convolution's output
  int64_t kernel_cols;
  std::vector<Phase> phases = {};
  int64_t taps = 0;
  // For each kernel cell the place of its weights, in taps; -1 where it never meets the image.
  std::vector<int64_t> places = {};
  // Few channels go through im2col: then phases[0] is a 1x1 correlation of the columns.
  std::vector<TapAxis> unfolded = {};
  int64_t pad = 0;  // zeros behind an unfolded pixel's columns

  int64_t block() const {
    const int64_t blocks = ceil_div(out_channels, kBlock);
    return std::min(out_channels, ceil_div(ceil_div(out_channels, blocks), 16) * 16);
  }
  int64_t blocks() const { return ceil_div(out_channels, block()); }
  // Channels of a pixel of the source that products read.
  int64_t depth() const { return unfolded.empty() ? in_channels : weight_rows(); }
  // Rows of the weights as a matrix, those that meet the zeros included.
  int64_t weight_rows() const { return taps * in_channels + pad; }

  void add(const TapAxis& rows, const TapAxis& cols, int64_t row0, int64_t col0) {
    Phase phase{live(rows), live(cols), {}, row0, col0, taps};
    for (int64_t i = 0; i < phase.rows.taps(); ++i)
      for (int64_t j = 0; j < phase.cols.taps(); ++j)
        places[static_cast<size_t>(phase.rows.cell(i) * kernel_cols + phase.cols.cell(j))] = taps++;
    phases.push_back(std::move(phase));
  }
  // Of a single phase.
  void unfold() {
    Phase& phase = phases[0];
    const auto same = [](const TapAxis& axis) {
      return TapAxis{axis.outputs, axis.outputs, 1, {0}, {0}};
    };
    TapAxis rows = same(phase.rows), cols = same(phase.cols);
    unfolded = {std::exchange(phase.rows, rows), std::exchange(phase.cols, cols)};
    H_in = H_out;
    W_in = W_out;
  }
  // `adjacent`: a pixel's channels follow those of the pixel before it.
  void finish(bool adjacent) {
    for (Phase& phase : phases) phase.segments = segments(phase.cols, adjacent);
  }
};

inline Correlation forward_correlation(const Conv2dGeometry& g, bool copied) {
  Correlation result{g.N,
                     g.groups,
                     g.channels_per_group(),
                     g.outputs_per_group(),
                     g.H,
                     g.W,
                     g.OH,
                     g.OW,
                     1,
                     1,
                     /*from_outputs=*/false,
                     g.S};
  result.places.assign(static_cast<size_t>(g.R * g.S), -1);
  result.add(forward_axis(g.OH, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h),
             forward_axis(g.OW, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w), 0, 0);
  if (copied && result.taps > 1 && has_few_channels(g)) result.unfold();
  return result;
}

// Never through im2col: its zeros beside the gradient, times a weight that is not finite, would
// give NaN where there is no product.
inline Correlation backward_correlation(const Conv2dGeometry& g) {
  Correlation result{g.N,
                     g.groups,
                     g.outputs_per_group(),
                     g.channels_per_group(),
                     g.OH,
                     g.OW,
                     g.H,
                     g.W,
                     g.stride_h,
                     g.stride_w,
                     /*from_outputs=*/true,
                     g.S};
  result.places.assign(static_cast<size_t>(g.R * g.S), -1);
  for (int64_t a = 0; a < std::min(g.stride_h, g.H); ++a)
    for (int64_t b = 0; b < std::min(g.stride_w, g.W); ++b)
      result.add(backward_axis(g.OH, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h, a),
                 backward_axis(g.OW, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w, b), a, b);
  return result;
}

}  // namespace dlops::cpu
