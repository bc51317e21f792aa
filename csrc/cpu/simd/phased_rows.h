// Rows of an image, padded and split by the horizontal stride, so that the inputs that neighbouring
// windows see at the same kernel column stand next to each other, and every loop over output
// columns is a plain vector loop whatever the stride, padding and dilation.
//
// Padded column x = input column + pad_w is element x / stride of phase x % stride. Output column
// ow meets kernel column s at padded column ow * stride + s * dilation, hence at element ow +
// offset(s) - phase start, of one phase for all ow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/simd/rounded.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// Elements that a vector loop may touch past the last output column.
constexpr int64_t kRowSlack = 64;

// The horizontal part of a window's geometry.
struct RowGeometry {
  int64_t W, OW, kernel_w, stride_w, pad_w, dilation_w;
};

class PhasedRows {
 public:
  explicit PhasedRows(const RowGeometry& g)
      : g_(g),
        width_(g.OW + (g.kernel_w - 1) * g.dilation_w / g.stride_w + 1 + kRowSlack),
        phases_(std::min(g.stride_w, (g.kernel_w - 1) * g.dilation_w + 1)) {}

  // Elements of one phased row: `phases` parts of `stored_width`, of which windows reach `width`.
  int64_t size() const { return width_ * phases_; }
  int64_t phases() const { return phases_; }
  int64_t stored_width() const { return width_; }
  int64_t width() const { return width_ - kRowSlack; }
  // Where the row's elements for kernel column s begin: element ow is output column ow's.
  int64_t offset(int64_t s) const {
    const int64_t x = s * g_.dilation_w;
    return x % g_.stride_w * width_ + x / g_.stride_w;
  }

  // Splits an input row. What is padding stays as it was.
  template <class from_t, class to_t>
  void split(const from_t* row, to_t* phased) const {
    for_each_phase([&](int64_t first, int64_t count, int64_t at) {
      const from_t* from = row + first;
      to_t* to = phased + at;
      if (g_.stride_w == 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<to_t>(from[i]);
      } else if (g_.stride_w == 2) {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<to_t>(from[2 * i]);
      } else {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<to_t>(from[i * g_.stride_w]);
      }
    });
  }

  // The reverse; the row's columns that no window reaches get `unreached`.
  template <class from_t, class to_t>
  void join(const from_t* phased, to_t unreached, to_t* row) const {
    // Less than no padding: the first columns are in no window.
    if (phases_ == 2 && g_.stride_w == 2 && g_.pad_w >= 0)
      return join_pairs(phased, unreached, row);
    std::fill_n(row, g_.W, unreached);
    for_each_phase([&](int64_t first, int64_t count, int64_t at) {
      const from_t* from = phased + at;
      to_t* to = row + first;
      if (g_.stride_w == 1) {
        for (int64_t i = 0; i < count; ++i) to[i] = rounded<to_t>(from[i]);
      } else if (g_.stride_w == 2) {
        for (int64_t i = 0; i < count; ++i) to[2 * i] = rounded<to_t>(from[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) to[i * g_.stride_w] = rounded<to_t>(from[i]);
      }
    });
  }

 private:
  // For two phases: columns 2 i and 2 i + 1, each of a phase of its own, one after the other.
  template <class from_t, class to_t>
  void join_pairs(const from_t* phased, to_t unreached, to_t* row) const {
    const int64_t even = g_.pad_w % 2, skipped = g_.pad_w / 2;
    const from_t* a = phased + even * width_ + skipped;
    const from_t* b = phased + (1 - even) * width_ + skipped + even;
    // Padded column x is element x / 2, of which there are `width`.
    const int64_t reached = std::clamp<int64_t>(2 * width() - g_.pad_w, 0, g_.W);
    int64_t i = 0;
    for (; 2 * i + 1 < reached; ++i) {
      row[2 * i] = rounded<to_t>(a[i]);
      row[2 * i + 1] = rounded<to_t>(b[i]);
    }
    if (2 * i < reached) row[2 * i] = rounded<to_t>(a[i]);
    std::fill(row + reached, row + g_.W, unreached);
  }

  // Calls f(first input column, how many, where they begin in the phased row) for each phase.
  template <class F>
  void for_each_phase(const F& f) const {
    const int64_t stride = g_.stride_w;
    for (int64_t phase = 0; phase < phases_; ++phase) {
      // The first padded column of this phase that lies in the image.
      const int64_t skipped = g_.pad_w > phase ? (g_.pad_w - phase + stride - 1) / stride : 0;
      const int64_t first = phase + skipped * stride - g_.pad_w;
      if (first >= g_.W) continue;
      const int64_t count =
          std::min((g_.W - first + stride - 1) / stride, width_ - kRowSlack - skipped);
      if (count > 0) f(first, count, phase * width_ + skipped);
    }
  }

  const RowGeometry g_;
  int64_t width_;
  int64_t phases_;  // those that a window meets: a long stride skips the rest
};

}  // namespace
}  // namespace dlops::cpu
