// The best of each window, by rows of planes (masked_rows.h): first of each window's rows, which
// the windows above and below share, and then of these. The first of equal cells in a row, of the
// first of equal rows, is the first of all, as is the last NaN of the last row that has one the
// last of all.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/byte_windows.h"
#include "cpu/simd/masked_rows.h"
#include "cpu/simd/pool_ranges.h"

namespace dlops::cpu {
namespace {

// `numbered`: whether the cells are wanted.
template <int64_t stride, class scalar_t, bool numbered>
struct MaskedWindows {
  using T = work_t<scalar_t, uint8_t>;
  static constexpr int64_t lanes = kLanes<scalar_t, uint8_t>;
  using Values = Vector<T, lanes>;
  static constexpr int64_t kBlocks = 8, kRowsAhead = 4;  // side by side; that are fetched

  // How many kernel columns lie before the image, for windows from column `begin` of it on.
  static __m128i columns_before(int64_t begin) {
    alignas(16) uint8_t before[16] = {};
    for (int64_t l = 0; l < lanes; ++l)
      before[l] = static_cast<uint8_t>(std::max<int64_t>(0, -begin - stride * l));
    return _mm_load_si128(reinterpret_cast<const __m128i*>(before));
  }

  // A vector of windows: where their columns begin, and which lie in the image.
  struct Block {
    int64_t begin;
    bool inside;  // all of them, in every lane
    Columns<true, scalar_t, 0> whole;
    Columns<false, scalar_t, 2 * kLargestMasked> columns;
    __m128i first;  // the first kernel column in the image, for each window
  };
  // The blocks from column `ow` on.
  struct Blocks {
    int64_t ow, count;
    Block of[kBlocks];

    Blocks(const Pool2dGeometry& g, int64_t ow)
        : ow(ow), count(std::min(kBlocks, (g.OW - ow + lanes - 1) / lanes)) {
      for (int64_t b = 0; b < count; ++b) {
        Block& block = of[b];
        block.begin = g.input_col(ow + b * lanes, 0);
        block.inside = block.begin >= 0 && block.begin + g.kernel_w + stride * lanes <= g.W;
        for (int64_t j = 0; j < g.kernel_w; j += stride)
          for (int64_t v = 0; v < stride; ++v)
            block.columns.place(j + v, block.begin + j + v * lanes, g.W);
        block.first = columns_before(block.begin);
      }
    }
  };

  // The best of one row's columns, for the windows of each block.
  struct Row {
    Values best[kBlocks];
    __m128i column[kBlocks];
    bool any;  // whether its values may be NaN, or taken for 0
  };

  // Calls f(j, the values under kernel column j) for the kernel columns.
  template <int64_t width, class Columns, class F>
  C10_ALWAYS_INLINE static void for_each_column(const Pool2dGeometry& g, const Columns& columns,
                                                const scalar_t* row, const F& f) {
    const int64_t kernel_w = width > 0 ? width : g.kernel_w;
    const Values padding = fill<T, lanes>(lowest<T>());
    for (int64_t j = 0; j < kernel_w; j += stride) {
      const Values a = columns.template load<T>(j, row + j, padding);
      if constexpr (stride == 1) {
        f(j, a);
      } else {
        const Values b = columns.template load<T>(j + 1, row + j + lanes, padding);
        f(j, every_second<0, T, lanes>(a, b));
        if (j + 1 < kernel_w) f(j + 1, every_second<1, T, lanes>(a, b));
      }
    }
  }

  // The best of a row for one block's windows; returns the lanes where a NaN is among these.
  template <int64_t width, bool any, class Columns>
  C10_ALWAYS_INLINE static __mmask16 visit_row(const Pool2dGeometry& g, const Columns& columns,
                                               __m128i first, const scalar_t* row, Values& best,
                                               __m128i& column) {
    // With a stride of 1, those under the first and the last column are all.
    static_assert(width <= lanes + 1);
    const int64_t last = stride == 1 && width > 0 ? width - 1 : 0;
    ByteWindows<T, any, numbered> windows;
    Values before;
    __mmask16 nan = 0;
    for_each_column<width>(g, columns, row, [&](int64_t j, Values values) {
      if (j == 0) {
        before = values;
        windows = {values, first};
        return;
      }
      windows.visit(values, byte_cells(j));
      if (last == 0 || j == last) nan |= unordered(before, values);
    });
    if (width == 0) nan |= unordered(before, before);  // of a single column
    best = windows.best;
    if constexpr (numbered) column = windows.cell;
    return nan;
  }
  template <int64_t width, bool any>
  C10_ALWAYS_INLINE static void visit_blocks(const Pool2dGeometry& g, const Blocks& blocks,
                                             const scalar_t* row, Row& kept) {
    const scalar_t* at = row + blocks.of[0].begin;
    const int64_t ahead = kRowsAhead * stride * g.W;
    __mmask16 nan = 0;
    for (int64_t b = 0; b < blocks.count; ++b, at += stride * lanes) {
      const Block& block = blocks.of[b];
      for (int64_t v = 0; v < stride; ++v) __builtin_prefetch(at + ahead + v * lanes);
      nan |= block.inside ? visit_row<width, any>(g, block.whole, block.first, at, kept.best[b],
                                                  kept.column[b])
                          : visit_row<width, any>(g, block.columns, block.first, at, kept.best[b],
                                                  kept.column[b]);
    }
    kept.any = nan != 0;
  }

  // The rows that the windows of an output row hold, and the numbers of their first cells. There is
  // one at least: padding is at most half of a kernel, whose rows are without gaps.
  struct HeldRows {
    int64_t count = 0;
    bool any = false;
    struct {
      const Row* row;
      __m128i first;
    } of[kLargestMasked];

    void add(const Row& row, int64_t cell) {
      of[count++] = {&row, byte_cells(cell)};
      any |= row.any;
    }
  };
  // The best of `count` rows, or of any number where that is 0.
  template <bool any, int64_t count>
  C10_ALWAYS_INLINE static void join_rows(const HeldRows& held, int64_t blocks, int64_t left,
                                          scalar_t* output, uint8_t* cells) {
    // In registers: for all that the compiler knows, what is stored below could change them.
    const Row* rows[std::max<int64_t>(count, 1)];
    __m128i first[std::max<int64_t>(count, 1)];
    unrolled<count>([&](auto i) {
      rows[i] = held.of[i].row;
      first[i] = held.of[i].first;
    });
    for (int64_t b = 0; b < blocks; ++b, left -= lanes) {
      const auto cell = [&](const Row* row, __m128i first_cell) {
        if constexpr (numbered) return _mm_add_epi8(row->column[b], first_cell);
        return first_cell;
      };
      ByteWindows<T, any, numbered> windows;
      const auto visit = [&](int64_t i, const Row* row, __m128i first_cell) {
        if (i == 0) {
          windows = {row->best[b], cell(row, first_cell)};
        } else {
          windows.visit(row->best[b], cell(row, first_cell));
        }
      };
      if constexpr (count > 0) {
        unrolled<count>([&](auto i) { visit(i, rows[i], first[i]); });
      } else {
        for (int64_t i = 0; i < held.count; ++i) visit(i, held.of[i].row, held.of[i].first);
      }
      windows.store(output, cells, b * lanes, left);
    }
  }
  // The windows of some blocks, of rows [oh0, oh1) of a plane. Each row is visited once, or twice
  // where it has a NaN, and memory read in its order. `width`: of the kernel, 0 for any.
  template <int64_t width>
  C10_NOINLINE static void forward(const Pool2dGeometry& g, const Blocks& blocks,
                                   const scalar_t* input, int64_t oh0, int64_t oh1,
                                   scalar_t* output, uint8_t* cells) {
    Row kept[kLargestMasked];    // of as many rows as the kernel has
    int64_t next = 0, slot = 0;  // the first row that is still to be visited, and its place
    const bool flushes = flushes_denormals();
    for (int64_t oh = oh0; oh < oh1; ++oh) {
      const Range rows = rows_inside(g, oh);
      const int64_t ih = g.input_row(oh, 0);
      next = std::max(next, ih + rows.begin);
      for (; next < ih + rows.end; ++next) {
        const scalar_t* row = input + next * g.W;
        if (!flushes) visit_blocks<width, false>(g, blocks, row, kept[slot]);
        if (flushes || kept[slot].any) visit_blocks<width, true>(g, blocks, row, kept[slot]);
        kept[slot].any |= flushes;
        if (++slot == g.kernel_h) slot = 0;
      }
      HeldRows held;
      int64_t at = slot + rows.begin - rows.end;
      if (at < 0) at += g.kernel_h;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        held.add(kept[at], g.cell_number(i, 0));
        if (++at == g.kernel_h) at = 0;
      }
      const int64_t from = oh * g.OW + blocks.ow, left = g.OW - blocks.ow;
      scalar_t* const to = output + from;
      uint8_t* const to_cells = numbered ? cells + from : nullptr;
      if (held.any) {
        join_rows<true, 0>(held, blocks.count, left, to, to_cells);
      } else if (held.count == 3) {
        join_rows<false, 3>(held, blocks.count, left, to, to_cells);
      } else {
        join_rows<false, 0>(held, blocks.count, left, to, to_cells);
      }
    }
  }

  // Output rows [oh0, oh1) of some planes.
  static void run(const Pool2dGeometry& g, int64_t planes, int64_t oh0, int64_t oh1,
                  const scalar_t* input, scalar_t* output, uint8_t* cells) {
    for (int64_t ow = 0; ow < g.OW; ow += kBlocks * lanes) {
      const Blocks blocks(g, ow);
      for (int64_t p = 0; p < planes; ++p) {
        const int64_t plane = p * g.OH * g.OW;
        const auto windows = g.kernel_w == 3 ? forward<3> : forward<0>;
        windows(g, blocks, input + p * g.H * g.W, oh0, oh1, output + plane,
                numbered ? cells + plane : nullptr);
      }
    }
  }
};

template <int64_t stride, class scalar_t>
void max_pool2d_masked(const Pool2dGeometry& g, int64_t planes, int64_t oh0, int64_t oh1,
                       const scalar_t* input, scalar_t* output, uint8_t* cells) {
  const auto run = cells == nullptr ? MaskedWindows<stride, scalar_t, false>::run
                                    : MaskedWindows<stride, scalar_t, true>::run;
  run(g, planes, oh0, oh1, input, output, cells);
}

}  // namespace
}  // namespace dlops::cpu
