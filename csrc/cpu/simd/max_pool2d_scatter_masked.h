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
  using Rows = HoldingRows<scalar_t>;
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

  // The gradients of one block's inputs, from `count` rows: 0 for any number. Of windows of `width`
  // columns, 0 for any number; `odd`: the padding's remainder by the stride.
  template <int64_t count, int64_t width, int64_t odd, class Columns>
  C10_ALWAYS_INLINE static void sum_block(const Pool2dGeometry& g, const Rows& holding, int64_t iw,
                                          const Columns& columns, Values* sums) {
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
    repeated<count>(holding.count, add_row);
  }
  template <int64_t count, int64_t width, int64_t odd>
  C10_ALWAYS_INLINE static void sum_row(const Pool2dGeometry& g, const Rows& holding,
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
      const Rows holding(g, ih, grad_output, chosen);
      const auto sum = [&](auto count) {
        sum_row<count, width, odd>(g, holding, blocks, writer, grad_input + ih * g.W);
      };
      if (width == 0 || holding.count == 0 || holding.count > 3) {
        sum(Constant<0>());
      } else if (holding.count == 3) {
        sum(Constant<3>());
      } else if (holding.count == 2) {
        sum(Constant<2>());
      } else {
        sum(Constant<1>());
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
  const auto run =
      g.pad_w % stride == 0
          ? (g.kernel_w == 3 ? Scatter::template run<3, 0> : Scatter::template run<0, 0>)
          : (g.kernel_w == 3 ? Scatter::template run<3, stride - 1>
                             : Scatter::template run<0, stride - 1>);
  for (int64_t iw = 0; iw < g.W; iw += Scatter::kBlocks * Scatter::lanes * stride) {
    const typename Scatter::Blocks blocks(g, iw);
    for (int64_t p = 0; p < planes; ++p) {
      const int64_t plane = p * g.OH * g.OW;
      run(g, blocks, ih0, ih1, grad_output + plane, cells + plane, writer,
          grad_input + p * g.H * g.W);
    }
  }
}

}  // namespace
}  // namespace dlops::cpu
