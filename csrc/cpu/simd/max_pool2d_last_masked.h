// The best of each window of a channels_last image with AVX-512, for windows whose cells are bytes:
// lanes are channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/byte_windows.h"
#include "cpu/simd/channel_blocks.h"
#include "cpu/simd/pool_ranges.h"

namespace dlops::cpu {
namespace {

// `numbered`: whether the cells are wanted.
template <class scalar_t, bool numbered>
struct MaskedLastWindows {
  using T = work_t<scalar_t, uint8_t>;
  static constexpr int64_t lanes = kLanes<scalar_t, uint8_t>;
  using Values = Vector<T, lanes>;

  // A window's cells in the image: how many, how far apart, and how they are numbered.
  struct Cells {
    const scalar_t* values;  // of the first one
    int64_t rows, columns, row_step, column_step, first, step;
  };
  // The windows of one pixel, of so many columns: 0 for any number. Unless values may be `any`,
  // they are looked at for NaN from row `fresh` on; returns the lanes that have any.
  template <int64_t columns, bool any>
  C10_ALWAYS_INLINE static __mmask16 windows_at(const Cells& in, int64_t fresh, int64_t channels,
                                                scalar_t* output, uint8_t* cells) {
    __mmask16 nan = 0;
    for_each_channel_block<lanes>(channels, [&](int64_t c, auto blocks, int64_t count) {
      ByteWindows<T, any, numbered> windows[blocks];
      unrolled<blocks>(
          [&](auto b) { windows[b] = {fill<T, lanes>(lowest<T>()), byte_cells(in.first)}; });
      const auto visit_row = [&](int64_t i, auto looks) {
        const scalar_t* from = in.values + i * in.row_step + c;
        // Counted in a register: made of a number, it would be made anew for each vector.
        __m128i id = byte_cells(in.first + i * in.step);
        const auto visit = [&] {
          unrolled<blocks>([&](auto b) {
            const Values values = load_block<T, lanes, blocks>(from, b, count);
            windows[b].visit(values, id);
            if (looks) nan |= unordered(values, values);
          });
          from += in.column_step;
          id = _mm_add_epi8(id, byte_cells(1));
        };
        repeated<columns>(in.columns, [&](auto) { visit(); });
      };
      int64_t i = 0;
      for (; i < std::min(fresh, in.rows); ++i) visit_row(i, std::false_type());
      for (; i < in.rows; ++i) visit_row(i, std::bool_constant<!any>());
      unrolled<blocks>(
          [&](auto b) { windows[b].store(output, cells, c + b * lanes, count - b * lanes); });
    });
    return nan;
  }

  template <bool any>
  DLOPS_FLATTEN static bool row_of_windows(const Pool2dGeometry& g, int64_t oh, Range rows,
                                           int64_t fresh, const scalar_t* input, scalar_t* output,
                                           uint8_t* cells) {
    Cells in;
    in.rows = rows.end - rows.begin;
    in.row_step = g.dilation_h * g.W * g.C;
    in.column_step = g.dilation_w * g.C;
    in.step = g.cell_step;
    __mmask16 nan = 0;
    for (int64_t ow = 0; ow < g.OW; ++ow) {
      const Range columns = columns_inside(g, ow);
      in.columns = columns.end - columns.begin;
      in.values =
          input + (g.input_row(oh, rows.begin) * g.W + g.input_col(ow, columns.begin)) * g.C;
      in.first = g.cell_number(rows.begin, columns.begin);
      scalar_t* const to = output + ow * g.C;
      uint8_t* const to_cells = numbered ? cells + ow * g.C : nullptr;
      nan |= in.columns == 3 ? windows_at<3, any>(in, fresh, g.C, to, to_cells)
                             : windows_at<0, any>(in, fresh, g.C, to, to_cells);
    }
    return nan != 0;
  }

  // Output rows [oh0, oh1) of an image. What a row of windows is the first to see is looked at for
  // NaN with it; where there are some, the row is done again, and the next ones that hold these.
  static void run(const Pool2dGeometry& g, int64_t oh0, int64_t oh1, const scalar_t* input,
                  scalar_t* output, uint8_t* cells) {
    int64_t seen = 0, any_end = 0;  // where the rows end that were looked at, that may hold any
    const bool flushes = flushes_denormals();
    for (int64_t oh = oh0; oh < oh1; ++oh) {
      const Range rows = rows_inside(g, oh);
      const int64_t begin = g.input_row(oh, rows.begin);
      const int64_t end = g.input_row(oh, rows.end - 1) + 1;
      const int64_t fresh = g.dilation_h == 1 ? std::max<int64_t>(0, seen - begin) : 0;
      scalar_t* const to = output + oh * g.OW * g.C;
      uint8_t* const to_cells = numbered ? cells + oh * g.OW * g.C : nullptr;
      if (flushes || row_of_windows<false>(g, oh, rows, fresh, input, to, to_cells)) any_end = end;
      if (begin < any_end) row_of_windows<true>(g, oh, rows, 0, input, to, to_cells);
      seen = end;
    }
  }
};

template <class scalar_t>
void max_pool2d_last_masked(const Pool2dGeometry& g, int64_t oh0, int64_t oh1,
                            const scalar_t* input, scalar_t* output, uint8_t* cells) {
  const auto run = cells == nullptr ? MaskedLastWindows<scalar_t, false>::run
                                    : MaskedLastWindows<scalar_t, true>::run;
  run(g, oh0, oh1, input, output, cells);
}

}  // namespace
}  // namespace dlops::cpu
