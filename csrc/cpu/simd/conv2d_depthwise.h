// Depthwise convolution of channels_last tensors: vectors run over channels.
//
// Forward and grad_input are the same sum over taps, seen from the output or from the input: a
// destination row or column meets some source rows or columns, each under one kernel row or column.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

#include "conv2d_math.h"

namespace dlops::cpu {

struct Tap {
  int64_t source, cell;
};

// Neighbouring destinations `first`, `first + step`, ... that meet the same kernel cells, their
// sources `source_step` apart.
struct TapRun {
  int64_t first, step, count, source_step;
  const Tap* taps;
  int64_t tap_count;
};

// For each destination row in [row0, row1) and every run of columns:
//   to[h][w][c] = bias[c] + sum over the taps of from[h'][w'][c] * weight[r][s][c]
// summed in T, the type of weight and bias. `rows` holds one run of count 1 for each row; bias may
// be null.
struct DepthwiseSum {
  const TapRun *rows, *cols;
  int64_t col_runs;
  int64_t from_width, to_width;
  int64_t S, C;
};
template <int capability, class scalar_t, class T>
void sum_taps(const DepthwiseSum& d, int64_t row0, int64_t row1, const scalar_t* from,
              const T* weight, const T* bias, scalar_t* to);

// sums[r][s][c] += sum over the pixels of one image of grad[oh][ow][c] * input[ih][iw][c], for the
// channels [c0, c1).
template <int capability, class scalar_t>
void correlate_channels(const Conv2dGeometry& g, const scalar_t* grad, const scalar_t* input,
                        int64_t c0, int64_t c1, double* sums);

}  // namespace dlops::cpu
