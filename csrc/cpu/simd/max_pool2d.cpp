#include "cpu/simd/max_pool2d.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "cpu/simd/lanes.h"
#if DLOPS_CAPABILITY == 2
#include "cpu/simd/max_pool2d_last_masked.h"
#include "cpu/simd/max_pool2d_masked.h"
#include "cpu/simd/max_pool2d_scatter_around.h"
#include "cpu/simd/max_pool2d_scatter_last_masked.h"
#include "cpu/simd/max_pool2d_scatter_masked.h"
#endif
#include "cpu/simd/phased_rows.h"
#include "cpu/simd/pool_ranges.h"
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
  for (; at + kBlocks * lanes <= count; at += kBlocks * lanes) f(at, Constant<kBlocks>());
  for (; at < count; at += lanes) f(at, Constant<1>());
}

// Working memory of the contiguous forward, cut from one buffer: the best of the last few input
// rows, for each window.
template <class scalar_t, class cell_t>
struct Workspace {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  static constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  int64_t slots, width;
  value_t* phased;   // the row that is being visited
  value_t* best;     // of the rows that are kept,
  id_t* column;      // and the kernel column where it is
  int64_t* held;     // which input row is in each slot
  int64_t* window;   // where the rows of the current windows are, by kernel row
  int64_t* offsets;  // where a phased row begins for each kernel column
  id_t* first;       // the first kernel column in the image, for each output column

  Workspace(const Pool2dGeometry& g, const PhasedRows& rows, void* scratch)
      : slots(std::min(g.H, g.dilation_h * (g.kernel_h - 1) + 1)),
        width(aligned(g.OW + kRowSlack)),
        phased(static_cast<value_t*>(scratch)),
        best(phased + aligned(rows.size())),
        column(reinterpret_cast<id_t*>(best + slots * width)),
        held(reinterpret_cast<int64_t*>(column + slots * width)),
        window(held + aligned(slots)),
        offsets(window + aligned(g.kernel_h)),
        first(reinterpret_cast<id_t*>(offsets + aligned(g.kernel_w))) {}
  void prepare(const Pool2dGeometry& g, const PhasedRows& rows) const {
    std::fill_n(phased, rows.size(), lowest<value_t>());  // the padding
    for (int64_t s = 0; s < g.kernel_w; ++s) offsets[s] = rows.offset(s);
    for (int64_t ow = 0; ow < g.OW; ++ow)
      first[ow] = static_cast<id_t>(columns_inside(g, ow).begin);
  }
  // Where the best of input row ih of a plane are.
  int64_t keep(const Pool2dGeometry& g, const PhasedRows& rows, int64_t ih,
               const scalar_t* plane) const {
    const int64_t slot = ih - quotient(ih, slots) * slots, at = slot * width;
    if (held[slot] == ih) return at;
    held[slot] = ih;
    rows.split(plane + ih * g.W, phased);
    for_each_block<lanes>(g.OW, [&](int64_t ow, auto blocks) {
      Windows<scalar_t, cell_t, blocks> windows;
      for (int64_t b = 0; b < blocks; ++b)
        windows.start(b, load<value_t, lanes>(phased + offsets[0] + ow + b * lanes),
                      load<id_t, lanes>(first + ow + b * lanes));
      for (int64_t s = 1; s < g.kernel_w; ++s)
        windows.visit(phased + offsets[s] + ow, lanes, static_cast<id_t>(s));
      for (int64_t b = 0; b < blocks; ++b) {
        store_part<lanes>(windows.best[b], best + at + ow + b * lanes, lanes);
        store_part<lanes>(windows.cell[b], column + at + ow + b * lanes, lanes);
      }
    });
    return at;
  }
  static int64_t bytes(const Pool2dGeometry& g) {
    const Workspace none(g, PhasedRows(horizontal(g)), nullptr);
    return reinterpret_cast<intptr_t>(none.first + none.width);
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
  // Where in `grads` and `cells` output row oh is, copied unless its slot holds it.
  int64_t keep(const Pool2dGeometry& g, int64_t oh, const scalar_t* grad_output,
               const cell_t* chosen) const {
    const int64_t slot = oh - quotient(oh, slots) * slots, at = slot * width + margin;
    if (held[slot] == oh) return at;
    held[slot] = oh;
    for (int64_t ow = 0; ow < g.OW; ++ow)
      grads[at + ow] = static_cast<value_t>(grad_output[oh * g.OW + ow]);
    for (int64_t ow = 0; ow < g.OW; ++ow)
      cells[at + ow] = static_cast<id_t>(chosen[oh * g.OW + ow]);
    return at;
  }
  static int64_t bytes(const Pool2dGeometry& g) {
    const ScatterWorkspace none(g, PhasedRows(horizontal(g)), nullptr);
    return reinterpret_cast<intptr_t>(none.shift + aligned(g.kernel_w));
  }
  static int64_t aligned(int64_t count) { return (count + 63) / 64 * 64; }
};

// The windows of one output row, of which the kernel rows of `r` lie in the image. `room`: elements
// from the row's first one on that may be written.
template <class scalar_t, class cell_t>
void row_of_windows(const Pool2dGeometry& g, const Workspace<scalar_t, cell_t>& work, Range r,
                    scalar_t* output, cell_t* cells, int64_t room) {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  for_each_block<lanes>(g.OW, [&](int64_t ow, auto blocks) {
    Windows<scalar_t, cell_t, blocks> windows;
    const auto corner = fill<id_t, lanes>(static_cast<id_t>(g.cell_number(r.begin, 0)));
    for (int64_t b = 0; b < blocks; ++b)  // of padding alone
      windows.cell[b] = corner + load<id_t, lanes>(work.first + ow + b * lanes);
    for (int64_t i = r.begin; i < r.end; ++i) {
      const int64_t at = work.window[i] + ow;
      const auto row = fill<id_t, lanes>(static_cast<id_t>(g.cell_number(i, 0)));
      for (int64_t b = 0; b < blocks; ++b)
        windows.visit(b, load<value_t, lanes>(work.best + at + b * lanes),
                      row + load<id_t, lanes>(work.column + at + b * lanes));
    }
    windows.store(output + ow, cells == nullptr ? nullptr : cells + ow, room - ow);
  });
}

// Gathers one input row, still split into phases, from the `count` output rows that hold it.
template <class scalar_t, class cell_t>
void sum_phased_row(const Pool2dGeometry& g, const PhasedRows& phased,
                    const ScatterWorkspace<scalar_t, cell_t>& work, int64_t count) {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
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
}

// sum += the gradients of the windows that chose cell `id`; `count` of them are there, any number
// where there is more than one block.
template <int64_t lanes, int64_t blocks, class scalar_t, class cell_t, class value_t, class id_t>
C10_ALWAYS_INLINE void add_chosen(const scalar_t* grad, const cell_t* cells, id_t id, int64_t count,
                                  Vector<value_t, lanes>* sum) {
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t left = blocks > 1 ? lanes : count;
    const auto here = load_part<value_t, lanes>(grad + b * lanes, left);
    const auto mine = load_part<id_t, lanes>(cells + b * lanes, left) == id;
    sum[b] += mine ? here : Vector<value_t, lanes>{};
  }
}

}  // namespace

template <int capability, class scalar_t, class cell_t>
int64_t max_pool2d_scratch(const Pool2dGeometry& g) {
  return std::max(Workspace<scalar_t, cell_t>::bytes(g),
                  ScatterWorkspace<scalar_t, cell_t>::bytes(g));
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_rows(const Pool2dGeometry& g, int64_t planes, int64_t oh0, int64_t oh1,
                     const scalar_t* input, scalar_t* output, cell_t* cells, void* scratch) {
#if DLOPS_CAPABILITY == 2
  if constexpr (std::is_same_v<cell_t, uint8_t> && !std::is_integral_v<scalar_t>) {
    if (masked_rows(g)) {
      const auto rows =
          g.stride_w == 1 ? max_pool2d_masked<1, scalar_t> : max_pool2d_masked<2, scalar_t>;
      return rows(g, planes, oh0, oh1, input, output, cells);
    }
  }
#endif
  const PhasedRows phased(horizontal(g));
  const Workspace<scalar_t, cell_t> work(g, phased, scratch);
  work.prepare(g, phased);
  for (int64_t p = 0; p < planes; ++p) {
    std::fill_n(work.held, work.slots, int64_t(-1));
    for (int64_t oh = oh0; oh < oh1; ++oh) {
      const Range r = rows_inside(g, oh);
      for (int64_t i = r.begin; i < r.end; ++i)
        work.window[i] = work.keep(g, phased, g.input_row(oh, i), input + p * g.H * g.W);
      // Lanes past the row's end are written, too: the next row comes after.
      const int64_t row = (p * g.OH + oh) * g.OW, end = ((planes - 1) * g.OH + oh1) * g.OW;
      row_of_windows(g, work, r, output + row, cells == nullptr ? nullptr : cells + row, end - row);
    }
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows(const Pool2dGeometry& g, int64_t planes, int64_t ih0, int64_t ih1,
                             const scalar_t* grad_output, const cell_t* cells, scalar_t* grad_input,
                             void* scratch) {
#if DLOPS_CAPABILITY == 2
  if constexpr (std::is_same_v<cell_t, uint8_t>) {
    if (masked_rows(g)) {
      const auto rows = scatters_around(g) ? max_pool2d_scatter_around<scalar_t>
                        : g.stride_w == 1  ? max_pool2d_scatter_masked<1, scalar_t>
                                           : max_pool2d_scatter_masked<2, scalar_t>;
      return rows(g, planes, ih0, ih1, grad_output, cells, grad_input);
    }
  }
#endif
  const PhasedRows phased(horizontal(g));
  const ScatterWorkspace<scalar_t, cell_t> work(g, phased, scratch);
  work.prepare(g);
  for (int64_t p = 0; p < planes; ++p) {
    const int64_t plane = p * g.OH * g.OW;
    std::fill_n(work.held, work.slots, int64_t(-1));
    for (int64_t ih = ih0; ih < ih1; ++ih) {
      int64_t count = 0;
      for (Holders rows = rows_holding(g, ih); rows.valid(); rows.next()) {
        work.windows[2 * count] = work.keep(g, rows.output(), grad_output + plane, cells + plane);
        work.windows[2 * count + 1] = g.cell_number(rows.offset(), 0);
        ++count;
      }
      sum_phased_row(g, phased, work, count);
      phased.join(work.row, scalar_t(0), grad_input + (p * g.H + ih) * g.W);
    }
  }
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_rows_last(const Pool2dGeometry& g, int64_t oh0, int64_t oh1, const scalar_t* input,
                          scalar_t* output, cell_t* cells) {
#if DLOPS_CAPABILITY == 2
  if constexpr (std::is_same_v<cell_t, uint8_t> && !std::is_integral_v<scalar_t>)
    return max_pool2d_last_masked(g, oh0, oh1, input, output, cells);
#endif
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  for (int64_t oh = oh0; oh < oh1; ++oh) {
    const Range r = rows_inside(g, oh);
    for (int64_t ow = 0; ow < g.OW; ++ow) {
      const int64_t p = oh * g.OW + ow;
      const Range s = columns_inside(g, ow);
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
}

template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows_last(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                                  const scalar_t* grad_output, const cell_t* cells,
                                  scalar_t* grad_input) {
#if DLOPS_CAPABILITY == 2
  if constexpr (std::is_same_v<cell_t, uint8_t>)
    return max_pool2d_scatter_last_masked(g, ih0, ih1, grad_output, cells, grad_input);
#endif
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  const Writer writer(g.N * g.C * g.H * g.W * static_cast<int64_t>(sizeof(scalar_t)));
  for (int64_t ih = ih0; ih < ih1; ++ih) {
    const Holders rows = rows_holding(g, ih);
    for (int64_t iw = 0; iw < g.W; ++iw) {
      const Holders columns = columns_holding(g, iw);
      scalar_t* to = grad_input + (ih * g.W + iw) * g.C;
      for_each_block<lanes>(g.C, [&](int64_t c, auto blocks) {
        Vector<value_t, lanes> sum[blocks] = {};
        for (Holders row = rows; row.valid(); row.next()) {
          for (Holders column = columns; column.valid(); column.next()) {
            const int64_t at = (row.output() * g.OW + column.output()) * g.C + c;
            const int64_t cell = g.cell_number(row.offset(), column.offset());
            add_chosen<lanes, blocks, scalar_t, cell_t, value_t, id_t>(
                grad_output + at, cells + at, static_cast<id_t>(cell), g.C - c, sum);
          }
        }
        for (int64_t b = 0; b < blocks; ++b)
          writer.store<lanes>(sum[b], to + c + b * lanes, blocks > 1 ? lanes : g.C - c);
      });
    }
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
