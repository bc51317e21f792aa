// Rows of planes with AVX-512: a masked load reads a row where it is, and has nothing where the
// image ends, so that no row is copied. For windows without gaps, one or two columns apart.
#pragma once

#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/simd/byte_windows.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/pool_ranges.h"
#include "cpu/simd/pool_windows.h"
#include "max_pool2d_math.h"

namespace dlops::cpu {
namespace {

constexpr int64_t kLargestMasked = 16;  // rows or columns of a window

inline bool masked_rows(const Pool2dGeometry& g) {
  return g.stride_w <= 2 && g.dilation_h == 1 && g.dilation_w == 1 && g.pad_w >= 0 &&
         g.kernel_h <= kLargestMasked && g.kernel_w <= kLargestMasked;
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
  } else {
    static_assert(std::is_same_v<from_t, c10::Half>);
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, from);
    return as<V>(_mm512_mask_cvtph_ps(as<__m512>(other), mask, halves));
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
  // Which cells of vector `i` are `ids`.
  C10_ALWAYS_INLINE __mmask16 equal(int64_t i, const uint8_t* cells, __m128i ids) const {
    if constexpr (inside) {
      return equal_cells<lanes>(cells, ids);
    } else {
      return equal_cells(cells, inside_[i], ids);
    }
  }

 private:
  uint16_t inside_[inside ? 1 : most];
};

// The output rows whose windows hold an input row.
template <class scalar_t>
struct HoldingRows {
  int64_t count = 0;
  struct {
    const scalar_t* grads;
    const uint8_t* cells;
    int64_t first;  // the number of the input row's first cell there
  } of[kLargestMasked];

  HoldingRows(const Pool2dGeometry& g, int64_t ih, const scalar_t* grad_output,
              const uint8_t* chosen) {
    for (Holders rows = rows_holding(g, ih); rows.valid(); rows.next()) {
      const int64_t at = rows.output() * g.OW;
      of[count++] = {grad_output + at, chosen + at, g.cell_number(rows.offset(), 0)};
    }
  }
};

}  // namespace
}  // namespace dlops::cpu
