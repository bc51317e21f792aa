#include "cpu/simd/max_pool2d.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "cpu/simd/lanes.h"
#include "cpu/simd/phased_rows.h"
#include "cpu/simd/pool_windows.h"

namespace dlops::cpu {
namespace {

RowGeometry horizontal(const Pool2dGeometry& g) {
  return {g.W, g.OW, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w};
}

// Vectors of windows that are worked on side by side: one alone would wait for its own comparisons.
constexpr int64_t kBlocks = 4;

// Calls f(position, blocks as a constant) until `count` elements are covered.
template <int64_t lanes, class F>
void for_each_block(int64_t count, const F& f) {
  int64_t at = 0;
  for (; at + kBlocks * lanes <= count; at += kBlocks * lanes)
    f(at, std::integral_constant<int64_t, kBlocks>());
  for (; at < count; at += lanes) f(at, std::integral_constant<int64_t, 1>());
}

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
  if (dilation == 1) {  // one division for all of them
    const int64_t last = (i + padding) / stride, first = i + padding - last * stride;
    const int64_t beyond = std::max<int64_t>(0, last - outputs + 1);
    for (int64_t k = first + beyond * stride, o = last - beyond; k < kernel && o >= 0;
         k += stride, --o)
      f(o, k);
    return;
  }
  for (int64_t k = 0; k < kernel; ++k) {
    const int64_t start = i + padding - k * dilation;
    if (start < 0) return;
    if (start % stride == 0 && start / stride < outputs) f(start / stride, k);
  }
}

// Working memory of the contiguous kernels, cut from one buffer.
template <class scalar_t, class cell_t>
struct Workspace {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  int64_t slots;           // input rows that are kept phased
  value_t* rows;           // those rows
  int64_t* held;           // which input row each of them is
  const value_t** window;  // the rows of the current windows, by kernel row
  int64_t* offsets;        // where a phased row begins for each kernel column
  id_t* first;             // the first kernel column in the image, for each output column

  Workspace(const Pool2dGeometry& g, const PhasedRows& phased, void* scratch)
      : slots(std::min(g.H, g.dilation_h * (g.kernel_h - 1) + 1)),
        rows(static_cast<value_t*>(scratch)),
        held(reinterpret_cast<int64_t*>(rows + aligned(slots * phased.size()))),
        window(reinterpret_cast<const value_t**>(held + aligned(slots))),
        offsets(reinterpret_cast<int64_t*>(window + aligned(g.kernel_h))),
        first(reinterpret_cast<id_t*>(offsets + aligned(g.kernel_w))) {}
  void prepare(const Pool2dGeometry& g, const PhasedRows& phased) const {
    std::fill_n(rows, slots * phased.size(), lowest<value_t>());  // the padding
    for (int64_t s = 0; s < g.kernel_w; ++s) offsets[s] = phased.offset(s);
    for (int64_t ow = 0; ow < g.OW; ++ow)
      first[ow] = static_cast<id_t>(columns_inside(g, ow).begin);
  }
  static int64_t bytes(const Pool2dGeometry& g) {
    const Workspace none(g, PhasedRows(horizontal(g)), nullptr);
    return reinterpret_cast<intptr_t>(none.first + aligned(g.OW + kRowSlack));
  }
  static int64_t aligned(int64_t count) { return (count + 63) / 64 * 64; }
};

// Working memory of the contiguous backward: the last few output rows' gradients and cells between
// margins of zeros, so that every kernel column's window of them is a plain vector load.
template <class scalar_t, class cell_t>
struct ScatterWorkspace {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  int64_t slots, margin, width;
  value_t* grads;
  id_t* cells;
  value_t* row;      // the phased input row that is being summed
  int64_t* held;     // which output row is in each slot
  int64_t* windows;  // of the current input row: where the output row begins, its first cell
  int64_t* phase;    // for each kernel column, the phase it is in
  int64_t* shift;    // and how far its output column lies to the left

  ScatterWorkspace(const Pool2dGeometry& g, const PhasedRows& phased, void* scratch)
      : slots(std::min(g.OH, g.dilation_h * (g.kernel_h - 1) / g.stride_h + 1)),
        margin(g.dilation_w * (g.kernel_w - 1) / g.stride_w),
        width(margin + phased.stored_width() + kRowSlack),
        grads(static_cast<value_t*>(scratch)),
        cells(reinterpret_cast<id_t*>(grads + aligned(slots * width))),
        row(reinterpret_cast<value_t*>(cells + aligned(slots * width))),
        held(reinterpret_cast<int64_t*>(row + aligned(phased.size()))),
        windows(held + aligned(slots)),
        phase(windows + aligned(2 * g.kernel_h)),
        shift(phase + aligned(g.kernel_w)) {}
  void prepare(const Pool2dGeometry& g) const {
    std::fill_n(grads, slots * width, value_t(0));
    std::fill_n(cells, slots * width, id_t(0));
    for (int64_t s = 0; s < g.kernel_w; ++s) {
      phase[s] = s * g.dilation_w % g.stride_w;
      shift[s] = s * g.dilation_w / g.stride_w;
    }
  }
  // Copies output row oh unless its slot holds it.
  void keep(const Pool2dGeometry& g, int64_t oh, const scalar_t* grad_output,
            const cell_t* chosen) const {
    const int64_t slot = oh % slots, at = slot * width + margin;
    if (held[slot] == oh) return;
    held[slot] = oh;
    for (int64_t ow = 0; ow < g.OW; ++ow)
      grads[at + ow] = static_cast<value_t>(grad_output[oh * g.OW + ow]);
    for (int64_t ow = 0; ow < g.OW; ++ow)
      cells[at + ow] = static_cast<id_t>(chosen[oh * g.OW + ow]);
  }
  static int64_t bytes(const Pool2dGeometry& g) {
    const ScatterWorkspace none(g, PhasedRows(horizontal(g)), nullptr);
    return reinterpret_cast<intptr_t>(none.shift + aligned(g.kernel_w));
  }
  static int64_t aligned(int64_t count) { return (count + 63) / 64 * 64; }
};

}  // namespace

template <int capability, class scalar_t, class cell_t>
int64_t max_pool2d_scratch(const Pool2dGeometry& g) {
  return std::max(Workspace<scalar_t, cell_t>::bytes(g),
                  ScatterWorkspace<scalar_t, cell_t>::bytes(g));
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_rows(const Pool2dGeometry& g, int64_t planes, int64_t oh0, int64_t oh1,
                     const scalar_t* input, scalar_t* output, cell_t* cells, void* scratch) {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  const PhasedRows phased(horizontal(g));
  const Workspace<scalar_t, cell_t> work(g, phased, scratch);
  work.prepare(g, phased);
  const int64_t end = ((planes - 1) * g.OH + oh1) * g.OW;
  for (int64_t row = oh0; row < (planes - 1) * g.OH + oh1; ++row) {
    const int64_t plane = row / g.OH, oh = row % g.OH;
    if (oh == oh0) std::fill_n(work.held, work.slots, int64_t(-1));
    const Range r = rows_inside(g, oh);
    for (int64_t i = r.begin; i < r.end; ++i) {
      const int64_t ih = g.input_row(oh, i), slot = ih % work.slots;
      value_t* values = work.rows + slot * phased.size();
      if (work.held[slot] != ih) phased.split(input + (plane * g.H + ih) * g.W, values);
      work.held[slot] = ih;
      work.window[i] = values;
    }
    const id_t base = static_cast<id_t>(g.cell_number(r.begin, 0));
    for_each_block<lanes>(g.OW, [&](int64_t ow, auto blocks) {
      Windows<scalar_t, cell_t, blocks> windows;
      for (int64_t b = 0; b < blocks; ++b)
        windows.cell[b] = load<id_t, lanes>(work.first + ow + b * lanes) + base;
      for (int64_t i = r.begin; i < r.end; ++i) {
        const value_t* values = work.window[i] + ow;
        for (int64_t s = 0; s < g.kernel_w; ++s)
          windows.visit(values + work.offsets[s], lanes, static_cast<id_t>(g.cell_number(i, s)));
      }
      // Lanes past the row's end are written, too: the next row comes after.
      const int64_t at = row * g.OW + ow;
      windows.store(output + at, cells == nullptr ? nullptr : cells + at, end - at);
    });
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows(const Pool2dGeometry& g, int64_t planes, int64_t ih0, int64_t ih1,
                             const scalar_t* grad_output, const cell_t* cells, scalar_t* grad_input,
                             void* scratch) {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  const PhasedRows phased(horizontal(g));
  const ScatterWorkspace<scalar_t, cell_t> work(g, phased, scratch);
  work.prepare(g);
  for (int64_t row = ih0; row < (planes - 1) * g.H + ih1; ++row) {
    const int64_t plane = row / g.H * g.OH * g.OW, ih = row % g.H;
    if (ih == ih0) std::fill_n(work.held, work.slots, int64_t(-1));
    int64_t count = 0;
    for_each_window(ih, g.stride_h, g.pad_h, g.dilation_h, g.kernel_h, g.OH,
                    [&](int64_t oh, int64_t r) {
                      work.keep(g, oh, grad_output + plane, cells + plane);
                      work.windows[2 * count] = oh % work.slots * work.width + work.margin;
                      work.windows[2 * count + 1] = g.cell_number(r, 0);
                      ++count;
                    });
    for (int64_t phase = 0; phase < phased.phases(); ++phase) {
      for (int64_t x = 0; x < phased.width(); x += lanes) {
        Vector<value_t, lanes> sum = {};
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t s = 0; s < g.kernel_w; ++s) {
            if (work.phase[s] != phase) continue;
            const int64_t at = work.windows[2 * i] + x - work.shift[s];
            const auto grad = load<value_t, lanes>(work.grads + at);
            const auto chosen = load<id_t, lanes>(work.cells + at);
            const auto mine = chosen == static_cast<id_t>(work.windows[2 * i + 1] + s);
            sum += mine ? grad : Vector<value_t, lanes>{};
          }
        }
        store_part<lanes>(sum, work.row + phase * phased.stored_width() + x, lanes);
      }
    }
    phased.join(work.row, scalar_t(0), grad_input + row * g.W);
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
    const id_t first = static_cast<id_t>(g.cell_number(r.begin, s.begin));
    for_each_block<lanes>(g.C, [&](int64_t c, auto blocks) {
      Windows<scalar_t, cell_t, blocks> windows;
      for (auto& cell : windows.cell) cell = fill<id_t, lanes>(first);
      for (int64_t i = r.begin; i < r.end; ++i) {
        for (int64_t j = s.begin; j < s.end; ++j) {
          const int64_t at = (g.input_row(oh, i) * g.W + g.input_col(ow, j)) * g.C + c;
          windows.visit(input + at, g.C - c, static_cast<id_t>(g.cell_number(i, j)));
        }
      }
      windows.store(output + p * g.C + c, cells == nullptr ? nullptr : cells + p * g.C + c,
                    g.C - c);
    });
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows_last(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                                  const scalar_t* grad_output, const cell_t* cells,
                                  scalar_t* grad_input, void* scratch) {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  // The windows that hold one input row, and those that hold one pixel of it: where they begin in
  // the output, and which cell it is.
  auto* rows = static_cast<int64_t*>(scratch);
  int64_t* windows = rows + 2 * std::min(g.kernel_h, g.OH);
  int64_t row_count = 0;
  for (int64_t p = ih0 * g.W, iw = 0; p < ih1 * g.W; ++p, iw = iw + 1 == g.W ? 0 : iw + 1) {
    if (iw == 0) {
      row_count = 0;
      for_each_window(p / g.W, g.stride_h, g.pad_h, g.dilation_h, g.kernel_h, g.OH,
                      [&](int64_t oh, int64_t r) {
                        rows[2 * row_count] = oh * g.OW * g.C;
                        rows[2 * row_count + 1] = g.cell_number(r, 0);
                        ++row_count;
                      });
    }
    int64_t cols = 0;
    if (row_count > 0) {
      for_each_window(iw, g.stride_w, g.pad_w, g.dilation_w, g.kernel_w, g.OW,
                      [&](int64_t ow, int64_t s) {
                        windows[2 * cols] = rows[0] + ow * g.C;
                        windows[2 * cols + 1] = rows[1] + s;
                        ++cols;
                      });
    }
    const int64_t count = row_count * cols;
    for (int64_t i = 1; i < row_count; ++i) {
      for (int64_t j = 0; j < 2 * cols; ++j)
        windows[2 * i * cols + j] = windows[j] - rows[j % 2] + rows[2 * i + j % 2];
    }
    for_each_block<lanes>(g.C, [&](int64_t c, auto blocks) {
      Vector<value_t, lanes> sum[blocks] = {};
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t at = windows[2 * i] + c + b * lanes, left = blocks > 1 ? lanes : g.C - c;
          const auto grad = load_part<value_t, lanes>(grad_output + at, left);
          const auto chosen = load_part<id_t, lanes>(cells + at, left);
          const auto mine = chosen == static_cast<id_t>(windows[2 * i + 1]);
          sum[b] += mine ? grad : Vector<value_t, lanes>{};
        }
      }
      for (int64_t b = 0; b < blocks; ++b)
        store_part<lanes>(sum[b], grad_input + p * g.C + c + b * lanes,
                          blocks > 1 ? lanes : g.C - c);
    });
  }
}

#define DLOPS_INSTANTIATE_FORWARD(scalar_t, cell_t)                                               \
  template int64_t max_pool2d_scratch<DLOPS_CAPABILITY, scalar_t, cell_t>(const Pool2dGeometry&); \
  template void max_pool2d_rows<DLOPS_CAPABILITY, scalar_t, cell_t>(                              \
      const Pool2dGeometry&, int64_t, int64_t, int64_t, const scalar_t*, scalar_t*, cell_t*,      \
      void*);                                                                                     \
  template void max_pool2d_rows_last<DLOPS_CAPABILITY, scalar_t, cell_t>(                         \
      const Pool2dGeometry&, int64_t, int64_t, const scalar_t*, scalar_t*, cell_t*);

#define DLOPS_INSTANTIATE_SCATTER(scalar_t, cell_t)                                                \
  template void max_pool2d_scatter_rows<DLOPS_CAPABILITY, scalar_t, cell_t>(                       \
      const Pool2dGeometry&, int64_t, int64_t, int64_t, const scalar_t*, const cell_t*, scalar_t*, \
      void*);                                                                                      \
  template void max_pool2d_scatter_rows_last<DLOPS_CAPABILITY, scalar_t, cell_t>(                  \
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
