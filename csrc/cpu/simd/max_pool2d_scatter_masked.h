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
          for_each_cell(g, g.kernel_w, iw, e,
                        [&](int64_t j, int64_t at) { block.columns.place(j, at, g.OW); });
      }
    }
  };

  // Calls f(j, at) for the kernel columns j under which input column iw + l * stride + e is: that
  // of output column at + l.
  template <class F>
  C10_ALWAYS_INLINE static void for_each_cell(const Pool2dGeometry& g, int64_t kernel_w, int64_t iw,
                                              int64_t e, const F& f) {
    int64_t at = iw / stride + (e + g.pad_w) / stride;
    for (int64_t j = (e + g.pad_w) % stride; j < kernel_w; j += stride, --at) f(j, at);
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

  // The gradients of one block's inputs, from `count` rows: 0 for any number.
  template <int64_t count, int64_t width, class Columns>
  C10_ALWAYS_INLINE static void sum_block(const Pool2dGeometry& g, const HoldingRows& holding,
                                          int64_t iw, const Columns& columns, Values* sums) {
    const auto add_row = [&](int64_t i) {
      unrolled<stride>([&](auto e) {
        for_each_cell(g, width > 0 ? width : g.kernel_w, iw, e, [&](int64_t j, int64_t at) {
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
  template <int64_t count, int64_t width>
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
        sum_block<count, width>(g, holding, block.iw, block.whole, sums);
      } else {
        sum_block<count, width>(g, holding, block.iw, block.columns, sums);
      }
      write(sums, writer, grad_input + block.iw, g.W - block.iw);
    }
  }

  // Rows [ih0, ih1) of a plane. `width`: of the kernel, 0 for any.
  template <int64_t width>
  C10_NOINLINE static void run(const Pool2dGeometry& g, const Blocks& blocks, int64_t ih0,
                               int64_t ih1, const scalar_t* grad_output, const uint8_t* chosen,
                               const Writer& writer, scalar_t* grad_input) {
    for (int64_t ih = ih0; ih < ih1; ++ih) {
      const HoldingRows holding(g, ih, grad_output, chosen);
      if (holding.count == 3 && width > 0) {
        sum_row<3, width>(g, holding, blocks, writer, grad_input + ih * g.W);
      } else {
        sum_row<0, width>(g, holding, blocks, writer, grad_input + ih * g.W);
      }
    }
  }

  // Windows of three columns around each input: what one vector of outputs gives to the inputs on
  // their left, to their own and to those on their right. Each is read once, where it is.
  struct Around {
    Values of[3] = {};
  };
  template <int64_t count, class Columns>
  C10_ALWAYS_INLINE static Around sum_around(const HoldingRows& holding, int64_t at,
                                             const Columns& columns) {
    Around sums;
    const auto add_row = [&](int64_t i) {
      const auto& row = holding.of[i];
      const Values grad = columns.template load<T>(0, row.grads + at, Values{});
      unrolled<3>([&](auto j) {
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
  template <int64_t count>
  C10_ALWAYS_INLINE static void sum_row_around(const Pool2dGeometry& g, const HoldingRows& holding,
                                               const Writer& writer, scalar_t* grad_input) {
    Values from_left = {};  // what the outputs before `here` give to the inputs on their right
    Around here;
    int64_t at = 0;
    const auto write_before = [&](const Around& next) {
      const Values right = shuffled<T, lanes>(
          here.of[0], next.of[0], [](size_t l) constexpr { return l + 1; });
      const Values left = shuffled<T, lanes>(
          from_left, here.of[2], [](size_t l) constexpr { return l + lanes - 1; });
      if (at > 0)
        writer.store<lanes>(right + here.of[1] + left, grad_input + at - lanes, g.W - at + lanes);
      from_left = here.of[2];
      here = next;
    };
    const int64_t ahead = kRowsAhead * g.W;
    for (; at + lanes <= g.W; at += lanes) {
      if (holding.count > 0) {
        __builtin_prefetch(holding.of[0].grads + ahead + at);
        __builtin_prefetch(holding.of[0].cells + ahead + at);
      }
      write_before(sum_around<count>(holding, at, Columns<true, scalar_t, 0>()));
    }
    if (at < g.W) {
      Columns<false, scalar_t, 1> columns;
      columns.place(0, at, g.W);
      write_before(sum_around<count>(holding, at, columns));
      at += lanes;
    }
    write_before({});
  }
  C10_NOINLINE static void run_around(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                                      const scalar_t* grad_output, const uint8_t* chosen,
                                      const Writer& writer, scalar_t* grad_input) {
    for (int64_t ih = ih0; ih < ih1; ++ih) {
      const HoldingRows holding(g, ih, grad_output, chosen);
      if (holding.count == 3) {
        sum_row_around<3>(g, holding, writer, grad_input + ih * g.W);
      } else {
        sum_row_around<0>(g, holding, writer, grad_input + ih * g.W);
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
  if constexpr (stride == 1) {
    if (g.kernel_w == 3 && g.pad_w == 1) {
      for (int64_t p = 0; p < planes; ++p) {
        const int64_t plane = p * g.OH * g.OW;
        Scatter::run_around(g, ih0, ih1, grad_output + plane, cells + plane, writer,
                            grad_input + p * g.H * g.W);
      }
      return;
    }
  }
  for (int64_t iw = 0; iw < g.W; iw += Scatter::kBlocks * Scatter::lanes * stride) {
    const typename Scatter::Blocks blocks(g, iw);
    const auto run = g.kernel_w == 3 ? Scatter::template run<3> : Scatter::template run<0>;
    for (int64_t p = 0; p < planes; ++p) {
      const int64_t plane = p * g.OH * g.OW;
      run(g, blocks, ih0, ih1, grad_output + plane, cells + plane, writer,
          grad_input + p * g.H * g.W);
    }
  }
}

}  // namespace
}  // namespace dlops::cpu
