// The gradient of each input, by rows of planes (masked_rows.h), for windows of an odd width that
// move by one column, as many columns on either side of the input under their middle. A row of
// outputs is read where it is, for each row of inputs, and what it gives to neighbours is moved in
// registers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/simd/byte_windows.h"
#include "cpu/simd/masked_rows.h"

namespace dlops::cpu {
namespace {

template <int64_t width, class scalar_t>
struct AroundScatter {
  using T = work_t<scalar_t, uint8_t>;
  static constexpr int64_t lanes = kLanes<scalar_t, uint8_t>;
  using Values = Vector<T, lanes>;
  using Rows = HoldingRows<scalar_t>;
  static constexpr int64_t kRowsAhead = 8;  // that are fetched

  // What one vector of outputs gives to the inputs under each column, from `count` rows: 0 for any
  // number.
  struct Sums {
    Values of[width] = {};
  };
  template <int64_t count, class Columns>
  C10_ALWAYS_INLINE static Sums sum_vector(const Rows& holding, int64_t at,
                                           const Columns& columns) {
    Sums sums;
    const auto add_row = [&](int64_t i) {
      const auto& row = holding.of[i];
      const Values grad = columns.template load<T>(0, row.grads + at, Values{});
      unrolled<width>([&](auto j) {
        add(grad, columns.equal(0, row.cells + at, byte_cells(row.first + j)), sums.of[j]);
      });
    };
    repeated<count>(holding.count, add_row);
    return sums;
  }
  // The inputs at `here`: outputs give to those as far to their left or right as the column is from
  // the middle.
  C10_ALWAYS_INLINE static Values join(const Sums& before, const Sums& here, const Sums& after) {
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
  template <int64_t count>
  C10_ALWAYS_INLINE static void sum_row(const Pool2dGeometry& g, const Rows& holding,
                                        const Writer& writer, scalar_t* grad_input) {
    Sums before, here;
    int64_t at = 0;
    const auto write_before = [&](const Sums& next) {
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
      write_before(sum_vector<count>(holding, at, Columns<true, scalar_t, 0>()));
    }
    if (at < g.W) {
      Columns<false, scalar_t, 1> columns;
      columns.place(0, at, g.W);
      write_before(sum_vector<count>(holding, at, columns));
      at += lanes;
    }
    write_before({});
  }
  // Rows [ih0, ih1) of a plane.
  C10_NOINLINE static void run(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                               const scalar_t* grad_output, const uint8_t* chosen,
                               const Writer& writer, scalar_t* grad_input) {
    for (int64_t ih = ih0; ih < ih1; ++ih) {
      const Rows holding(g, ih, grad_output, chosen);
      if (holding.count == width) {  // of windows that are squares
        sum_row<width>(g, holding, writer, grad_input + ih * g.W);
      } else {
        sum_row<0>(g, holding, writer, grad_input + ih * g.W);
      }
    }
  }
};

inline bool scatters_around(const Pool2dGeometry& g) {
  return g.stride_w == 1 && g.kernel_w == 2 * g.pad_w + 1 && g.OW == g.W &&
         (g.kernel_w == 3 || g.kernel_w == 5);
}

template <class scalar_t>
void max_pool2d_scatter_around(const Pool2dGeometry& g, int64_t planes, int64_t ih0, int64_t ih1,
                               const scalar_t* grad_output, const uint8_t* cells,
                               scalar_t* grad_input) {
  const Writer writer(g.N * g.C * g.H * g.W * static_cast<int64_t>(sizeof(scalar_t)));
  const auto run =
      g.kernel_w == 3 ? AroundScatter<3, scalar_t>::run : AroundScatter<5, scalar_t>::run;
  for (int64_t p = 0; p < planes; ++p) {
    const int64_t plane = p * g.OH * g.OW;
    run(g, ih0, ih1, grad_output + plane, cells + plane, writer, grad_input + p * g.H * g.W);
  }
}

}  // namespace
}  // namespace dlops::cpu
