// Rows of planes with AVX-512: a masked load reads a row where it is, and has padding where the
// image ends, so that no row is copied. For windows without gaps, one or two columns apart.
//
// Forward takes the best of each window's rows first, which the windows above and below share, and
// then the best of these. The first of equal cells in a row, of the first of equal rows, is the
// first of all, as is the last NaN of the last row that has one the last of all.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/simd/lanes.h"
#include "cpu/simd/max_pool2d.h"
#include "cpu/simd/pool_ranges.h"
#include "cpu/simd/pool_windows.h"

namespace dlops::cpu {
namespace {

constexpr int64_t kLargestMasked = 16;  // rows or columns of a window

inline bool masked_rows(const Pool2dGeometry& g) {
  return g.stride_w <= 2 && g.dilation_h == 1 && g.dilation_w == 1 && g.pad_w >= 0 &&
         g.kernel_h <= kLargestMasked && g.kernel_w <= kLargestMasked;
}

template <int64_t value>
using Constant = std::integral_constant<int64_t, value>;

// Calls f(i) for 0 <= i < count, all known to the compiler: what they index stays in registers.
template <int64_t count, class F>
C10_ALWAYS_INLINE void unrolled(const F& f) {
  [&]<int64_t... i>(std::integer_sequence<int64_t, i...>) {
    (f(Constant<i>()), ...);
  }(std::make_integer_sequence<int64_t, count>());
}

// The lanes l for which 0 <= at + l < size, as bits.
template <int64_t lanes>
C10_ALWAYS_INLINE uint32_t lanes_inside(int64_t at, int64_t size) {
  const auto below = [](int64_t end) {
    return static_cast<uint32_t>((uint64_t(1) << std::clamp<int64_t>(end, 0, lanes)) - 1);
  };
  return below(size - at) & ~below(-at);
}

// The elements at `from` as T in the lanes of `inside`, `other` in the rest.
template <class T, class from_t, class V = Vector<T, 64 / sizeof(T)>>
C10_ALWAYS_INLINE V load_inside(const from_t* from, uint32_t inside, V other) {
  const auto mask = static_cast<__mmask16>(inside);
  if constexpr (std::is_same_v<from_t, double>) {
    return as<V>(_mm512_mask_loadu_pd(as<__m512d>(other), static_cast<__mmask8>(mask), from));
  } else if constexpr (std::is_same_v<from_t, float>) {
    return as<V>(_mm512_mask_loadu_ps(as<__m512>(other), mask, from));
  } else if constexpr (std::is_same_v<from_t, c10::BFloat16>) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    return as<V>(_mm512_mask_slli_epi32(as<__m512i>(other), mask, wide, 16));
  } else if constexpr (std::is_same_v<from_t, c10::Half>) {
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, from);
    return as<V>(_mm512_mask_cvtph_ps(as<__m512>(other), mask, halves));
  } else if constexpr (sizeof(T) == 4) {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, from);
    return as<V>(_mm512_mask_cvtepu8_epi32(as<__m512i>(other), mask, bytes));
  } else {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, from);
    return as<V>(_mm512_mask_cvtepu8_epi64(as<__m512i>(other), static_cast<__mmask8>(mask), bytes));
  }
}

// A row's elements at the columns of some vectors, found anew in each of several rows.
template <bool inside, class scalar_t, int64_t most>
class Columns {
 public:
  static constexpr int64_t lanes = kLanes<scalar_t, uint8_t>;
  // Vector `i` begins at column `at` of rows of `size`.
  C10_ALWAYS_INLINE void place(int64_t i, int64_t at, int64_t size) {
    if constexpr (!inside) inside_[i] = static_cast<uint16_t>(lanes_inside<lanes>(at, size));
  }
  // Vector `i` of a row, which begins at `from`; `other` is outside.
  template <class value_t, class from_t>
  C10_ALWAYS_INLINE Vector<value_t, lanes> load(int64_t i, const from_t* from,
                                                Vector<value_t, lanes> other) const {
    if constexpr (inside) {
      return cpu::load<value_t, lanes>(from);
    } else {
      return load_inside<value_t>(from, inside_[i], other);
    }
  }
  // Which cells of vector `i` are `id`: as bytes, which are masks at once.
  C10_ALWAYS_INLINE __mmask16 equal(int64_t i, const uint8_t* cells, uint8_t id) const {
    const __m128i ids = _mm_set1_epi8(static_cast<char>(id));
    if constexpr (inside && lanes == 16) {
      return _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(cells)), ids);
    } else {
      const auto mask = static_cast<__mmask16>(inside ? 0xff : inside_[i]);
      return _mm_mask_cmpeq_epi8_mask(mask, _mm_maskz_loadu_epi8(mask, cells), ids);
    }
  }

 private:
  uint16_t inside_[inside ? 1 : most];
};

template <class scalar_t>
struct MaskedRows {
  using Window = Windows<scalar_t, uint8_t, 1>;
  using T = typename Window::value_t;
  using id_t = typename Window::id_t;
  using Values = typename Window::Values;
  using Ids = typename Window::Ids;
  static constexpr int64_t lanes = Window::lanes;
  static constexpr int64_t kRows = 8;       // of inputs, backward
  static constexpr int64_t kBlocks = 8;     // of windows, forward
  static constexpr int64_t kRowsAhead = 4;  // that are fetched, forward

  // How many kernel columns lie before the image, for windows from column `begin` of it on.
  template <int64_t stride>
  static Ids columns_before(int64_t begin) {
    Vector<std::make_signed_t<id_t>, lanes> before;
    for (int64_t l = 0; l < lanes; ++l)
      before[l] = static_cast<std::make_signed_t<id_t>>(-begin - stride * l);
    return as<Ids>(before > 0 ? before : before - before);
  }

  // A vector of windows: where their columns begin, and which lie in the image.
  struct Block {
    int64_t begin;
    bool inside;  // all of them, in every lane
    Columns<true, scalar_t, 0> whole;
    Columns<false, scalar_t, 2 * kLargestMasked> columns;
    Ids first;  // the first kernel column in the image, for each window
  };
  // The blocks from column `ow` on.
  struct Blocks {
    int64_t ow, count;
    Block of[kBlocks];
  };
  template <int64_t stride>
  static void place_blocks(const Pool2dGeometry& g, int64_t ow, Blocks& blocks) {
    blocks.ow = ow;
    blocks.count = std::min(kBlocks, (g.OW - ow + lanes - 1) / lanes);
    for (int64_t b = 0; b < blocks.count; ++b) {
      Block& block = blocks.of[b];
      block.begin = g.input_col(ow + b * lanes, 0);
      block.inside = block.begin >= 0 && block.begin + g.kernel_w + stride * lanes <= g.W;
      for (int64_t j = 0; j < g.kernel_w; j += stride)
        for (int64_t v = 0; v < stride; ++v)
          block.columns.place(j + v, block.begin + j + v * lanes, g.W);
      block.first = columns_before<stride>(block.begin);
    }
  }

  // The best of a row of some windows, in some planes.
  template <int64_t planes>
  struct BestOfRow {
    Values best[planes];
    Ids column[planes];
  };

  template <int64_t stride, int64_t planes, int64_t width, class Columns>
  C10_ALWAYS_INLINE static void visit_row(const Pool2dGeometry& g, const Columns& columns,
                                          Ids first, const scalar_t* row,
                                          BestOfRow<planes>& result) {
    const int64_t kernel_w = width > 0 ? width : g.kernel_w;
    const Values padding = fill<T, lanes>(lowest<T>());
    Window windows[planes];
    const auto visit = [&](int64_t p, int64_t j, Values values) {
      if (j > 0) return windows[p].visit(0, values, fill<id_t, lanes>(static_cast<id_t>(j)));
      windows[p].best[0] = values;
      windows[p].cell[0] = first;
    };
    for (int64_t p = 0; p < planes; ++p)
      for (int64_t v = 0; v < stride; ++v)
        __builtin_prefetch(row + p * g.H * g.W + kRowsAhead * stride * g.W + v * lanes);
    for (int64_t j = 0; j < kernel_w; j += stride) {
      for (int64_t p = 0; p < planes; ++p) {
        const scalar_t* from = row + p * g.H * g.W + j;
        const Values a = columns.template load<T>(j, from, padding);
        if constexpr (stride == 1) {
          visit(p, j, a);
        } else {
          const Values b = columns.template load<T>(j + 1, from + lanes, padding);
          visit(p, j, every_second<0, T, lanes>(a, b));
          if (j + 1 < kernel_w) visit(p, j + 1, every_second<1, T, lanes>(a, b));
        }
      }
    }
    for (int64_t p = 0; p < planes; ++p) {
      result.best[p] = windows[p].best[0];
      result.column[p] = windows[p].cell[0];
    }
  }

  // The windows of some blocks, of rows [oh0, oh1) of some planes, which are independent of each
  // other: one alone would wait for its own comparisons. Each row is visited once, and memory read
  // in its order. `width`: of the kernel, 0 for any.
  template <int64_t stride, int64_t planes, int64_t width>
  C10_NOINLINE static void forward(const Pool2dGeometry& g, const Blocks& blocks,
                                   const scalar_t* input, int64_t oh0, int64_t oh1,
                                   scalar_t* output, uint8_t* cells) {
    BestOfRow<planes> kept[kLargestMasked][kBlocks];  // of as many rows as the kernel has
    const auto wrapped = [&](int64_t slot) {
      return slot < 0 ? slot + g.kernel_h : slot < g.kernel_h ? slot : slot - g.kernel_h;
    };
    int64_t next = 0, slot = 0;  // the first row that is still to be visited, and its place
    for (int64_t oh = oh0; oh < oh1; ++oh) {
      const Range rows = rows_inside(g, oh);
      const int64_t ih = g.input_row(oh, 0), held = std::max<int64_t>(0, rows.end - rows.begin);
      next = std::max(next, ih + rows.begin);
      const int64_t fresh = std::max<int64_t>(0, ih + rows.end - next);
      for (int64_t b = 0; b < blocks.count; ++b) {
        const Block& block = blocks.of[b];
        for (int64_t i = 0; i < fresh; ++i) {
          const scalar_t* row = input + (next + i) * g.W + block.begin;
          BestOfRow<planes>& best = kept[wrapped(slot + i)][b];
          if (block.inside) {
            visit_row<stride, planes, width>(g, block.whole, block.first, row, best);
          } else {
            visit_row<stride, planes, width>(g, block.columns, block.first, row, best);
          }
        }
        Window windows[planes];
        Ids cell = fill<id_t, lanes>(static_cast<id_t>(g.cell_number(rows.begin, 0)));
        unrolled<planes>([&](auto p) { windows[p].cell[0] = cell + block.first; });
        for (int64_t i = 0, at = wrapped(slot + fresh - held); i < held; ++i) {
          const BestOfRow<planes>& row = kept[at][b];
          unrolled<planes>([&](auto p) { windows[p].visit(0, row.best[p], cell + row.column[p]); });
          cell += static_cast<id_t>(g.cell_step);
          at = wrapped(at + 1);
        }
        unrolled<planes>([&](auto p) {
          const int64_t from = blocks.ow + b * lanes, at = (p * g.OH + oh) * g.OW + from;
          windows[p].store(output + at, cells == nullptr ? nullptr : cells + at, g.OW - from);
        });
      }
      next += fresh;
      slot = wrapped(slot + fresh);
    }
  }

  // An output row that holds the inputs of a row.
  struct Holding {
    int64_t row;
    int64_t first;  // the number of its first cell there
  };
  struct HoldingRows {
    int64_t count[kRows];
    Holding of[kRows][kLargestMasked];
  };

  // The gradients of `stride` vectors of inputs from column iw on, of rows [ih0, ih1) of some
  // planes: of each window that chose them.
  template <int64_t stride, bool inside, int64_t planes, int64_t width>
  C10_NOINLINE static void backward(const Pool2dGeometry& g, const scalar_t* grad_output,
                                    const uint8_t* chosen, const HoldingRows& holding, int64_t ih0,
                                    int64_t ih1, int64_t iw, const Writer& writer,
                                    scalar_t* grad_input) {
    // Input column iw + l * stride + e is under kernel column j of output column at + l.
    const int64_t y = iw / stride, kernel_w = width > 0 ? width : g.kernel_w;
    const auto place = [&](int64_t e, const auto& f) {
      int64_t at = y + (e + g.pad_w) / stride;
      for (int64_t j = (e + g.pad_w) % stride; j < kernel_w; j += stride, --at) f(j, at);
    };
    Columns<inside, scalar_t, kLargestMasked> columns;
    for (int64_t e = 0; e < stride; ++e)
      place(e, [&](int64_t j, int64_t at) { columns.place(j, at, g.OW); });
    for (int64_t ih = ih0; ih < ih1; ++ih) {
      Values sums[planes][stride] = {};
      for (int64_t r = 0; r < holding.count[ih - ih0]; ++r) {
        const Holding& held = holding.of[ih - ih0][r];
        const scalar_t* grads = grad_output + held.row * g.OW;
        const uint8_t* cells = chosen + held.row * g.OW;
        if (r == 0) {
          for (int64_t p = 0; p < planes; ++p) {
            const int64_t ahead = (p * g.OH + kRows) * g.OW + y;
            __builtin_prefetch(grads + ahead);
            __builtin_prefetch(cells + ahead);
          }
        }
        unrolled<stride>([&](auto e) {
          place(e, [&](int64_t j, int64_t at) {
            const uint8_t id = static_cast<uint8_t>(held.first + j);
            unrolled<planes>([&](auto p) {
              const int64_t from = p * g.OH * g.OW + at;
              const Values grad = columns.template load<T>(j, grads + from, Values{});
              add(grad, columns.equal(j, cells + from, id), sums[p][e]);
            });
          });
        });
      }
      unrolled<planes>([&](auto p) {
        write<stride>(sums[p], writer, grad_input + (p * g.H + ih) * g.W + iw, g.W - iw);
      });
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

  template <int64_t stride>
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

// Calls f(first plane, how many, the kernel's width or 0), these two as constants, for all planes.
template <class F>
void for_each_pair(const Pool2dGeometry& g, int64_t planes, const F& f) {
  int64_t p = 0;
  for (; p + 2 <= planes; p += 2)
    g.kernel_w == 3 ? f(p, Constant<2>(), Constant<3>()) : f(p, Constant<2>(), Constant<0>());
  if (p < planes) f(p, Constant<1>(), Constant<0>());
}

template <int64_t stride, class scalar_t>
void max_pool2d_masked(const Pool2dGeometry& g, int64_t planes, int64_t oh0, int64_t oh1,
                       const scalar_t* input, scalar_t* output, uint8_t* cells) {
  using Rows = MaskedRows<scalar_t>;
  typename Rows::Blocks blocks;
  for (int64_t ow = 0; ow < g.OW; ow += Rows::kBlocks * Rows::lanes) {
    Rows::template place_blocks<stride>(g, ow, blocks);
    for_each_pair(g, planes, [&](int64_t p, auto some, auto width) {
      const int64_t plane = p * g.OH * g.OW;
      Rows::template forward<stride, some, width>(g, blocks, input + p * g.H * g.W, oh0, oh1,
                                                  output + plane,
                                                  cells == nullptr ? nullptr : cells + plane);
    });
  }
}

// A few rows at a time, so that what holds for a vector's columns is found once for them.
template <int64_t stride, class scalar_t>
void max_pool2d_scatter_masked(const Pool2dGeometry& g, int64_t planes, int64_t ih0, int64_t ih1,
                               const scalar_t* grad_output, const uint8_t* cells,
                               scalar_t* grad_input) {
  using Rows = MaskedRows<scalar_t>;
  constexpr int64_t columns = Rows::lanes * stride;
  const Writer writer(g.N * g.C * g.H * g.W * static_cast<int64_t>(sizeof(scalar_t)));
  typename Rows::HoldingRows holding;
  for_each_pair(g, planes, [&](int64_t p, auto some, auto width) {
    const int64_t plane = p * g.OH * g.OW;
    for (int64_t ih = ih0; ih < ih1; ih += Rows::kRows) {
      const int64_t end = std::min(ih1, ih + Rows::kRows);
      for (int64_t row = ih; row < end; ++row) {
        int64_t& count = holding.count[row - ih] = 0;
        for (Holders rows = rows_holding(g, row); rows.valid(); rows.next())
          holding.of[row - ih][count++] = {rows.output(), g.cell_number(rows.offset(), 0)};
      }
      for (int64_t iw = 0; iw < g.W; iw += columns) {
        // Of the output, columns from (iw - kernel_w) / stride on to (iw + pad_w) / stride + lanes.
        const bool inside = iw >= g.kernel_w && iw + columns + g.pad_w + stride < g.OW * stride;
        const auto rows = inside ? &Rows::template backward<stride, true, some, width>
                                 : &Rows::template backward<stride, false, some, width>;
        rows(g, grad_output + plane, cells + plane, holding, ih, end, iw, writer,
             grad_input + p * g.H * g.W);
      }
    }
  });
}

}  // namespace
}  // namespace dlops::cpu
