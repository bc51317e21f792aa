// Max pooling by the usual square windows, whose size is known when it is compiled: all that a
// thread reads is on its way before the first comparison.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>
#include <limits>

#include "common/cuda_utils.cuh"
#include "cuda/windows.cuh"
#include "max_pool2d_math.h"

namespace dlops::cuda {

template <int kernel, int stride>
struct Square {};

// Whether windows are squares of `kernel` neighbouring cells, `stride` apart, of images whose
// positions are 32-bit numbers.
inline bool are_squares(const Pool2dGeometry& g, int64_t kernel, int64_t stride) {
  constexpr int64_t limit = 1 << 28;
  const auto is_square = [](int64_t h, int64_t w, int64_t size) { return h == size && w == size; };
  return is_square(g.kernel_h, g.kernel_w, kernel) && is_square(g.dilation_h, g.dilation_w, 1) &&
         is_square(g.stride_h, g.stride_w, stride) && g.H < limit && g.W < limit;
}

DLOPS_HOST_DEVICE bool is_inside(int position, int64_t size) {
  return static_cast<unsigned>(position) < static_cast<unsigned>(size);
}

// One pack of outputs per index: the maxima of its windows and, where `cells` is not null, the
// cells they stand in.
template <class scalar_t, class Packs, int kernel>
struct MaxPool2dSquares {
  using value_t = at::opmath_type<scalar_t>;  // holds every scalar_t exactly
  using Values = typename Packs::template Values<scalar_t>;
  using Cells = typename Packs::template Values<uint8_t>;
  Pool2dGeometry g;
  Packs outputs;
  const scalar_t* input;
  scalar_t* output;
  uint8_t* cells;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    using limits = std::numeric_limits<value_t>;
    const Pack at = outputs[i];
    const int row = static_cast<int>(g.input_row(at.row, 0));
    const int col = static_cast<int>(g.input_col(at.col, 0));
    const int64_t pixels = g.H * g.W, step = outputs.pixel_step();
    const scalar_t* const first = input + outputs.start(at, pixels) + (row * g.W + col) * step;
    Values window[kernel * kernel] = {};
    DLOPS_UNROLL
    for (int cell = 0; cell < kernel * kernel; ++cell) {
      const int r = cell / kernel, s = cell % kernel;
      if (is_inside(row + r, g.H) && is_inside(col + s, g.W))
        outputs.load(window[cell], first + (r * g.W + s) * step, at, pixels);
    }
    // The first cell inside is that of a window without any number above -inf.
    const int first_cell = (row < 0 ? -row : 0) * kernel + (col < 0 ? -col : 0);
    value_t best[Packs::width];
    Cells cell_of;
    DLOPS_UNROLL
    for (int j = 0; j < Packs::width; ++j) {
      best[j] = limits::has_infinity ? -limits::infinity() : limits::lowest();
      cell_of.of[j] = static_cast<uint8_t>(first_cell);
    }
    DLOPS_UNROLL
    for (int cell = 0; cell < kernel * kernel; ++cell) {
      if (!is_inside(row + cell / kernel, g.H) || !is_inside(col + cell % kernel, g.W)) continue;
      DLOPS_UNROLL
      for (int j = 0; j < Packs::width; ++j) {
        const auto value = static_cast<value_t>(window[cell].of[j]);
        const bool takes = takes_over(value, best[j]);
        best[j] = takes ? value : best[j];
        cell_of.of[j] = takes ? static_cast<uint8_t>(cell) : cell_of.of[j];
      }
    }
    Values values;
    DLOPS_UNROLL
    for (int j = 0; j < Packs::width; ++j) values.of[j] = static_cast<scalar_t>(best[j]);
    const int64_t to = outputs.start(at, g.OH * g.OW) + (at.row * g.OW + at.col) * step;
    outputs.store(values, output + to, at, g.OH * g.OW);
    if (cells != nullptr) outputs.store(cell_of, cells + to, at, g.OH * g.OW);
  }
};

// The gradients of stride x stride inputs per index, those which the same windows reach: the sums
// of the gradients of the windows that chose them.
template <class scalar_t, class Packs, int kernel, int stride>
struct ScatterSquares {
  using sum_t = at::opmath_type<scalar_t>;
  static constexpr int kReach = (kernel + stride - 1) / stride;  // windows along an axis
  static constexpr uint8_t kNowhere = 255;                       // no window's cell

  Packs squares;  // of inputs, from the start of the padding
  Pool2dGeometry g;
  const scalar_t* grad_output;
  const uint8_t* cells;
  scalar_t* grad_input;

  static Packs squares_of(const Pool2dGeometry& g) {
    return Packs(g.N, g.C, (g.H + g.pad_h + stride - 1) / stride,
                 (g.W + g.pad_w + stride - 1) / stride);
  }

  // Window (h, w) before the square's own.
  struct Window {
    typename Packs::template Values<uint8_t> cell;
    typename Packs::template Values<scalar_t> grad;
  };

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Pack at = squares[i];
    const int64_t pixels = g.OH * g.OW, step = squares.pixel_step();
    const int64_t start = squares.start(at, pixels);
    Window windows[kReach][kReach] = {};
    DLOPS_UNROLL
    for (int h = 0; h < kReach; ++h) DLOPS_UNROLL
    for (int w = 0; w < kReach; ++w) {
      Window& window = windows[h][w];
      const int oh = static_cast<int>(at.row) - h, ow = static_cast<int>(at.col) - w;
      DLOPS_UNROLL
      for (int j = 0; j < Packs::width; ++j) window.cell.of[j] = kNowhere;
      if (!is_inside(oh, g.OH) || !is_inside(ow, g.OW)) continue;
      const int64_t from = start + (oh * g.OW + ow) * step;
      squares.load(window.cell, cells + from, at, pixels);
      squares.load(window.grad, grad_output + from, at, pixels);
    }
    DLOPS_UNROLL
    for (int a = 0; a < stride; ++a) DLOPS_UNROLL
    for (int b = 0; b < stride; ++b) add_up(windows, at, a, b);
  }

  // The input in row a and column b of the square, in rising order of its windows.
  DLOPS_HOST_DEVICE void add_up(const Window (&windows)[kReach][kReach], const Pack& at, int a,
                                int b) const {
    const int row = static_cast<int>(at.row * stride + a - g.pad_h);
    const int col = static_cast<int>(at.col * stride + b - g.pad_w);
    if (!is_inside(row, g.H) || !is_inside(col, g.W)) return;
    sum_t sums[Packs::width] = {};
    DLOPS_UNROLL
    for (int h = kReach - 1; h >= 0; --h) DLOPS_UNROLL
    for (int w = kReach - 1; w >= 0; --w) {
      const int r = a + h * stride, s = b + w * stride;
      if (r >= kernel || s >= kernel) continue;
      const Window& window = windows[h][w];
      DLOPS_UNROLL
      for (int j = 0; j < Packs::width; ++j)
        if (window.cell.of[j] == r * kernel + s) sums[j] += static_cast<sum_t>(window.grad.of[j]);
    }
    typename Packs::template Values<scalar_t> values;
    DLOPS_UNROLL
    for (int j = 0; j < Packs::width; ++j) values.of[j] = static_cast<scalar_t>(sums[j]);
    const int64_t to = squares.start(at, g.H * g.W) + (row * g.W + col) * squares.pixel_step();
    squares.store(values, grad_input + to, at, g.H * g.W);
  }
};

}  // namespace dlops::cuda
