#include "cpu/simd/max_pool2d.h"

#include <ATen/OpMathType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/simd/lanes.h"
#include "cpu/simd/phased_rows.h"

namespace dlops::cpu {
namespace {

// The type that values are compared and summed in. Low precision is exact in float32; windows too
// large for one-byte cells have 64-bit numbers, and values as wide, so that both share one mask.
template <class scalar_t, class cell_t>
using work_t = std::conditional_t<
    std::is_same_v<cell_t, uint8_t>,
    std::conditional_t<std::is_integral_v<scalar_t>, scalar_t, at::opmath_type<scalar_t>>,
    std::conditional_t<std::is_integral_v<scalar_t>, int64_t, double>>;

template <class scalar_t, class cell_t>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(work_t<scalar_t, cell_t>));

template <class T>
constexpr T lowest() {
  return std::numeric_limits<T>::has_infinity ? -std::numeric_limits<T>::infinity()
                                              : std::numeric_limits<T>::lowest();
}

// The best value and its cell for a vector of windows.
template <class scalar_t, class cell_t>
struct Windows {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  static constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  Vector<value_t, lanes> best = fill<value_t, lanes>(lowest<value_t>());
  Vector<id_t, lanes> cell;

  explicit Windows(Vector<id_t, lanes> first_cell) : cell(first_cell) {}
  void visit(Vector<value_t, lanes> values, id_t id) {
    const auto takes = (values > best) | (values != values);
    best = takes ? values : best;
    cell = takes ? fill<id_t, lanes>(id) : cell;
  }
  void store(scalar_t* output, cell_t* cells, int64_t count) const {
    store_part<lanes>(best, output, count);
    if (cells != nullptr) store_part<lanes>(cell, cells, count);
  }
};

// The kernel rows [begin, end) that lie in the image for output row oh.
struct Range {
  int64_t begin, end;
};
Range rows_inside(const Pool2dGeometry& g, int64_t oh) {
  const int64_t start = g.input_row(oh, 0);
  return {first_offset_inside(start, g.dilation_h),
          offsets_before(start, g.dilation_h, g.kernel_h, g.H)};
}
// The same for the kernel columns of output column ow.
Range columns_inside(const Pool2dGeometry& g, int64_t ow) {
  const int64_t start = g.input_col(ow, 0);
  return {first_offset_inside(start, g.dilation_w),
          offsets_before(start, g.dilation_w, g.kernel_w, g.W)};
}

// Calls f(output position, kernel offset) for the windows along one axis that hold input `i`.
template <class F>
void for_each_window(int64_t i, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel,
                     int64_t outputs, const F& f) {
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t start = i + padding - k * dilation;
    if (start < 0) return;
    if (start % stride == 0 && start / stride < outputs) f(start / stride, k);
  }
}

// Working memory of the contiguous kernels, cut from one buffer: phased input rows, which input row
// each of them holds, and the first kernel column in the image for each output column.
template <class scalar_t, class cell_t>
struct Workspace {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  int64_t slots;
  value_t* rows;
  int64_t* held;
  id_t* first;

  Workspace(const Pool2dGeometry& g, const PhasedRows& phased, void* scratch)
      : slots(std::min(g.H, g.dilation_h * (g.kernel_h - 1) + 1)),
        rows(static_cast<value_t*>(scratch)),
        held(reinterpret_cast<int64_t*>(rows + aligned(slots * phased.size()))),
        first(reinterpret_cast<id_t*>(held + aligned(slots))) {}
  static int64_t bytes(const Pool2dGeometry& g) {
    const Workspace none(g, PhasedRows(g), nullptr);
    return reinterpret_cast<intptr_t>(none.first + aligned(g.OW + kRowSlack));
  }
  static int64_t aligned(int64_t count) { return (count + 63) / 64 * 64; }
};

}  // namespace

template <int capability, class scalar_t, class cell_t>
int64_t max_pool2d_scratch(const Pool2dGeometry& g) {
  return Workspace<scalar_t, cell_t>::bytes(g);
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_rows(const Pool2dGeometry& g, int64_t oh0, int64_t oh1, const scalar_t* input,
                     scalar_t* output, cell_t* cells, void* scratch) {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  const PhasedRows phased(g);
  const Workspace<scalar_t, cell_t> work(g, phased, scratch);
  std::fill_n(work.held, work.slots, int64_t(-1));
  // Where a window of nothing but -inf points.
  for (int64_t ow = 0; ow < g.OW; ++ow)
    work.first[ow] = static_cast<id_t>(columns_inside(g, ow).begin);

  for (int64_t oh = oh0; oh < oh1; ++oh) {
    const Range r = rows_inside(g, oh);
    const auto row = [&](int64_t i) {
      const int64_t ih = g.input_row(oh, i), slot = ih % work.slots;
      value_t* held = work.rows + slot * phased.size();
      if (work.held[slot] != ih) phased.split(input + ih * g.W, lowest<value_t>(), held);
      work.held[slot] = ih;
      return held;
    };
    const id_t base = static_cast<id_t>(r.begin * g.kernel_w);
    for (int64_t ow = 0; ow < g.OW; ow += lanes) {
      Windows<scalar_t, cell_t> windows(load<id_t, lanes>(work.first + ow) + base);
      for (int64_t i = r.begin; i < r.end; ++i) {
        const value_t* values = row(i) + ow;
        for (int64_t s = 0; s < g.kernel_w; ++s)
          windows.visit(load<value_t, lanes>(values + phased.offset(s)),
                        static_cast<id_t>(i * g.kernel_w + s));
      }
      windows.store(output + oh * g.OW + ow, cells == nullptr ? nullptr : cells + oh * g.OW + ow,
                    g.OW - ow);
    }
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                             const scalar_t* grad_output, const cell_t* cells, scalar_t* grad_input,
                             void* scratch) {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  const PhasedRows phased(g);
  const Workspace<scalar_t, cell_t> work(g, phased, scratch);
  for (int64_t ih = ih0; ih < ih1; ++ih) {
    std::fill_n(work.rows, phased.size(), value_t(0));
    const auto add = [&](int64_t oh, int64_t r) {
      for (int64_t ow = 0; ow < g.OW; ow += lanes) {
        const int64_t at = oh * g.OW + ow, count = g.OW - ow;
        const auto grad = load_part<value_t, lanes>(grad_output + at, count);
        const auto chosen = load_part<id_t, lanes>(cells + at, count);
        for (int64_t s = 0; s < g.kernel_w; ++s) {
          value_t* sum = work.rows + phased.offset(s) + ow;
          const auto mine = chosen == static_cast<id_t>(r * g.kernel_w + s);
          const auto total = load<value_t, lanes>(sum) + (mine ? grad : Vector<value_t, lanes>{});
          store_part<lanes>(total, sum, lanes);
        }
      }
    };
    for_each_window(ih, g.stride_h, g.pad_h, g.dilation_h, g.kernel_h, g.OH, add);
    phased.join(work.rows, scalar_t(0), grad_input + ih * g.W);
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_rows_last(const Pool2dGeometry& g, int64_t oh0, int64_t oh1, const scalar_t* input,
                          scalar_t* output, cell_t* cells) {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  for (int64_t p = oh0 * g.OW; p < oh1 * g.OW; ++p) {
    const int64_t oh = p / g.OW, ow = p % g.OW;
    const Range r = rows_inside(g, oh), s = columns_inside(g, ow);
    const id_t first = static_cast<id_t>(r.begin * g.kernel_w + s.begin);
    for (int64_t c = 0; c < g.C; c += lanes) {
      Windows<scalar_t, cell_t> windows(fill<id_t, lanes>(first));
      for (int64_t i = r.begin; i < r.end; ++i) {
        for (int64_t j = s.begin; j < s.end; ++j) {
          const int64_t at = (g.input_row(oh, i) * g.W + g.input_col(ow, j)) * g.C + c;
          windows.visit(load_part<value_t, lanes>(input + at, g.C - c),
                        static_cast<id_t>(i * g.kernel_w + j));
        }
      }
      windows.store(output + p * g.C + c, cells == nullptr ? nullptr : cells + p * g.C + c,
                    g.C - c);
    }
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows_last(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                                  const scalar_t* grad_output, const cell_t* cells,
                                  scalar_t* grad_input, void* scratch) {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  // The windows that hold one input pixel: where they begin in the output, and which cell it is.
  auto* windows = static_cast<int64_t*>(scratch);
  for (int64_t p = ih0 * g.W; p < ih1 * g.W; ++p) {
    int64_t count = 0;
    for_each_window(p / g.W, g.stride_h, g.pad_h, g.dilation_h, g.kernel_h, g.OH,
                    [&](int64_t oh, int64_t r) {
                      for_each_window(p % g.W, g.stride_w, g.pad_w, g.dilation_w, g.kernel_w, g.OW,
                                      [&](int64_t ow, int64_t s) {
                                        windows[2 * count] = (oh * g.OW + ow) * g.C;
                                        windows[2 * count + 1] = r * g.kernel_w + s;
                                        ++count;
                                      });
                    });
    for (int64_t c = 0; c < g.C; c += lanes) {
      Vector<value_t, lanes> sum = {};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = windows[2 * i] + c;
        const auto grad = load_part<value_t, lanes>(grad_output + at, g.C - c);
        const auto chosen = load_part<id_t, lanes>(cells + at, g.C - c);
        const auto mine = chosen == static_cast<id_t>(windows[2 * i + 1]);
        sum += mine ? grad : Vector<value_t, lanes>{};
      }
      store_part<lanes>(sum, grad_input + p * g.C + c, g.C - c);
    }
  }
}

#define DLOPS_INSTANTIATE_FORWARD(scalar_t, cell_t)                                               \
  template int64_t max_pool2d_scratch<DLOPS_CAPABILITY, scalar_t, cell_t>(const Pool2dGeometry&); \
  template void max_pool2d_rows<DLOPS_CAPABILITY, scalar_t, cell_t>(                              \
      const Pool2dGeometry&, int64_t, int64_t, const scalar_t*, scalar_t*, cell_t*, void*);       \
  template void max_pool2d_rows_last<DLOPS_CAPABILITY, scalar_t, cell_t>(                         \
      const Pool2dGeometry&, int64_t, int64_t, const scalar_t*, scalar_t*, cell_t*);

#define DLOPS_INSTANTIATE_SCATTER(scalar_t, cell_t)                                               \
  template void max_pool2d_scatter_rows<DLOPS_CAPABILITY, scalar_t, cell_t>(                      \
      const Pool2dGeometry&, int64_t, int64_t, const scalar_t*, const cell_t*, scalar_t*, void*); \
  template void max_pool2d_scatter_rows_last<DLOPS_CAPABILITY, scalar_t, cell_t>(                 \
      const Pool2dGeometry&, int64_t, int64_t, const scalar_t*, const cell_t*, scalar_t*, void*);

#define DLOPS_INSTANTIATE_INTEGER(scalar_t)    \
  DLOPS_INSTANTIATE_FORWARD(scalar_t, uint8_t) \
  DLOPS_INSTANTIATE_FORWARD(scalar_t, int64_t)

#define DLOPS_INSTANTIATE_FLOATING(scalar_t)   \
  DLOPS_INSTANTIATE_INTEGER(scalar_t)          \
  DLOPS_INSTANTIATE_SCATTER(scalar_t, uint8_t) \
  DLOPS_INSTANTIATE_SCATTER(scalar_t, int64_t)

DLOPS_INSTANTIATE_FLOATING(double)
DLOPS_INSTANTIATE_FLOATING(float)
DLOPS_INSTANTIATE_FLOATING(c10::BFloat16)
DLOPS_INSTANTIATE_FLOATING(c10::Half)
DLOPS_INSTANTIATE_INTEGER(int64_t)
DLOPS_INSTANTIATE_INTEGER(int32_t)
DLOPS_INSTANTIATE_INTEGER(int16_t)
DLOPS_INSTANTIATE_INTEGER(int8_t)
DLOPS_INSTANTIATE_INTEGER(uint8_t)

}  // namespace dlops::cpu
