// Convolution without im2col, for few input channels: each kernel cell is a shift of a whole plane.
//
// A channel is padded and split by the stride into stride_h x stride_w phase planes: phase (a, b)
// holds the padded rows h = a (mod stride_h) and columns w = b (mod stride_w). A window of one row
// or column meets the first ones alone. All of them and the
// output have the same distance `pitch` between rows, so that the input of output pixel
// i = oh * pitch + ow under kernel cell (r, s) lies in one phase plane at i plus a constant. The
// columns from OW to pitch are computed as well, and dropped.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv2d_math.h"

namespace dlops::cpu {

// Vectors read and write up to this many elements past the end of a plane.
constexpr int64_t kPlaneSlack = 32;

struct PlaneLayout {
  int64_t phases_h, phases_w;  // that the window meets
  int64_t reach_h, reach_w;    // how far it reaches within a phase plane
  int64_t pitch;

  DLOPS_HOST_DEVICE explicit PlaneLayout(const Conv2dGeometry& g)
      : phases_h(g.R == 1 ? 1 : g.stride_h),
        phases_w(g.S == 1 ? 1 : g.stride_w),
        reach_h((g.R - 1) * g.dilation_h / g.stride_h),
        reach_w((g.S - 1) * g.dilation_w / g.stride_w),
        pitch(g.OW + reach_w) {}
  // The zeros at the right of a row are those at the left of the next one. A plane's last row then
  // reads kSharedZeros elements at most past its end, which are to be zero.
  static constexpr int64_t kSharedZeros = 16;
  static PlaneLayout with_shared_zeros(const Conv2dGeometry& g) {
    PlaneLayout layout(g);
    if (g.stride_w != 1) return layout;
    const int64_t right = std::max<int64_t>(0, layout.pitch - g.pad_left - g.W);
    layout.pitch -= std::min({g.pad_left, right, layout.reach_w, kSharedZeros});
    return layout;
  }
  // Wide strides make many small planes, and wide dilations many columns that are dropped.
  DLOPS_HOST_DEVICE bool compact(const Conv2dGeometry& g) const {
    return g.stride_h <= 4 && g.stride_w <= 4 && reach_w <= 2 * g.OW + 8 && reach_h <= 2 * g.OH + 8;
  }
  // Elements of one phase plane that serves `rows` output rows.
  DLOPS_HOST_DEVICE int64_t phase_size(int64_t rows) const { return (rows + reach_h) * pitch; }
  // Of all phase planes of a channel.
  DLOPS_HOST_DEVICE int64_t channel_size(int64_t rows) const {
    return phases_h * phases_w * phase_size(rows);
  }
  // Where output pixel 0 meets the cell (r, s), within the channel's phase planes.
  DLOPS_HOST_DEVICE int64_t offset(const Conv2dGeometry& g, int64_t rows, int64_t r,
                                   int64_t s) const {
    const int64_t h = r * g.dilation_h, w = s * g.dilation_w;
    return (h % g.stride_h * phases_w + w % g.stride_w) * phase_size(rows) +
           h / g.stride_h * pitch + w / g.stride_w;
  }
};

// The phase planes of one channel for the output rows [row0, row0 + rows).
template <int capability, class image_t, class sum_t>
void fill_phases(const Conv2dGeometry& g, const PlaneLayout& layout, const image_t* image,
                 int64_t row0, int64_t rows, sum_t* phases);

// The rows [row0, row0 + rows) of one channel of grad_output with zeros between OW and pitch; rows
// outside the image are zero.
template <int capability, class image_t, class sum_t>
void fill_gradient(const Conv2dGeometry& g, const PlaneLayout& layout, const image_t* grad,
                   int64_t row0, int64_t rows, sum_t* plane);

// out[j][i] = bias[j] + sum over t of weights[j][t] * sources[t][i], for i < count. The rows of out
// are `ld` apart; bias may be null.
template <int capability, class sum_t>
void stencil(const sum_t* const* sources, int64_t terms, const sum_t* weights, const sum_t* bias,
             int64_t outputs, int64_t count, sum_t* out, int64_t ld);

// sums[j][t] += sum over rows and i < cols of a[j][row][i] * b[t][row][i]; rows of a and b are
// a_pitch and b_pitch apart.
template <int capability, class sum_t>
void correlate(const sum_t* const* a, int64_t outputs, int64_t a_pitch, const sum_t* const* b,
               int64_t terms, int64_t b_pitch, int64_t rows, int64_t cols, double* sums);

// The first OW columns of `rows` rows of a plane, as a dense image.
template <int capability, class sum_t, class image_t>
void store_rows(const Conv2dGeometry& g, const sum_t* plane, int64_t rows, image_t* image);

// One phase plane of grad_input, its rows from row0, to where they stand in the image.
template <int capability, class sum_t, class image_t>
void store_phase(const Conv2dGeometry& g, const sum_t* plane, int64_t phase_h, int64_t phase_w,
                 int64_t row0, int64_t rows, image_t* image);

}  // namespace dlops::cpu
