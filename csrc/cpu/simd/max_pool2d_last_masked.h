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
  // The windows of one pixel, of so many columns: 0 for any number.
  template <int64_t columns, bool nans>
  C10_ALWAYS_INLINE static void windows_at(const Cells& in, int64_t channels, scalar_t* output,
                                           uint8_t* cells) {
    for_each_channel_block<lanes>(channels, [&](int64_t c, auto blocks, int64_t count) {
      ByteWindows<T, nans, numbered> windows[blocks];
      unrolled<blocks>([&](auto b) {
        windows[b] = {fill<T, lanes>(lowest<T>()), byte_cells(in.first)};
      });
      const scalar_t* row = in.values + c;
      for (int64_t i = 0; i < in.rows; ++i, row += in.row_step) {
        const scalar_t* from = row;
        // Counted in a register: made of a number, it would be made anew for each vector.
        __m128i id = byte_cells(in.first + i * in.step);
        const auto visit = [&] {
          unrolled<blocks>([&](auto b) {
            windows[b].visit(load_block<T, lanes, blocks>(from, b, count), id);
          });
          from += in.column_step;
          id = _mm_add_epi8(id, byte_cells(1));
        };
        if constexpr (columns > 0) {
          unrolled<columns>([&](auto) { visit(); });
        } else {
          for (int64_t j = 0; j < in.columns; ++j) visit();
        }
      }
      unrolled<blocks>(
          [&](auto b) { windows[b].store(output, cells, c + b * lanes, count - b * lanes); });
    });
  }

  // GCC would leave lambdas that are called in several places alone, and keep windows in memory.
  template <bool nans>
  __attribute__((flatten)) static void row_of_windows(const Pool2dGeometry& g, int64_t oh, Range rows,
                             const scalar_t* input, scalar_t* output, uint8_t* cells) {
    Cells in;
    in.rows = rows.end - rows.begin;
    in.row_step = g.dilation_h * g.W * g.C;
    in.column_step = g.dilation_w * g.C;
    in.step = g.cell_step;
    for (int64_t ow = 0; ow < g.OW; ++ow) {
      const Range columns = columns_inside(g, ow);
      in.columns = columns.end - columns.begin;
      in.values =
          input + (g.input_row(oh, rows.begin) * g.W + g.input_col(ow, columns.begin)) * g.C;
      in.first = g.cell_number(rows.begin, columns.begin);
      scalar_t* const to = output + ow * g.C;
      uint8_t* const to_cells = numbered ? cells + ow * g.C : nullptr;
      if (in.columns == 3) {
        windows_at<3, nans>(in, g.C, to, to_cells);
      } else {
        windows_at<0, nans>(in, g.C, to, to_cells);
      }
    }
  }

  static bool has_nan(const scalar_t* values, int64_t count) {
    __mmask16 nan = 0;
    int64_t i = 0;
    for (; i + 2 * lanes <= count; i += 2 * lanes)
      nan |= unordered(load<T, lanes>(values + i), load<T, lanes>(values + i + lanes));
    for (; i < count; i += lanes) {
      const Values some = load_part<T, lanes>(values + i, count - i);
      nan |= unordered(some, some);
    }
    return nan != 0;
  }

  // Output rows [oh0, oh1) of an image. Rows are searched for NaN before they are compared.
  static void run(const Pool2dGeometry& g, int64_t oh0, int64_t oh1, const scalar_t* input,
                  scalar_t* output, uint8_t* cells) {
    int64_t next = 0, last_nan = -1;  // the next row to be searched, the last one that has any
    for (int64_t oh = oh0; oh < oh1; ++oh) {
      const Range rows = rows_inside(g, oh);
      const int64_t begin = g.input_row(oh, rows.begin), end = g.input_row(oh, rows.end - 1) + 1;
      for (next = std::max(next, begin); next < end; ++next)
        if (has_nan(input + next * g.W * g.C, g.W * g.C)) last_nan = next;
      const int64_t at = oh * g.OW * g.C;
      const auto row = last_nan >= begin ? row_of_windows<true> : row_of_windows<false>;
      row(g, oh, rows, input, output + at, numbered ? cells + at : nullptr);
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
