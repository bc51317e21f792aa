// Windows of max pooling at work, one in each lane of some vectors.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/simd/lanes.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

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

// The best value and its cell for `blocks` vectors of windows.
template <class scalar_t, class cell_t, int64_t blocks>
struct Windows {
  using value_t = work_t<scalar_t, cell_t>;
  using id_t = UnsignedOf<value_t>;
  static constexpr int64_t lanes = kLanes<scalar_t, cell_t>;
  using Values = Vector<value_t, lanes>;
  using Ids = Vector<id_t, lanes>;
  Values best[blocks];
  Ids cell[blocks];

  Windows() {
    for (auto& value : best) value = fill<value_t, lanes>(lowest<value_t>());
  }
  // The first cell of each, in place of `visit`.
  void start(int64_t b, Values value, Ids id) {
    best[b] = value;
    cell[b] = id;
  }
  // `count` values are there; any number where there is more than one block.
  template <class from_t>
  void visit(const from_t* values, int64_t count, id_t id) {
    const Ids ids = fill<id_t, lanes>(id);
    for (int64_t b = 0; b < blocks; ++b)
      visit(b,
            blocks > 1 ? load<value_t, lanes>(values + b * lanes)
                       : load_part<value_t, lanes>(values, count),
            ids);
  }
  void visit(int64_t b, Values value, Ids id) {
#if DLOPS_CAPABILITY == 2
    if constexpr (std::is_same_v<value_t, float>) {
      // GCC inverts the mask before it chooses by it.
      const __mmask16 takes =
          static_cast<__mmask16>(_mm512_cmp_ps_mask(value, best[b], _CMP_GT_OQ) |
                                 _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q));
      best[b] = _mm512_mask_mov_ps(best[b], takes, value);
      cell[b] = as<Ids>(_mm512_mask_mov_epi32(as<__m512i>(cell[b]), takes, as<__m512i>(id)));
      return;
    }
#endif
    const auto takes = (value > best[b]) | (value != value);
    best[b] = takes ? value : best[b];
    cell[b] = takes ? id : cell[b];
  }
  void store(scalar_t* output, cell_t* cells, int64_t count) const {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t left = blocks > 1 ? lanes : count;
      store_part<lanes>(best[b], output + b * lanes, left);
      if (cells != nullptr) store_part<lanes>(cell[b], cells + b * lanes, left);
    }
  }
};

}  // namespace
}  // namespace dlops::cpu
