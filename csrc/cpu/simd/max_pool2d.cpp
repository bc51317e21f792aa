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

// The windows along one axis that hold input `i`, one after the other.
class Holders {
 public:
  Holders(int64_t i, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel,
          int64_t outputs)
      : position_(i + padding),
        stride_(stride),
        dilation_(dilation),
        kernel_(kernel),
        outputs_(outputs) {
    if (dilation == 1) {
      output_ = std::min(position_ / stride, outputs - 1);
      offset_ = position_ - output_ * stride;
    } else {
      offset_ = -1;
      next();
    }
  }
  bool valid() const { return offset_ < kernel_ && output_ >= 0; }
  int64_t output() const { return output_; }
  int64_t offset() const { return offset_; }  // of the input in the kernel
  void next() {
    if (dilation_ == 1) {
      offset_ += stride_;
      --output_;
      return;
    }
    int64_t start = 0;
    do {
      start = position_ - ++offset_ * dilation_;
      output_ = start < 0 ? -1 : start / stride_;
    } while (offset_ < kernel_ && start >= 0 && (start % stride_ != 0 || output_ >= outputs_));
  }

 private:
  int64_t position_, stride_, dilation_, kernel_, outputs_;
  int64_t offset_ = 0, output_ = 0;
};
Holders rows_holding(const Pool2dGeometry& g, int64_t ih) {
  return {ih, g.stride_h, g.pad_h, g.dilation_h, g.kernel_h, g.OH};
}
Holders columns_holding(const Pool2dGeometry& g, int64_t iw) {
  return {iw, g.stride_w, g.pad_w, g.dilation_w, g.kernel_w, g.OW};
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

// sum += the gradients of the windows that chose cell `id`; `count` of them are there, any number
// where there is more than one block.
template <int64_t lanes, int64_t blocks, class scalar_t, class cell_t, class value_t, class id_t>
C10_ALWAYS_INLINE void add_chosen(const scalar_t* grad, const cell_t* cells, id_t id, int64_t count,
                                  Vector<value_t, lanes>* sum) {
#if DLOPS_CAPABILITY == 2
  if constexpr (blocks * lanes == 64 && sizeof(cell_t) == 1) {
    // All cells are compared as bytes, and are masks at once.
    const __mmask64 mine =
        _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(cells), _mm512_set1_epi8(static_cast<char>(id)));
    for (int64_t b = 0; b < blocks; ++b) {
      const __m512 here = load<value_t, lanes>(grad + b * lanes), before = sum[b];
      sum[b] = _mm512_mask_add_ps(before, static_cast<__mmask16>(mine >> b * lanes), before, here);
    }
    return;
  }
#endif
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
    for (Holders rows = rows_holding(g, ih); rows.valid(); rows.next()) {
      work.keep(g, rows.output(), grad_output + plane, cells + plane);
      work.windows[2 * count] = rows.output() % work.slots * work.width + work.margin;
      work.windows[2 * count + 1] = g.cell_number(rows.offset(), 0);
      ++count;
    }
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
                                  scalar_t* grad_input) {
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
