#include "cpu/simd/max_pool2d.h"

#include <ATen/OpMathType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "cpu/simd/phased_rows.h"

// A window's state is kept for a vector's worth of outputs at a time, in arrays of fixed length
// that the compiler keeps in registers.
namespace dlops::cpu {
namespace {

// Comparisons of low-precision values are exact in float32.
template <class scalar_t>
using work_t =
    std::conditional_t<std::is_integral_v<scalar_t>, scalar_t, at::opmath_type<scalar_t>>;

// A cell's number in a lane as wide as the value's, so that both share one mask.
template <size_t bytes>
struct LaneOfSize;
template <>
struct LaneOfSize<1> {
  using type = uint8_t;
};
template <>
struct LaneOfSize<2> {
  using type = uint16_t;
};
template <>
struct LaneOfSize<4> {
  using type = uint32_t;
};
template <>
struct LaneOfSize<8> {
  using type = uint64_t;
};
template <class scalar_t, class cell_t>
using lane_t = std::conditional_t<std::is_same_v<cell_t, uint8_t>,
                                  typename LaneOfSize<sizeof(work_t<scalar_t>)>::type, int64_t>;

template <class scalar_t>
constexpr int64_t kLanes = 64 / static_cast<int64_t>(sizeof(work_t<scalar_t>));

template <class T>
constexpr T lowest() {
  return std::numeric_limits<T>::has_infinity ? -std::numeric_limits<T>::infinity()
                                              : std::numeric_limits<T>::lowest();
}

// The best value and its cell for kLanes windows.
template <class scalar_t, class cell_t>
struct Windows {
  using value_t = work_t<scalar_t>;
  using id_t = lane_t<scalar_t, cell_t>;
  static constexpr int64_t lanes = kLanes<scalar_t>;
  value_t best[lanes];
  id_t cell[lanes];

  void start() {
    for (int64_t l = 0; l < lanes; ++l) best[l] = lowest<value_t>();
  }
  template <class from_t>
  void visit(const from_t* values, id_t id) {
    for (int64_t l = 0; l < lanes; ++l) {
      const value_t value = static_cast<value_t>(values[l]);
      const bool takes = (value > best[l]) | (value != value);
      best[l] = takes ? value : best[l];
      cell[l] = takes ? id : cell[l];
    }
  }
  void store(scalar_t* output, cell_t* cells, int64_t count) const {
    for (int64_t l = 0; l < count; ++l) output[l] = static_cast<scalar_t>(best[l]);
    if (cells == nullptr) return;
    for (int64_t l = 0; l < count; ++l) cells[l] = static_cast<cell_t>(cell[l]);
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
  using value_t = work_t<scalar_t>;
  int64_t slots;
  value_t* rows;
  int64_t* held;
  lane_t<scalar_t, cell_t>* first;

  Workspace(const Pool2dGeometry& g, const PhasedRows& phased, void* scratch)
      : slots(std::min(g.H, g.dilation_h * (g.kernel_h - 1) + 1)),
        rows(static_cast<value_t*>(scratch)),
        held(reinterpret_cast<int64_t*>(rows + aligned(slots * phased.size()))),
        first(reinterpret_cast<lane_t<scalar_t, cell_t>*>(held + aligned(slots))) {}
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
  using id_t = lane_t<scalar_t, cell_t>;
  constexpr int64_t lanes = kLanes<scalar_t>;
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
      work_t<scalar_t>* held = work.rows + slot * phased.size();
      if (work.held[slot] != ih) phased.split(input + ih * g.W, lowest<work_t<scalar_t>>(), held);
      work.held[slot] = ih;
      return held;
    };
    for (int64_t ow = 0; ow < g.OW; ow += lanes) {
      Windows<scalar_t, cell_t> windows;
      windows.start();
      for (int64_t l = 0; l < lanes; ++l)
        windows.cell[l] = static_cast<id_t>(r.begin * g.kernel_w + work.first[ow + l]);
      for (int64_t i = r.begin; i < r.end; ++i) {
        const work_t<scalar_t>* values = row(i) + ow;
        for (int64_t s = 0; s < g.kernel_w; ++s)
          windows.visit(values + phased.offset(s), static_cast<id_t>(i * g.kernel_w + s));
      }
      windows.store(output + oh * g.OW + ow, cells == nullptr ? nullptr : cells + oh * g.OW + ow,
                    std::min(lanes, g.OW - ow));
    }
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                             const scalar_t* grad_output, const cell_t* cells, scalar_t* grad_input,
                             void* scratch) {
  using value_t = work_t<scalar_t>;
  using id_t = lane_t<scalar_t, cell_t>;
  const PhasedRows phased(g);
  const Workspace<scalar_t, cell_t> work(g, phased, scratch);
  for (int64_t ih = ih0; ih < ih1; ++ih) {
    std::fill_n(work.rows, phased.size(), value_t(0));
    for_each_window(
        ih, g.stride_h, g.pad_h, g.dilation_h, g.kernel_h, g.OH, [&](int64_t oh, int64_t r) {
          const scalar_t* grad = grad_output + oh * g.OW;
          const cell_t* chosen = cells + oh * g.OW;
          for (int64_t s = 0; s < g.kernel_w; ++s) {
            value_t* sum = work.rows + phased.offset(s);
            const id_t id = static_cast<id_t>(r * g.kernel_w + s);
            for (int64_t ow = 0; ow < g.OW; ++ow)
              sum[ow] +=
                  static_cast<id_t>(chosen[ow]) == id ? static_cast<value_t>(grad[ow]) : value_t(0);
          }
        });
    phased.join(work.rows, scalar_t(0), grad_input + ih * g.W);
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_rows_last(const Pool2dGeometry& g, int64_t oh0, int64_t oh1, const scalar_t* input,
                          scalar_t* output, cell_t* cells) {
  using id_t = lane_t<scalar_t, cell_t>;
  constexpr int64_t lanes = kLanes<scalar_t>;
  for (int64_t p = oh0 * g.OW; p < oh1 * g.OW; ++p) {
    const int64_t oh = p / g.OW, ow = p % g.OW;
    const Range r = rows_inside(g, oh), s = columns_inside(g, ow);
    for (int64_t c = 0; c < g.C; c += lanes) {
      const int64_t count = std::min(lanes, g.C - c);
      Windows<scalar_t, cell_t> windows;
      windows.start();
      for (int64_t l = 0; l < lanes; ++l)
        windows.cell[l] = static_cast<id_t>(r.begin * g.kernel_w + s.begin);
      for (int64_t i = r.begin; i < r.end; ++i) {
        for (int64_t j = s.begin; j < s.end; ++j) {
          const scalar_t* values =
              input + (g.input_row(oh, i) * g.W + g.input_col(ow, j)) * g.C + c;
          const id_t id = static_cast<id_t>(i * g.kernel_w + j);
          if (count == lanes) {
            windows.visit(values, id);
          } else {
            scalar_t tail[lanes] = {};
            for (int64_t l = 0; l < count; ++l) tail[l] = values[l];
            windows.visit(tail, id);
          }
        }
      }
      windows.store(output + p * g.C + c, cells == nullptr ? nullptr : cells + p * g.C + c, count);
    }
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows_last(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                                  const scalar_t* grad_output, const cell_t* cells,
                                  scalar_t* grad_input) {
  using value_t = work_t<scalar_t>;
  using id_t = lane_t<scalar_t, cell_t>;
  constexpr int64_t lanes = kLanes<scalar_t>;
  for (int64_t p = ih0 * g.W; p < ih1 * g.W; ++p) {
    for (int64_t c = 0; c < g.C; c += lanes) {
      const int64_t count = std::min(lanes, g.C - c);
      value_t sum[lanes] = {};
      const auto add = [&](int64_t oh, int64_t r, int64_t ow, int64_t s) {
        const int64_t at = (oh * g.OW + ow) * g.C + c;
        const id_t id = static_cast<id_t>(r * g.kernel_w + s);
        const auto one = [&](int64_t l) {
          sum[l] += static_cast<id_t>(cells[at + l]) == id
                        ? static_cast<value_t>(grad_output[at + l])
                        : value_t(0);
        };
        if (count == lanes) {
          for (int64_t l = 0; l < lanes; ++l) one(l);
        } else {
          for (int64_t l = 0; l < count; ++l) one(l);
        }
      };
      for_each_window(p / g.W, g.stride_h, g.pad_h, g.dilation_h, g.kernel_h, g.OH,
                      [&](int64_t oh, int64_t r) {
                        for_each_window(p % g.W, g.stride_w, g.pad_w, g.dilation_w, g.kernel_w,
                                        g.OW, [&](int64_t ow, int64_t s) { add(oh, r, ow, s); });
                      });
      for (int64_t l = 0; l < count; ++l)
        grad_input[p * g.C + c + l] = static_cast<scalar_t>(sum[l]);
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
      const Pool2dGeometry&, int64_t, int64_t, const scalar_t*, const cell_t*, scalar_t*);

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
