// Matrices turned round, a square at a time, in registers.
#pragma once

#include <c10/macros/Macros.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "cpu/simd/lanes.h"
#include "cpu/simd/low_precision.h"
#include "cpu/simd/vectors.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// Rows become columns: in each round the lanes of two rows that are half the square apart are put
// in turn.
template <class T, int64_t lanes>
C10_ALWAYS_INLINE void transpose_square(Vector<T, lanes> (&rows)[lanes]) {
  unrolled<std::countr_zero(static_cast<uint64_t>(lanes))>([&](auto) {
    Vector<T, lanes> next[lanes];
    unrolled<lanes / 2>([&](auto i) {
      next[2 * i] = in_turn<0, T, lanes>(rows[i], rows[i + lanes / 2]);
      next[2 * i + 1] = in_turn<1, T, lanes>(rows[i], rows[i + lanes / 2]);
    });
    unrolled<lanes>([&](auto i) { rows[i] = next[i]; });
  });
}

// What is moved: bits, those of the lower precision where elements are converted.
template <class from_t, class to_t>
using moved_t = UnsignedOf<std::conditional_t<is_low<to_t>, to_t, from_t>>;

template <class T, int64_t lanes, class from_t, class to_t>
C10_ALWAYS_INLINE Vector<T, lanes> load_moved(const from_t* from, int64_t count) {
  if constexpr (is_low<to_t> && !is_low<from_t>) {
    return bits_of<to_t, lanes>(load_part<float, lanes>(from, count));
  } else {
    return load_part<T, lanes>(reinterpret_cast<const T*>(from), count);
  }
}
template <int64_t lanes, class from_t, class to_t, class V>
C10_ALWAYS_INLINE void store_moved(V moved, to_t* to, int64_t count) {
  if constexpr (is_low<from_t> && !is_low<to_t>) {
    store_part<lanes>(floats_of<from_t, lanes>(moved), to, count);
  } else {
    store_part<lanes>(moved, reinterpret_cast<UnsignedOf<to_t>*>(to), count);
  }
}

// to[j][i] = from[i][j] for i < rows, j < cols, both at most `lanes`.
template <int64_t lanes, class from_t, class to_t>
C10_ALWAYS_INLINE void transpose_tile(const from_t* from, int64_t from_ld, int64_t rows,
                                      int64_t cols, to_t* to, int64_t to_ld) {
  using T = moved_t<from_t, to_t>;
  Vector<T, lanes> tile[lanes] = {};
  unrolled<lanes>([&](auto i) {
    if (i < rows) tile[i] = load_moved<T, lanes, from_t, to_t>(from + i * from_ld, cols);
  });
  transpose_square<T, lanes>(tile);
  unrolled<lanes>([&](auto j) {
    if (j < cols) store_moved<lanes, from_t, to_t>(tile[j], to + j * to_ld, rows);
  });
}

template <int64_t lanes, class from_t, class to_t>
DLOPS_FLATTEN C10_NOINLINE void transpose_by(const from_t* from, int64_t from_ld, int64_t rows,
                                             int64_t cols, to_t* to, int64_t to_ld) {
  const bool whole = rows >= lanes && cols >= lanes;
  const auto turn = [&](int64_t i, int64_t j) {
    // The last ones overlap those before.
    const int64_t row = rows < lanes ? 0 : std::min(i, rows - lanes);
    const int64_t col = cols < lanes ? 0 : std::min(j, cols - lanes);
    const from_t* tile = from + row * from_ld + col;
    to_t* turned = to + col * to_ld + row;
    if (whole) {
      transpose_tile<lanes>(tile, from_ld, lanes, lanes, turned, to_ld);
    } else {
      transpose_tile<lanes>(tile, from_ld, std::min(rows, lanes), std::min(cols, lanes), turned,
                            to_ld);
    }
  };
  // Along the rows that are further apart, so that few of them are at work at a time: their parts
  // may share a place in the caches.
  if (from_ld >= to_ld) {
    for (int64_t i = 0; i < rows; i += lanes)
      for (int64_t j = 0; j < cols; j += lanes) turn(i, j);
  } else {
    for (int64_t j = 0; j < cols; j += lanes)
      for (int64_t i = 0; i < rows; i += lanes) turn(i, j);
  }
}

// to[j][i] = from[i][j], converted, for i < rows, j < cols. They may not overlap.
template <class from_t, class to_t>
void transpose_tiles(const from_t* from, int64_t from_ld, int64_t rows, int64_t cols, to_t* to,
                     int64_t to_ld) {
  constexpr auto size = static_cast<int64_t>(std::max(sizeof(from_t), sizeof(to_t)));
  constexpr int64_t widest =
      std::min<int64_t>(16, kVectorBytes / size);  // of bytes and pairs of them, the fastest
  const auto by = [&](auto lanes) { transpose_by<lanes>(from, from_ld, rows, cols, to, to_ld); };
  const int64_t narrow = std::min(rows, cols);
  if constexpr (widest > 8)
    if (narrow > 8) return by(Constant<widest>());
  if constexpr (widest > 4)
    if (narrow > 4) return by(Constant<8>());
  by(Constant<std::min<int64_t>(widest, 4)>());
}

}  // namespace
}  // namespace dlops::cpu
