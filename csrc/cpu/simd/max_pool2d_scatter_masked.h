// The gradient of each input, by rows of planes (masked_rows.h): that of each window that chose it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/byte_windows.h"
#include "cpu/simd/masked_rows.h"
#include "cpu/simd/pool_ranges.h"

namespace dlops::cpu {
namespace {

template <int64_t stride, class scalar_t>
struct MaskedScatter {
  using T = work_t<scalar_t, uint8_t>;
  static constexpr int64_t lanes = kLanes<scalar_t, uint8_t>;
  using Values = Vector<T, lanes>;
  static constexpr int64_t kBlocks = 8, kRowsAhead = 8;  // side by side; that are fetched

  // `stride` vectors of inputs: which outputs of the windows that hold them there are.
  struct Block {
    int64_t iw;
    bool inside;  // all of them, in every lane
    Columns<true, scalar_t, 0> whole;
    Columns<false, scalar_t, kLargestMasked> columns;
  };
  // Those from column `iw` on.
  struct Blocks {
    int64_t count;
    Block of[kBlocks];

    Blocks(const Pool2dGeometry& g, int64_t iw) {
      constexpr int64_t size = lanes * stride;
      count = std::min(kBlocks, (g.W - iw + size - 1) / size);
      for (int64_t b = 0; b < count; ++b, iw += size) {
        Block& block = of[b];
        block.iw = iw;
        // Columns from (iw - kernel_w) / stride on to (iw + pad_w) / stride + lanes.
        block.inside = iw >= g.kernel_w && iw + size + g.pad_w + stride < g.OW * stride;
        for (int64_t e = 0; e < stride; ++e)
          for_each_cell(g, g.kernel_w, (e + g.pad_w) % stride, iw, e,
                        [&](int64_t j, int64_t at) { block.columns.place(j, at, g.OW); });
      }
    }
  };

  // Calls f(j, at) for the kernel columns j under which input column iw + l * stride + e is, from
  // the first one on: that of output column at + l.
  template <class F>
  C10_ALWAYS_INLINE static void for_each_cell(const Pool2dGeometry& g, int64_t kernel_w,
                                              int64_t first, int64_t iw, int64_t e, const F& f) {
    int64_t at = iw / stride + (e + g.pad_w) / stride;
    for (int64_t j = first; j < kernel_w; j += stride, --at) f(j, at);
  }

  // The output rows that hold an input row.
  struct HoldingRows {
    int64_t count = 0;
    struct {
      const scalar_t* grads;
      const uint8_t* cells;
      int64_t first;  // the number of the input row's first cell there
    } of[kLargestMasked];

    HoldingRows(const Pool2dGeometry& g, int64_t ih, const scalar_t* grad_output,
                const uint8_t* chosen) {
      for (Holders rows = rows_holding(g, ih); rows.valid(); rows.next()) {
        const int64_t at = rows.output() * g.OW;
        of[count++] = {grad_output + at, chosen + at, g.cell_number(rows.offset(), 0)};
      }
    }
  };

  // The gradients of one block's inputs, from `count` rows: 0 for any number. Of windows of `width`
  // columns, 0 for any number; `odd`: the padding's remainder by the stride.
  template <int64_t count, int64_t width, int64_t odd, class Columns>
  C10_ALWAYS_INLINE static void sum_block(const Pool2dGeometry& g, const HoldingRows& holding,
                                          int64_t iw, const Columns& columns, Values* sums) {
    const auto add_row = [&](int64_t i) {
      unrolled<stride>([&](auto e) {
        const int64_t kernel_w = width > 0 ? width : g.kernel_w;
        for_each_cell(g, kernel_w, (e + odd) % stride, iw, e, [&](int64_t j, int64_t at) {
          const __mmask16 mine =
              columns.equal(j, holding.of[i].cells + at, byte_cells(holding.of[i].first + j));
          add(columns.template load<T>(j, holding.of[i].grads + at, Values{}), mine, sums[e]);
        });
      });
    };
    if constexpr (count > 0) {
      unrolled<count>(add_row);
    } else {
      for (int64_t i = 0; i < holding.count; ++i) add_row(i);
    }
  }
  template <int64_t count, int64_t width, int64_t odd>
  C10_ALWAYS_INLINE static void sum_row(const Pool2dGeometry& g, const HoldingRows& holding,
                                        const Blocks& blocks, const Writer& writer,
                                        scalar_t* grad_input) {
    for (int64_t b = 0; b < blocks.count; ++b) {
      const Block& block = blocks.of[b];
      if (holding.count > 0) {
        const int64_t ahead = kRowsAhead * g.OW + block.iw / stride;
        __builtin_prefetch(holding.of[0].grads + ahead);
        __builtin_prefetch(holding.of[0].cells + ahead);
      }
      Values sums[stride] = {};
      if (block.inside) {
        sum_block<count, width, odd>(g, holding, block.iw, block.whole, sums);
      } else {
        sum_block<count, width, odd>(g, holding, block.iw, block.columns, sums);
      }
      write(sums, writer, grad_input + block.iw, g.W - block.iw);
    }
  }

  // Rows [ih0, ih1) of a plane.
  template <int64_t width, int64_t odd>
  C10_NOINLINE static void run(const Pool2dGeometry& g, const Blocks& blocks, int64_t ih0,
                               int64_t ih1, const scalar_t* grad_output, const uint8_t* chosen,
                               const Writer& writer, scalar_t* grad_input) {
    for (int64_t ih = ih0; ih < ih1; ++ih) {
      const HoldingRows holding(g, ih, grad_output, chosen);
      const auto sum = [&](auto count) {
        sum_row<count, width, odd>(g, holding, blocks, writer, grad_input + ih * g.W);
      };
      if (width > 0 && holding.count == 1) {
        sum(Constant<1>());
      } else if (width > 0 && holding.count == 2) {
        sum(Constant<2>());
      } else {
        sum(Constant<0>());
      }
    }
  }

  // Windows of `width` columns, as many on either side of the input under their middle: what one
  // vector of outputs gives to the inputs under each column. Each output is read once, where it is.
  template <int64_t width>
  struct Around {
    Values of[width] = {};
  };
  template <int64_t width, int64_t count, class Columns>
  C10_ALWAYS_INLINE static Around<width> sum_around(const HoldingRows& holding, int64_t at,
                                                    const Columns& columns) {
    Around<width> sums;
    const auto add_row = [&](int64_t i) {
      const auto& row = holding.of[i];
      const Values grad = columns.template load<T>(0, row.grads + at, Values{});
      unrolled<width>([&](auto j) {
        add(grad, columns.equal(0, row.cells + at, byte_cells(row.first + j)), sums.of[j]);
      });
    };
    if constexpr (count > 0) {
      unrolled<count>(add_row);
    } else {
      for (int64_t i = 0; i < holding.count; ++i) add_row(i);
    }
    return sums;
  }
  // The inputs at `here`: outputs give to those as far to their left or right as the column is from
  // the middle.
  template <int64_t width>
  C10_ALWAYS_INLINE static Values join(const Around<width>& before, const Around<width>& here,
                                       const Around<width>& after) {
    constexpr int64_t middle = width / 2;
    Values sum = here.of[middle];
    unrolled<middle>([&](auto i) {
      constexpr int64_t apart = i + 1;
      sum += shuffled<T, lanes>(here.of[middle - apart], after.of[middle - apart],
                                [](size_t l) constexpr { return l + apart; });
      sum += shuffled<T, lanes>(before.of[middle + apart], here.of[middle + apart],
                                [](size_t l) constexpr { return l + lanes - apart; });
    });
    return sum;
  }
  template <int64_t width, int64_t count>
  C10_ALWAYS_INLINE static void sum_row_around(const Pool2dGeometry& g, const HoldingRows& holding,
                                               const Writer& writer, scalar_t* grad_input) {
    Around<width> before, here;
    int64_t at = 0;
    const auto write_before = [&](const Around<width>& next) {
      if (at > 0)
        writer.store<lanes>(join(before, here, next), grad_input + at - lanes, g.W - at + lanes);
      before = here;
      here = next;
    };
    const int64_t ahead = kRowsAhead * g.W;
    for (; at + lanes <= g.W; at += lanes) {
      if (holding.count > 0) {
        __builtin_prefetch(holding.of[0].grads + ahead + at);
        __builtin_prefetch(holding.of[0].cells + ahead + at);
      }
      write_before(sum_around<width, count>(holding, at, Columns<true, scalar_t, 0>()));
    }
    if (at < g.W) {
      Columns<false, scalar_t, 1> columns;
      columns.place(0, at, g.W);
      write_before(sum_around<width, count>(holding, at, columns));
      at += lanes;
    }
    write_before({});
  }
  template <int64_t width>
  C10_NOINLINE static void run_around(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                                      const scalar_t* grad_output, const uint8_t* chosen,
                                      const Writer& writer, scalar_t* grad_input) {
    for (int64_t ih = ih0; ih < ih1; ++ih) {
      const HoldingRows holding(g, ih, grad_output, chosen);
      if (holding.count == width) {
        sum_row_around<width, width>(g, holding, writer, grad_input + ih * g.W);
      } else {
        sum_row_around<width, 0>(g, holding, writer, grad_input + ih * g.W);
      }
    }
  }

  C10_ALWAYS_INLINE static void write(const Values* sums, const Writer& writer, scalar_t* to,
                                      int64_t left) {
    if constexpr (stride == 1) {
      writer.store<lanes>(sums[0], to, left);
    } else {
      writer.store<lanes>(in_turn<0, T, lanes>(sums[0], sums[1]), to, left);
      if (left > lanes)
        writer.store<lanes>(in_turn<1, T, lanes>(sums[0], sums[1]), to + lanes, left - lanes);
    }
  }
};

template <int64_t stride, class scalar_t>
void max_pool2d_scatter_masked(const Pool2dGeometry& g, int64_t planes, int64_t ih0, int64_t ih1,
                               const scalar_t* grad_output, const uint8_t* cells,
                               scalar_t* grad_input) {
  using Scatter = MaskedScatter<stride, scalar_t>;
  const Writer writer(g.N * g.C * g.H * g.W * static_cast<int64_t>(sizeof(scalar_t)));
  const auto each_plane = [&](const auto& run) {
    for (int64_t p = 0; p < planes; ++p) {
      const int64_t plane = p * g.OH * g.OW;
      run(grad_output + plane, cells + plane, grad_input + p * g.H * g.W);
    }
  };
  if constexpr (stride == 1) {
    const bool around = g.kernel_w == 2 * g.pad_w + 1;
    if (around && (g.kernel_w == 3 || g.kernel_w == 5)) {
      const auto run =
          g.kernel_w == 3 ? Scatter::template run_around<3> : Scatter::template run_around<5>;
      return each_plane([&](const scalar_t* grads, const uint8_t* chosen, scalar_t* to) {
        run(g, ih0, ih1, grads, chosen, writer, to);
      });
    }
  }
  constexpr int64_t width = stride == 2 ? 3 : 0;
  const auto run = g.pad_w % stride == 0
                       ? (g.kernel_w == width ? Scatter::template run<width, 0>
                                              : Scatter::template run<0, 0>)
                       : (g.kernel_w == width ? Scatter::template run<width, stride - 1>
                                              : Scatter::template run<0, stride - 1>);
  for (int64_t iw = 0; iw < g.W; iw += Scatter::kBlocks * Scatter::lanes * stride) {
    const typename Scatter::Blocks blocks(g, iw);
    each_plane([&](const scalar_t* grads, const uint8_t* chosen, scalar_t* to) {
      run(g, blocks, ih0, ih1, grads, chosen, writer, to);
    });
  }
}

}  // namespace
}  // namespace dlops::cpu
