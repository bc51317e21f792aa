#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <utility>

#include "cpu/simd/lanes.h"
#include "cpu/simd/max_pool2d.h"
#include "cpu/simd/pool_windows.h"

// Windows of two by two that stand side by side: each input belongs to one window at most, so that
// a row of them is two rows of the image whose columns are taken apart, or put together, in
// registers.
namespace dlops::cpu {
namespace {

// One vector of them.
template <class scalar_t>
using Pairs = Windows<scalar_t, uint8_t, 1>;

template <class T, int64_t lanes, class from_t>
std::pair<Vector<T, lanes>, Vector<T, lanes>> load_two(const from_t* from, int64_t count) {
  return {load_part<T, lanes>(from, count),
          load_part<T, lanes>(from + lanes, std::max<int64_t>(0, count - lanes))};
}

// The upper left corner of output (oh, ow)'s window in a plane, or in an image of C channels.
int64_t corner(const Pool2dGeometry& g, int64_t oh, int64_t ow, int64_t channels) {
  return (2 * oh * g.W + 2 * ow) * channels;
}

// Calls f(plane, row, place of the row among those of all planes) for `begin` to `end` in each of
// `planes`, of which all rows are asked for where there are several.
template <class F>
void for_each_row(int64_t planes, int64_t rows, int64_t begin, int64_t end, const F& f) {
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t row = begin; row < end; ++row) f(plane, row, plane * rows + row);
}

}  // namespace

// In both, lanes past a row's end are read and written where there is something: the next row comes
// after, and overwrites them.
template <int capability, class scalar_t>
void max_pool2d_pairs(const Pool2dGeometry& g, int64_t planes, int64_t oh0, int64_t oh1,
                      const scalar_t* input, scalar_t* output, uint8_t* cells) {
  using P = Pairs<scalar_t>;
  const int64_t end = ((planes - 1) * g.OH + oh1) * g.OW, input_end = planes * g.H * g.W;
  for_each_row(planes, g.OH, oh0, oh1, [&](int64_t plane, int64_t oh, int64_t row) {
    const scalar_t* first = input + (plane * g.H + 2 * oh) * g.W;
    for (int64_t ow = 0; ow < g.OW; ow += P::lanes) {
      P windows;
      windows.cell[0] = typename P::Ids{};
      for (int r = 0; r < 2; ++r) {
        const scalar_t* from = first + r * g.W + 2 * ow;
        const auto [left, right] =
            load_two<typename P::value_t, P::lanes>(from, input_end - (from - input));
        windows.visit(0, every_second<0, typename P::value_t, P::lanes>(left, right),
                      fill<typename P::id_t, P::lanes>(static_cast<typename P::id_t>(2 * r)));
        windows.visit(0, every_second<1, typename P::value_t, P::lanes>(left, right),
                      fill<typename P::id_t, P::lanes>(static_cast<typename P::id_t>(2 * r + 1)));
      }
      const int64_t at = row * g.OW + ow;
      windows.store(output + at, cells == nullptr ? nullptr : cells + at, end - at);
    }
  });
}

template <int capability, class scalar_t>
void max_pool2d_scatter_pairs(const Pool2dGeometry& g, int64_t planes, int64_t ih0, int64_t ih1,
                              const scalar_t* grad_output, const uint8_t* cells,
                              scalar_t* grad_input) {
  using P = Pairs<scalar_t>;
  using T = typename P::value_t;
  const int64_t end = ((planes - 1) * g.H + ih1) * g.W, output_end = planes * g.OH * g.OW;
  for_each_row(planes, g.H, ih0, ih1, [&](int64_t plane, int64_t ih, int64_t row) {
    const int64_t oh = ih / 2, reached = oh < g.OH ? 2 * g.OW : 0;
    const auto first = static_cast<typename P::id_t>(ih % 2 * 2);
    scalar_t* to = grad_input + row * g.W;
    for (int64_t ow = 0; 2 * ow < reached; ow += P::lanes) {
      const int64_t from = (plane * g.OH + oh) * g.OW + ow, left = output_end - from;
      const auto grad = load_part<T, P::lanes>(grad_output + from, left);
      const auto cell = load_part<typename P::id_t, P::lanes>(cells + from, left) - first;
      const auto even = cell == 0 ? grad : typename P::Values{};
      const auto odd = cell == 1 ? grad : typename P::Values{};
      const int64_t room = end - (row * g.W + 2 * ow);
      store_part<P::lanes>(in_turn<0, T, P::lanes>(even, odd), to + 2 * ow, room);
      if (room > P::lanes && 2 * (g.OW - ow) > P::lanes)
        store_part<P::lanes>(in_turn<1, T, P::lanes>(even, odd), to + 2 * ow + P::lanes,
                             room - P::lanes);
    }
    for (int64_t iw = reached; iw < g.W; ++iw) to[iw] = scalar_t(0);
  });
}

template <int capability, class scalar_t>
void max_pool2d_scatter_pairs_last(const Pool2dGeometry& g, int64_t oh0, int64_t oh1,
                                   const scalar_t* grad_output, const uint8_t* cells,
                                   scalar_t* grad_input) {
  using P = Pairs<scalar_t>;
  const Writer writer(g.N * g.C * g.H * g.W * static_cast<int64_t>(sizeof(scalar_t)));
  const auto clear = [&](int64_t ih, int64_t iw0) {
    if (ih < g.H)
      std::fill(grad_input + (ih * g.W + iw0) * g.C, grad_input + (ih + 1) * g.W * g.C,
                scalar_t(0));
  };
  for (int64_t oh = oh0; oh < oh1; ++oh) {
    for (int64_t ow = 0; ow < g.OW; ++ow) {
      const int64_t from = (oh * g.OW + ow) * g.C;
      scalar_t* to = grad_input + corner(g, oh, ow, g.C);
      for (int64_t c = 0; c < g.C; c += P::lanes) {
        const int64_t count = g.C - c;
        const auto grad = load_part<typename P::value_t, P::lanes>(grad_output + from + c, count);
        const auto cell = load_part<typename P::id_t, P::lanes>(cells + from + c, count);
        for (int k = 0; k < 4; ++k) {
          const auto chosen =
              cell == static_cast<typename P::id_t>(k) ? grad : typename P::Values{};
          writer.store<P::lanes>(chosen, to + (k / 2 * g.W + k % 2) * g.C + c, count);
        }
      }
    }
    clear(2 * oh, 2 * g.OW);
    clear(2 * oh + 1, 2 * g.OW);
    if (oh + 1 < g.OH) continue;
    for (int64_t ih = 2 * g.OH; ih < g.H; ++ih) clear(ih, 0);
  }
}

#define DLOPS_INSTANTIATE_FORWARD(scalar_t)                   \
  template void max_pool2d_pairs<DLOPS_CAPABILITY, scalar_t>( \
      const Pool2dGeometry&, int64_t, int64_t, int64_t, const scalar_t*, scalar_t*, uint8_t*);

#define DLOPS_INSTANTIATE_FLOATING(scalar_t)                                             \
  DLOPS_INSTANTIATE_FORWARD(scalar_t)                                                    \
  template void max_pool2d_scatter_pairs<DLOPS_CAPABILITY, scalar_t>(                    \
      const Pool2dGeometry&, int64_t, int64_t, int64_t, const scalar_t*, const uint8_t*, \
      scalar_t*);                                                                        \
  template void max_pool2d_scatter_pairs_last<DLOPS_CAPABILITY, scalar_t>(               \
      const Pool2dGeometry&, int64_t, int64_t, const scalar_t*, const uint8_t*, scalar_t*);

DLOPS_INSTANTIATE_FLOATING(double)
DLOPS_INSTANTIATE_FLOATING(float)
DLOPS_INSTANTIATE_FLOATING(c10::BFloat16)
DLOPS_INSTANTIATE_FLOATING(c10::Half)
DLOPS_INSTANTIATE_FORWARD(int64_t)
DLOPS_INSTANTIATE_FORWARD(int32_t)
DLOPS_INSTANTIATE_FORWARD(int16_t)
DLOPS_INSTANTIATE_FORWARD(int8_t)
DLOPS_INSTANTIATE_FORWARD(uint8_t)

}  // namespace dlops::cpu
