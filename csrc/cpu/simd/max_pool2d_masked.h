// The best of each window, by rows of planes (masked_rows.h): first of each window's rows, which
// the windows above and below share, and then of these. The first of equal cells in a row, of the
// first of equal rows, is the first of all, as is the last NaN of the last row that has one the
// last of all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/simd/masked_rows.h"
#include "cpu/simd/pool_ranges.h"
#include "cpu/simd/pool_windows.h"

namespace dlops::cpu {
namespace {

template <class scalar_t>
struct MaskedWindows {
  using Window = Windows<scalar_t, uint8_t, 1>;
  using T = typename Window::value_t;
  using id_t = typename Window::id_t;
  using Values = typename Window::Values;
  using Ids = typename Window::Ids;
  static constexpr int64_t lanes = Window::lanes;
  static constexpr int64_t kBlocks = 8, kRowsAhead = 4;  // side by side; that are fetched

  // How many kernel columns lie before the image, for windows from column `begin` of it on.
  template <int64_t stride>
  static Ids columns_before(int64_t begin) {
    Vector<std::make_signed_t<id_t>, lanes> before;
    for (int64_t l = 0; l < lanes; ++l)
      before[l] = static_cast<std::make_signed_t<id_t>>(-begin - stride * l);
    return as<Ids>(before > 0 ? before : before - before);
  }

  // A vector of windows: where their columns begin, and which lie in the image.
  struct Block {
    int64_t begin;
    bool inside;  // all of them, in every lane
    Columns<true, scalar_t, 0> whole;
    Columns<false, scalar_t, 2 * kLargestMasked> columns;
    Ids first;  // the first kernel column in the image, for each window
  };
  // The blocks from column `ow` on.
  struct Blocks {
    int64_t ow, count;
    Block of[kBlocks];
  };
  template <int64_t stride>
  static void place_blocks(const Pool2dGeometry& g, int64_t ow, Blocks& blocks) {
    blocks.ow = ow;
    blocks.count = std::min(kBlocks, (g.OW - ow + lanes - 1) / lanes);
    for (int64_t b = 0; b < blocks.count; ++b) {
      Block& block = blocks.of[b];
      block.begin = g.input_col(ow + b * lanes, 0);
      block.inside = block.begin >= 0 && block.begin + g.kernel_w + stride * lanes <= g.W;
      for (int64_t j = 0; j < g.kernel_w; j += stride)
        for (int64_t v = 0; v < stride; ++v)
          block.columns.place(j + v, block.begin + j + v * lanes, g.W);
      block.first = columns_before<stride>(block.begin);
    }
  }

  // The best of a row of some windows, in some planes.
  template <int64_t planes>
  struct BestOfRow {
    Values best[planes];
    Ids column[planes];
  };

  template <int64_t stride, int64_t planes, int64_t width, class Columns>
  C10_ALWAYS_INLINE static void visit_row(const Pool2dGeometry& g, const Columns& columns,
                                          Ids first, const scalar_t* row,
                                          BestOfRow<planes>& result) {
    const int64_t kernel_w = width > 0 ? width : g.kernel_w;
    const Values padding = fill<T, lanes>(lowest<T>());
    Window windows[planes];
    const auto visit = [&](int64_t p, int64_t j, Values values) {
      if (j > 0) return windows[p].visit(0, values, fill<id_t, lanes>(static_cast<id_t>(j)));
      windows[p].start(0, values, first);
    };
    for (int64_t p = 0; p < planes; ++p)
      for (int64_t v = 0; v < stride; ++v)
        __builtin_prefetch(row + p * g.H * g.W + kRowsAhead * stride * g.W + v * lanes);
    for (int64_t j = 0; j < kernel_w; j += stride) {
      for (int64_t p = 0; p < planes; ++p) {
        const scalar_t* from = row + p * g.H * g.W + j;
        const Values a = columns.template load<T>(j, from, padding);
        if constexpr (stride == 1) {
          visit(p, j, a);
        } else {
          const Values b = columns.template load<T>(j + 1, from + lanes, padding);
          visit(p, j, every_second<0, T, lanes>(a, b));
          if (j + 1 < kernel_w) visit(p, j + 1, every_second<1, T, lanes>(a, b));
        }
      }
    }
    for (int64_t p = 0; p < planes; ++p) {
      result.best[p] = windows[p].best[0];
      result.column[p] = windows[p].cell[0];
    }
  }

  // The windows of some blocks, of rows [oh0, oh1) of some planes, which are independent of each
  // other: one alone would wait for its own comparisons. Each row is visited once, and memory read
  // in its order. `width`: of the kernel, 0 for any.
  template <int64_t stride, int64_t planes, int64_t width>
  C10_NOINLINE static void forward(const Pool2dGeometry& g, const Blocks& blocks,
                                   const scalar_t* input, int64_t oh0, int64_t oh1,
                                   scalar_t* output, uint8_t* cells) {
    BestOfRow<planes> kept[kLargestMasked][kBlocks];  // of as many rows as the kernel has
    const auto wrapped = [&](int64_t slot) {
      return slot < 0 ? slot + g.kernel_h : slot < g.kernel_h ? slot : slot - g.kernel_h;
    };
    int64_t next = 0, slot = 0;  // the first row that is still to be visited, and its place
    for (int64_t oh = oh0; oh < oh1; ++oh) {
      const Range rows = rows_inside(g, oh);
      const int64_t ih = g.input_row(oh, 0), held = std::max<int64_t>(0, rows.end - rows.begin);
      next = std::max(next, ih + rows.begin);
      const int64_t fresh = std::max<int64_t>(0, ih + rows.end - next);
      for (int64_t b = 0; b < blocks.count; ++b) {
        const Block& block = blocks.of[b];
        for (int64_t i = 0; i < fresh; ++i) {
          const scalar_t* row = input + (next + i) * g.W + block.begin;
          BestOfRow<planes>& best = kept[wrapped(slot + i)][b];
          if (block.inside) {
            visit_row<stride, planes, width>(g, block.whole, block.first, row, best);
          } else {
            visit_row<stride, planes, width>(g, block.columns, block.first, row, best);
          }
        }
        Window windows[planes];
        Ids cell = fill<id_t, lanes>(static_cast<id_t>(g.cell_number(rows.begin, 0)));
        unrolled<planes>([&](auto p) { windows[p].cell[0] = cell + block.first; });
        for (int64_t i = 0, at = wrapped(slot + fresh - held); i < held; ++i) {
          const BestOfRow<planes>& row = kept[at][b];
          unrolled<planes>([&](auto p) { windows[p].visit(0, row.best[p], cell + row.column[p]); });
          cell += static_cast<id_t>(g.cell_step);
          at = wrapped(at + 1);
        }
        unrolled<planes>([&](auto p) {
          const int64_t from = blocks.ow + b * lanes, at = (p * g.OH + oh) * g.OW + from;
          windows[p].store(output + at, cells == nullptr ? nullptr : cells + at, g.OW - from);
        });
      }
      next += fresh;
      slot = wrapped(slot + fresh);
    }
  }
};

template <int64_t stride, class scalar_t>
void max_pool2d_masked(const Pool2dGeometry& g, int64_t planes, int64_t oh0, int64_t oh1,
                       const scalar_t* input, scalar_t* output, uint8_t* cells) {
  using Pooling = MaskedWindows<scalar_t>;
  typename Pooling::Blocks blocks;
  for (int64_t ow = 0; ow < g.OW; ow += Pooling::kBlocks * Pooling::lanes) {
    Pooling::template place_blocks<stride>(g, ow, blocks);
    for_each_pair(g, planes, [&](int64_t p, auto some, auto width) {
      const int64_t plane = p * g.OH * g.OW;
      Pooling::template forward<stride, some, width>(g, blocks, input + p * g.H * g.W, oh0, oh1,
                                                     output + plane,
                                                     cells == nullptr ? nullptr : cells + plane);
    });
  }
}

}  // namespace
}  // namespace dlops::cpu
