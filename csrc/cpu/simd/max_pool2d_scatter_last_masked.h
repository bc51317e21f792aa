// The gradient of each input of a channels_last image with AVX-512, for windows whose cells are
// bytes: that of each window that chose it. Lanes are channels.
#pragma once

#include <cstdint>

#include "cpu/simd/byte_windows.h"
#include "cpu/simd/channel_blocks.h"
#include "cpu/simd/pool_ranges.h"

namespace dlops::cpu {
namespace {

template <class scalar_t>
struct MaskedLastScatter {
  using T = work_t<scalar_t, uint8_t>;
  static constexpr int64_t lanes = kLanes<scalar_t, uint8_t>;
  using Values = Vector<T, lanes>;

  // The windows along one axis that hold an input: where their gradients are, and what the input
  // adds to its cell's number.
  struct HoldingWindows {
    int64_t count = 0;
    struct {
      int64_t at, cell;
    } of[kMaxByteCells];

    HoldingWindows(Holders holders, int64_t step, int64_t cell_step) {
      for (; holders.valid(); holders.next())
        of[count++] = {holders.output() * step, holders.offset() * cell_step};
    }
  };

  // The inputs of one pixel, which so many columns of windows hold: 0 for any number.
  template <int64_t count_w>
  C10_ALWAYS_INLINE static void sum_pixel(const Pool2dGeometry& g, const HoldingWindows& rows,
                                          const HoldingWindows& columns,
                                          const scalar_t* grad_output, const uint8_t* cells,
                                          const Writer& writer, scalar_t* grad_input) {
    for_each_channel_block<lanes>(g.C, [&](int64_t c, auto blocks, int64_t count) {
      Values sums[blocks] = {};
      const auto add_window = [&](int64_t i, int64_t j) {
        const int64_t at = rows.of[i].at + columns.of[j].at + c;
        const __m128i ids = byte_cells(g.first_cell + rows.of[i].cell + columns.of[j].cell);
        unrolled<blocks>([&](auto b) {
          const uint8_t* here = cells + at + b * lanes;
          const bool whole = blocks > 1 || count >= lanes;
          const __mmask16 mine =
              whole ? equal_cells<lanes>(here, ids)
                    : equal_cells(here, static_cast<__mmask16>((1 << count) - 1), ids);
          add(load_block<T, lanes, blocks>(grad_output + at, b, count), mine, sums[b]);
        });
      };
      for (int64_t i = 0; i < rows.count; ++i)
        repeated<count_w>(columns.count, [&](auto j) { add_window(i, j); });
      unrolled<blocks>([&](auto b) {
        writer.store<lanes>(sums[b], grad_input + c + b * lanes, count - b * lanes);
      });
    });
  }
};

// Input rows [ih0, ih1) of an image.
template <class scalar_t>
DLOPS_FLATTEN void max_pool2d_scatter_last_masked(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                                                  const scalar_t* grad_output, const uint8_t* cells,
                                                  scalar_t* grad_input) {
  using Scatter = MaskedLastScatter<scalar_t>;
  const Writer writer(g.N * g.C * g.H * g.W * static_cast<int64_t>(sizeof(scalar_t)));
  for (int64_t ih = ih0; ih < ih1; ++ih) {
    const typename Scatter::HoldingWindows rows(rows_holding(g, ih), g.OW * g.C, g.cell_step);
    for (int64_t iw = 0; iw < g.W; ++iw) {
      const typename Scatter::HoldingWindows columns(columns_holding(g, iw), g.C, 1);
      scalar_t* const to = grad_input + (ih * g.W + iw) * g.C;
      if (columns.count == 3) {
        Scatter::template sum_pixel<3>(g, rows, columns, grad_output, cells, writer, to);
      } else {
        Scatter::template sum_pixel<0>(g, rows, columns, grad_output, cells, writer, to);
      }
    }
  }
}

}  // namespace
}  // namespace dlops::cpu
