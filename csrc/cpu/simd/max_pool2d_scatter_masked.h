// The gradient of each input, by rows of planes (masked_rows.h): that of each window that chose it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/simd/lanes.h"
#include "cpu/simd/masked_rows.h"
#include "cpu/simd/pool_ranges.h"
#include "cpu/simd/pool_windows.h"

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
      int64_t row, first;  // and the number of the input row's first cell there
    } of[kLargestMasked];

    HoldingRows(const Pool2dGeometry& g, int64_t ih) {
      for (Holders rows = rows_holding(g, ih); rows.valid(); rows.next())
        of[count++] = {rows.output(), g.cell_number(rows.offset(), 0)};
    }
  };

  // The gradients of a block's inputs in some planes.
  template <int64_t planes>
  struct Sums {
    Values of[planes][stride];
  };
  template <int64_t planes, int64_t width, class Columns>
  C10_ALWAYS_INLINE static Sums<planes> sum_block(const Pool2dGeometry& g,
                                                  const HoldingRows& holding, int64_t iw,
                                                  const Columns& columns,
                                                  const scalar_t* grad_output,
                                                  const uint8_t* chosen) {
    Sums<planes> sums = {};
    for (int64_t r = 0; r < holding.count; ++r) {
      const scalar_t* grads = grad_output + holding.of[r].row * g.OW;
      const uint8_t* cells = chosen + holding.of[r].row * g.OW;
      unrolled<stride>([&](auto e) {
        for_each_cell(g, width > 0 ? width : g.kernel_w, iw, e, [&](int64_t j, int64_t at) {
          const uint8_t id = static_cast<uint8_t>(holding.of[r].first + j);
          unrolled<planes>([&](auto p) {
            const int64_t from = p * g.OH * g.OW + at;
            const Values grad = columns.template load<T>(j, grads + from, Values{});
            add(grad, columns.equal(j, cells + from, id), sums.of[p][e]);
          });
        });
      });
    }
    return sums;
  }

  // Rows [ih0, ih1) of some planes.
  template <int64_t planes, int64_t width>
  C10_NOINLINE static void run(const Pool2dGeometry& g, const Blocks& blocks, int64_t ih0,
                               int64_t ih1, const scalar_t* grad_output, const uint8_t* chosen,
                               const Writer& writer, scalar_t* grad_input) {
    for (int64_t ih = ih0; ih < ih1; ++ih) {
      const HoldingRows holding(g, ih);
      for (int64_t b = 0; b < blocks.count; ++b) {
        const Block& block = blocks.of[b];
        if (holding.count > 0) {
          for (int64_t p = 0; p < planes; ++p) {
            const int64_t ahead =
                (p * g.OH + holding.of[0].row + kRowsAhead) * g.OW + block.iw / stride;
            __builtin_prefetch(grad_output + ahead);
            __builtin_prefetch(chosen + ahead);
          }
        }
        const Sums<planes> sums =
            block.inside
                ? sum_block<planes, width>(g, holding, block.iw, block.whole, grad_output, chosen)
                : sum_block<planes, width>(g, holding, block.iw, block.columns, grad_output,
                                           chosen);
        unrolled<planes>([&](auto p) {
          write(sums.of[p], writer, grad_input + (p * g.H + ih) * g.W + block.iw, g.W - block.iw);
        });
      }
    }
  }

  // sum += grad in the lanes of `mine`.
  C10_ALWAYS_INLINE static void add(Values grad, __mmask16 mine, Values& sum) {
    if constexpr (std::is_same_v<T, double>) {
      sum = _mm512_mask_add_pd(sum, static_cast<__mmask8>(mine), sum, grad);
    } else {
      sum = _mm512_mask_add_ps(sum, mine, sum, grad);
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
  for (int64_t iw = 0; iw < g.W; iw += Scatter::kBlocks * Scatter::lanes * stride) {
    const typename Scatter::Blocks blocks(g, iw);
    for_each_pair(g, planes, [&](int64_t p, auto some, auto width) {
      const int64_t plane = p * g.OH * g.OW;
      Scatter::template run<some, width>(g, blocks, ih0, ih1, grad_output + plane, cells + plane,
                                         writer, grad_input + p * g.H * g.W);
    });
  }
}

}  // namespace
}  // namespace dlops::cpu
