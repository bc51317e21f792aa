// Which rows and columns of the image a window holds, and which windows hold a row or a column.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/division.h"
#include "max_pool2d_math.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// The kernel rows [begin, end) that lie in the image for output row oh.
struct Range {
  int64_t begin, end;
};
inline Range rows_inside(const Pool2dGeometry& g, int64_t oh) {
  const int64_t start = g.input_row(oh, 0);
  return {first_offset_inside(start, g.dilation_h),
          offsets_before(start, g.dilation_h, g.kernel_h, g.H)};
}
// The same for the kernel columns of output column ow.
inline Range columns_inside(const Pool2dGeometry& g, int64_t ow) {
  const int64_t start = g.input_col(ow, 0);
  return {first_offset_inside(start, g.dilation_w),
          offsets_before(start, g.dilation_w, g.kernel_w, g.W)};
}

// The windows along one axis that hold input `i`, one after the other.
class Holders {
 public:
  Holders(int64_t i, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel,
          int64_t outputs)
      : position_(i + padding),
        stride_(stride),
        dilation_(dilation),
        kernel_(kernel),
        outputs_(outputs) {
    if (dilation == 1) {
      // A position before the first window is in none: its offset is negative, its output too.
      output_ = position_ < 0 ? -1 : std::min(quotient(position_, stride), outputs - 1);
      offset_ = position_ - output_ * stride;
    } else {
      offset_ = -1;
      next();
    }
  }
  bool valid() const { return offset_ < kernel_ && output_ >= 0; }
  int64_t output() const { return output_; }
  int64_t offset() const { return offset_; }  // of the input in the kernel
  void next() {
    if (dilation_ == 1) {
      offset_ += stride_;
      --output_;
      return;
    }
    int64_t start = 0;
    bool between = false;  // two windows
    do {
      start = position_ - ++offset_ * dilation_;
      output_ = start < 0 ? -1 : quotient(start, stride_);
      between = start != output_ * stride_;
    } while (offset_ < kernel_ && start >= 0 && (between || output_ >= outputs_));
  }

 private:
  int64_t position_, stride_, dilation_, kernel_, outputs_;
  int64_t offset_ = 0, output_ = 0;
};
inline Holders rows_holding(const Pool2dGeometry& g, int64_t ih) {
  return {ih, g.stride_h, g.pad_h, g.dilation_h, g.kernel_h, g.OH};
}
inline Holders columns_holding(const Pool2dGeometry& g, int64_t iw) {
  return {iw, g.stride_w, g.pad_w, g.dilation_w, g.kernel_w, g.OW};
}

}  // namespace
}  // namespace dlops::cpu
