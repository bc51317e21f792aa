// The geometry of a 2-D convolution and of im2col: sizes and index maps, free of torch, shared by
// the CPU and CUDA kernels.
//
// Letters: N images, C input channels, H x W input, O output channels, R x S kernel, OH x OW
// output. An output pixel (oh, ow) and a kernel cell (r, s) meet the input at row input_row(oh, r)
// and column input_col(ow, s), which may lie in the padding.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dlops {

struct Conv2dGeometry {
  int64_t N, C, H, W;
  int64_t O, R, S;
  int64_t OH, OW;
  int64_t stride_h, stride_w;
  // Padding below and to the right shows only in OH and OW.
  int64_t pad_top, pad_left;
  int64_t dilation_h, dilation_w;
  int64_t groups;

  DLOPS_HOST_DEVICE int64_t channels_per_group() const { return C / groups; }
  DLOPS_HOST_DEVICE int64_t outputs_per_group() const { return O / groups; }
  // Rows of one group's column matrix: C/groups * R * S.
  DLOPS_HOST_DEVICE int64_t column_rows() const { return channels_per_group() * R * S; }
  // Wraps round, as native's does, where a batch of no images has outputs without measure.
  DLOPS_HOST_DEVICE int64_t output_pixels() const {
    return static_cast<int64_t>(static_cast<uint64_t>(OH) * static_cast<uint64_t>(OW));
  }

  DLOPS_HOST_DEVICE int64_t input_row(int64_t oh, int64_t r) const {
    return oh * stride_h - pad_top + r * dilation_h;
  }
  DLOPS_HOST_DEVICE int64_t input_col(int64_t ow, int64_t s) const {
    return ow * stride_w - pad_left + s * dilation_w;
  }
  DLOPS_HOST_DEVICE bool row_inside(int64_t ih) const { return 0 <= ih && ih < H; }
  DLOPS_HOST_DEVICE bool col_inside(int64_t iw) const { return 0 <= iw && iw < W; }
};

// The half-open range of output columns ow whose input column input_col(ow, s) lies in the image.
struct Interval {
  int64_t begin, end;
};

DLOPS_HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

DLOPS_HOST_DEVICE Interval inside_columns(const Conv2dGeometry& g, int64_t s) {
  const int64_t shift = g.pad_left - s * g.dilation_w;  // input column = ow * stride_w - shift
  int64_t begin = shift > 0 ? ceil_div(shift, g.stride_w) : 0;
  const int64_t span = g.W + shift;  // ow * stride_w < span
  int64_t end = span > 0 ? ceil_div(span, g.stride_w) : 0;
  if (end > g.OW) end = g.OW;
  if (begin > end) begin = end;
  return {begin, end};
}

}  // namespace dlops
