// Which source positions an output position meets along one axis of a convolution, and how outputs
// that meet the same ones lie together. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "conv2d_math.h"

namespace dlops::cpu {

// Few enough that products with each kernel cell are thin, and im2col costs little where images are
// copied anyway.
inline bool has_few_channels(const Conv2dGeometry& g) {
  return g.R * g.S > 1 && g.channels_per_group() <= 8;
}

inline int64_t length(Interval i) { return i.end - i.begin; }
inline Interval intersect(Interval a, Interval b) {
  const int64_t begin = std::max(a.begin, b.begin);
  return {begin, std::max(begin, std::min(a.end, b.end))};
}

// Output position p of `outputs` meets the source at p * step + offsets[t], for each tap t, if that
// lies in [0, inputs). Offsets ascend. cells[t] is the tap's place in the kernel.
struct TapAxis {
  int64_t outputs, inputs, step;
  std::vector<int64_t> offsets, cells;

  int64_t taps() const { return static_cast<int64_t>(offsets.size()); }
  int64_t offset(int64_t t) const { return offsets[static_cast<size_t>(t)]; }
  int64_t cell(int64_t t) const { return cells[static_cast<size_t>(t)]; }
  // The outputs whose source position at tap t lies in the image.
  Interval inside(int64_t t) const {
    const int64_t shift = -offset(t);
    const int64_t begin = std::min(outputs, shift > 0 ? ceil_div(shift, step) : 0);
    const int64_t span = inputs + shift;
    const int64_t end = span > 0 ? std::min(outputs, ceil_div(span, step)) : 0;
    return {begin, std::max(begin, end)};
  }
};

// The forward pass: the output meets the input.
inline TapAxis forward_axis(int64_t outputs, int64_t inputs, int64_t kernel, int64_t stride,
                            int64_t pad, int64_t dilation) {
  TapAxis axis{outputs, inputs, stride, {}, {}};
  for (int64_t r = 0; r < kernel; ++r) {
    axis.offsets.push_back(r * dilation - pad);
    axis.cells.push_back(r);
  }
  return axis;
}

// The input's gradient at the positions phase, phase + stride, ...: the input meets the gradient of
// the output. Kernel cells that never meet it there have no tap.
inline TapAxis backward_axis(int64_t outputs, int64_t inputs, int64_t kernel, int64_t stride,
                             int64_t pad, int64_t dilation, int64_t phase) {
  TapAxis axis{ceil_div(std::max<int64_t>(0, inputs - phase), stride), outputs, 1, {}, {}};
  for (int64_t r = kernel - 1; r >= 0; --r) {
    const int64_t position = phase + pad - r * dilation;
    if (position % stride != 0) continue;
    axis.offsets.push_back(position / stride);
    axis.cells.push_back(r);
  }
  return axis;
}

// Without the taps that lie outside the image for every output.
inline TapAxis live(const TapAxis& axis) {
  TapAxis result{axis.outputs, axis.inputs, axis.step, {}, {}};
  for (int64_t t = 0; t < axis.taps(); ++t) {
    const Interval inside = axis.inside(t);
    if (inside.begin >= inside.end) continue;
    result.offsets.push_back(axis.offset(t));
    result.cells.push_back(axis.cell(t));
  }
  return result;
}

// Runs of taps that stand side by side in the source. Without `joined`, each stands by itself.
inline std::vector<Interval> adjacent_taps(const TapAxis& axis, bool joined) {
  std::vector<Interval> result;
  for (int64_t t = 0; t < axis.taps(); ++t) {
    if (joined && t > 0 && axis.offset(t) == axis.offset(t - 1) + 1) {
      ++result.back().end;
    } else {
      result.push_back({t, t + 1});
    }
  }
  return result;
}

// Outputs that meet the same taps, which stand side by side in the source.
struct Segment {
  Interval outputs, taps;
};

// All meetings along an axis. Without `joined`, each tap stands by itself.
inline std::vector<Segment> segments(const TapAxis& axis, bool joined) {
  std::vector<Segment> result;
  for (const auto [t0, t1] : adjacent_taps(axis, joined)) {
    int64_t p = std::min(axis.inside(t0).begin, axis.inside(t1 - 1).begin);
    const int64_t end = std::max(axis.inside(t0).end, axis.inside(t1 - 1).end);
    for (; p < end; ++p) {
      const int64_t first = p * axis.step + axis.offset(t0);
      const Interval taps{t0 + std::clamp<int64_t>(-first, 0, t1 - t0),
                          t0 + std::clamp<int64_t>(axis.inputs - first, 0, t1 - t0)};
      if (taps.begin >= taps.end) continue;
      if (!result.empty() && result.back().outputs.end == p &&
          result.back().taps.begin == taps.begin && result.back().taps.end == taps.end) {
        ++result.back().outputs.end;
      } else {
        result.push_back({{p, p + 1}, taps});
      }
    }
  }
  return result;
}

}  // namespace dlops::cpu
