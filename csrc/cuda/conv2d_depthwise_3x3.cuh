// Depthwise convolution by kernels of 3 x 3, the usual ones, with an output a channel: unrolled, so
// that what a thread reads is on its way at once, and read once for several outputs.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

#include "conv2d_math.h"
#include "cuda/block.cuh"
#include "cuda/conv2d_depthwise_weight.cuh"
#include "cuda/tiles.cuh"
#include "cuda/windows.cuh"

namespace dlops::cuda {

inline bool is_3x3(const Conv2dGeometry& g, int64_t stride) {
  constexpr int64_t limit = 1 << 28;
  return g.outputs_per_group() == 1 && g.R == 3 && g.S == 3 && g.dilation_h == 1 &&
         g.dilation_w == 1 && g.stride_h == stride && g.stride_w == stride && g.H < limit &&
         g.W < limit && g.OH < limit / 2 && g.OW < limit / 2;
}

// The convolution of grad_output, of stride 1 and with turned taps, that gives the gradient of the
// input.
inline Conv2dGeometry turned_3x3(const Conv2dGeometry& g) {
  Conv2dGeometry turned = g;
  turned.H = g.OH;
  turned.W = g.OW;
  turned.OH = g.H;
  turned.OW = g.W;
  turned.pad_top = 2 - g.pad_top;
  turned.pad_left = 2 - g.pad_left;
  return turned;
}

// Which of the weight's taps is the first of a window, and the step to the next.
struct TapOrder {
  int first, step;
};

// A pack of some neighbouring outputs of a row per index.
template <class scalar_t, class Packs, int stride>
struct Depthwise3x3 {
  using T = at::opmath_type<scalar_t>;
  using Values = typename Packs::template Values<scalar_t>;
  static constexpr int kAcross = Packs::channels_last ? 4 : 1;  // outputs
  static constexpr int kColumns = (kAcross - 1) * stride + 3;   // which they see
  static constexpr int width = Packs::width;

  Conv2dGeometry g;
  Packs outputs;  // each first of kAcross
  DepthwiseWeight<scalar_t, Packs> weight;
  TapOrder order;
  const scalar_t* input;
  const scalar_t* bias;  // or null
  scalar_t* output;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Pack at = outputs[i];
    const auto channels = weight.channels_of(at);
    const int64_t pixels = g.H * g.W, step = outputs.pixel_step();
    const int row = static_cast<int>(at.row * stride - g.pad_top);
    const int col = static_cast<int>(at.col * kAcross * stride - g.pad_left);
    const scalar_t* const first = input + outputs.start(at, pixels) + (row * g.W + col) * step;
    T sums[kAcross][width] = {};
    DLOPS_UNROLL
    for (int r = 0; r < 3; ++r) {
      if (!g.row_inside(row + r)) continue;
      Values values[kColumns] = {};
      DLOPS_UNROLL
      for (int c = 0; c < kColumns; ++c)
        if (g.col_inside(col + c))
          outputs.load(values[c], first + (r * g.W + c) * step, at, pixels);
      DLOPS_UNROLL
      for (int s = 0; s < 3; ++s) {
        const Values tap = weight.load(channels, order.first + (r * 3 + s) * order.step);
        DLOPS_UNROLL
        for (int o = 0; o < kAcross; ++o) {
          // The padding is not multiplied: an infinite weight would make a NaN of it.
          if (!g.col_inside(col + o * stride + s)) continue;
          DLOPS_UNROLL
          for (int j = 0; j < width; ++j)
            sums[o][j] += static_cast<T>(values[o * stride + s].of[j]) * static_cast<T>(tap.of[j]);
        }
      }
    }
    write(sums, at, channels, step);
  }

  DLOPS_HOST_DEVICE void write(const T (&sums)[kAcross][width], const Pack& at,
                               const typename DepthwiseWeight<scalar_t, Packs>::Channels& channels,
                               int64_t step) const {
    const int64_t pixels = g.OH * g.OW, ow = at.col * kAcross;
    T added[width] = {};
    if (bias != nullptr) {
      DLOPS_UNROLL
      for (int j = 0; j < width; ++j) added[j] = static_cast<T>(bias[channels.of[j]]);
    }
    scalar_t* const to = output + outputs.start(at, pixels) + (at.row * g.OW + ow) * step;
    DLOPS_UNROLL
    for (int o = 0; o < kAcross; ++o) {
      if (ow + o >= g.OW) return;
      Values values;
      DLOPS_UNROLL
      for (int j = 0; j < width; ++j) values.of[j] = static_cast<scalar_t>(sums[o][j] + added[j]);
      outputs.store(values, to + o * step, at, pixels);
    }
  }
};

// The sums of the weights' gradients over parts of the output's rows, in channels_last. A tile has
// a slab of channels, kWidth to a thread. As many lanes go along a row each, with the window's
// three rows of input in registers, and are added up at the end.
template <class scalar_t, int stride>
struct DepthwiseGradWeightTiles {
  using T = at::opmath_type<scalar_t>;
  static constexpr int kThreads = 256, kBlocks = sizeof(T) == 8 ? 1 : 2;
  static constexpr int kWidth = 4, kPacks = 16, kLanes = kThreads / kPacks;
  static constexpr int kChannels = kPacks * kWidth;
  static constexpr int kSharedBytes = 9 * kThreads * kWidth * static_cast<int>(sizeof(T));

  Conv2dGeometry g;
  int64_t part_rows, parts;  // rows of the output, of all images
  const scalar_t* grad_output;
  const scalar_t* input;
  T* sums;  // (parts, taps, O)

  struct alignas(kWidth * sizeof(scalar_t)) Values {
    scalar_t of[kWidth];
  };
  struct Numbers {
    T of[kWidth];
  };
  // What a thread sums and sees: the window's rows in the image, and columns of it.
  struct Sums {
    Numbers taps[3][3];
  };
  struct Cells {
    Numbers at[3][3];
  };
  struct Rows {
    const scalar_t* grad;
    const scalar_t* image;
    int row;
  };

  DLOPS_HOST_DEVICE int64_t slabs() const { return tiles_of(g.O, kChannels); }
  DLOPS_HOST_DEVICE int64_t count() const { return parts * slabs(); }

  DLOPS_DEVICE static Numbers load(const scalar_t* from) {
    const Values values = *reinterpret_cast<const Values*>(from);
    Numbers numbers;
    DLOPS_UNROLL
    for (int j = 0; j < kWidth; ++j) numbers.of[j] = static_cast<T>(values.of[j]);
    return numbers;
  }

  // Column `to` of the window: that of the image.
  DLOPS_DEVICE void see(Cells& cells, int to, const Rows& rows, int col) const {
    DLOPS_UNROLL
    for (int r = 0; r < 3; ++r) {
      cells.at[r][to] = Numbers{};
      if (g.row_inside(rows.row + r) && g.col_inside(col))
        cells.at[r][to] = load(rows.image + (r * g.W + col) * g.C);
    }
  }

  // Where the window is cut off, what is outside is not multiplied: an infinite gradient would make
  // a NaN of it.
  template <bool cut_off>
  DLOPS_DEVICE void add(Sums& own, const Cells& cells, const Numbers& grad, int row,
                        int col) const {
    DLOPS_UNROLL
    for (int r = 0; r < 3; ++r) DLOPS_UNROLL
    for (int s = 0; s < 3; ++s) {
      if (cut_off && !(g.row_inside(row + r) && g.col_inside(col + s))) continue;
      DLOPS_UNROLL
      for (int j = 0; j < kWidth; ++j) own.taps[r][s].of[j] += grad.of[j] * cells.at[r][s].of[j];
    }
  }

  DLOPS_DEVICE void add_row(Sums& own, const Rows& rows) const {
    const bool whole = g.row_inside(rows.row) && g.row_inside(rows.row + 2);
    const int left = -static_cast<int>(g.pad_left);
    Cells cells{};
    DLOPS_UNROLL
    for (int s = stride; s < 3; ++s) see(cells, s, rows, left + s - stride);
    for (int ow = 0; ow < static_cast<int>(g.OW); ++ow) {
      const int col = left + ow * stride;
      DLOPS_UNROLL
      for (int r = 0; r < 3; ++r) DLOPS_UNROLL
      for (int s = 0; s < 3 - stride; ++s) cells.at[r][s] = cells.at[r][s + stride];
      DLOPS_UNROLL
      for (int s = 3 - stride; s < 3; ++s) see(cells, s, rows, col + s);
      const Numbers grad = load(rows.grad + ow * g.O);
      if (whole && g.col_inside(col) && g.col_inside(col + 2)) {
        add<false>(own, cells, grad, rows.row, col);
      } else {
        add<true>(own, cells, grad, rows.row, col);
      }
    }
  }

  DLOPS_DEVICE void add_rows(Sums& own, int64_t part, int64_t channel, int lane) const {
    const int64_t end = (part + 1) * part_rows, all = g.N * g.OH;
    for (int64_t i = part * part_rows + lane; i < end && i < all; i += kLanes) {
      const int64_t n = divide(i, static_cast<int>(g.OH)), oh = i - n * g.OH;
      const int row = static_cast<int>(g.input_row(oh, 0));
      add_row(own, {grad_output + i * g.OW * g.O + channel,
                    input + (n * g.H + row) * g.W * g.C + channel, row});
    }
  }

  template <class Block>
  DLOPS_DEVICE void operator()(Block& block, unsigned char* shared, int64_t tile) const {
    const int64_t part = tile / slabs(), first = (tile - part * slabs()) * kChannels;
    T* const lanes = reinterpret_cast<T*>(shared);  // (taps, lanes, channels)
    block.threads([&](int thread) {
      const int channel = thread % kPacks * kWidth, lane = thread / kPacks;
      Sums own{};
      if (first + channel < g.O) add_rows(own, part, first + channel, lane);
      DLOPS_UNROLL
      for (int tap = 0; tap < 9; ++tap) DLOPS_UNROLL
      for (int j = 0; j < kWidth; ++j)
        lanes[(tap * kLanes + lane) * kChannels + channel + j] = own.taps[tap / 3][tap % 3].of[j];
    });
    block.sync();
    block.threads([&](int thread) {
      for (int i = thread; i < 9 * kChannels; i += kThreads) {
        const int tap = i / kChannels, channel = i % kChannels;
        if (first + channel >= g.O) continue;
        T sum(0);
        for (int lane = 0; lane < kLanes; ++lane)
          sum += lanes[(tap * kLanes + lane) * kChannels + channel];
        sums[(part * 9 + tap) * g.O + first + channel] = sum;
      }
    });
  }
};

}  // namespace dlops::cuda
