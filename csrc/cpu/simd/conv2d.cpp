#include "cpu/simd/conv2d.h"

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/simd/lanes.h"
#include "cpu/simd/load_store.h"
#include "cpu/simd/phased_rows.h"

namespace dlops::cpu {
namespace {

// A run of output pixels in one image row, and where its first one stands in the block.
struct PixelRun {
  int64_t n, oh, ow0, ow1, offset;
};

// Calls f(PixelRun) for the rows that [q0, q1) touches, in order.
template <class F>
void for_each_run(const Conv2dGeometry& g, int64_t q0, int64_t q1, const F& f) {
  int64_t row = q0 / g.OW;
  int64_t ow = q0 % g.OW;
  for (int64_t q = q0; q < q1;) {
    const int64_t count = std::min(g.OW - ow, q1 - q);
    f(PixelRun{row / g.OH, row % g.OH, ow, ow + count, q - q0});
    q += count;
    ow = 0;
    ++row;
  }
}

// Calls f(r, s) for the rows of one channel of a contiguous block.
template <class F>
void for_each_cell(const Conv2dGeometry& g, const F& f) {
  for (int64_t r = 0; r < g.R; ++r)
    for (int64_t s = 0; s < g.S; ++s) f(r, s);
}

// As one copy of whole vectors and a last one that overlaps it: a call of memcpy would take longer
// than most rows.
template <class T>
void copy_row(const T* from, T* to, int64_t count) {
  constexpr int64_t lanes = 64 / sizeof(T), half = lanes / 2, quarter = lanes / 4;
  const auto ends = [&](auto width) {
    std::memcpy(to, from, width * sizeof(T));
    std::memcpy(to + count - width, from + count - width, width * sizeof(T));
  };
  if (count >= lanes) {
    for (int64_t i = 0; i + lanes <= count; i += lanes)
      std::memcpy(to + i, from + i, lanes * sizeof(T));
    std::memcpy(to + count - lanes, from + count - lanes, lanes * sizeof(T));
  } else if (count >= half) {
    ends(std::integral_constant<int64_t, half>{});
  } else if (quarter > 0 && count >= quarter) {
    ends(std::integral_constant<int64_t, std::max<int64_t>(1, quarter)>{});
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

// Calls f(i, values) for float32 vectors of low-precision or float32 numbers, where one of `from_t`
// and `to_t` is of low precision, and writes what it gives. (The compiler makes no vectors of
// float16's conversions.)
template <class from_t, class to_t, class F>
void convert_each(const from_t* from, to_t* to, int64_t count, const F& f) {
  constexpr int64_t L = at::vec::Vectorized<float>::size();
  for (int64_t i = 0; i < count; i += L)
    store<float>(f(i, load<float>(from + i, count - i)), to + i, count - i);
}

template <class from_t, class to_t>
void convert_values(const from_t* from, to_t* to, int64_t count) {
  if constexpr (!std::is_same_v<from_t, to_t>) {
    convert_each(from, to, count, [](int64_t, auto values) { return values; });
  } else {
    std::copy_n(from, count, to);
  }
}

template <class input_t, class column_t>
void copy_strided(const input_t* from, int64_t step, column_t* to, int64_t count) {
  if (step == 1) {
    if constexpr (std::is_same_v<input_t, column_t>) {
      copy_row(from, to, count);
    } else {
      convert_values(from, to, count);
    }
  } else if (step == 2) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<column_t>(from[2 * i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<column_t>(from[step * i]);
  }
}

template <class column_t, class input_t>
void add_strided(const column_t* from, input_t* to, int64_t step, int64_t count) {
  if (step == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] += static_cast<input_t>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[step * i] += static_cast<input_t>(from[i]);
  }
}

// The kernel columns [s0, s1) whose input column lies in the image, for output column ow.
Interval inside_cells(const Conv2dGeometry& g, int64_t ow) {
  const int64_t start = g.input_col(ow, 0);
  int64_t begin = start >= 0 ? 0 : ceil_div(-start, g.dilation_w);
  int64_t end = start >= g.W ? 0 : std::min(g.S, ceil_div(g.W - start, g.dilation_w));
  return {std::min(begin, end), end};
}

}  // namespace

namespace {

// to[s][i] = from[offsets[s] + i], rows of `to` being `ld` apart.
template <class T, int64_t vectors>
void copy_shifted_as(const T* from, const std::vector<int64_t>& offsets, int64_t count, T* to,
                     int64_t ld) {
  constexpr int64_t lanes = 64 / sizeof(T);
  for (const int64_t offset : offsets) {
    const T* row = from + offset;
    for (int64_t v = 0; v + 1 < vectors; ++v)
      std::memcpy(to + v * lanes, row + v * lanes, lanes * sizeof(T));
    std::memcpy(to + count - lanes, row + count - lanes, lanes * sizeof(T));
    to += ld;
  }
}

template <class T>
void copy_shifted(const T* from, const std::vector<int64_t>& offsets, int64_t count, T* to,
                  int64_t ld) {
  constexpr int64_t lanes = 64 / sizeof(T);
  if (count >= lanes && count <= 4 * lanes) {
    switch (ceil_div(count, lanes)) {
      case 1:
        return copy_shifted_as<T, 1>(from, offsets, count, to, ld);
      case 2:
        return copy_shifted_as<T, 2>(from, offsets, count, to, ld);
      case 3:
        return copy_shifted_as<T, 3>(from, offsets, count, to, ld);
      default:
        return copy_shifted_as<T, 4>(from, offsets, count, to, ld);
    }
  }
  for (const int64_t offset : offsets) {
    copy_row(from + offset, to, count);
    to += ld;
  }
}

}  // namespace

namespace {

// The rows of one kernel row, cell by cell.
template <class input_t, class column_t>
void fill_cells(const Conv2dGeometry& g, const input_t* row, const PixelRun& run, column_t* to,
                int64_t ld) {
  for (int64_t s = 0; s < g.S; ++s, to += ld) {
    const Interval inside = inside_columns(g, s);
    const int64_t begin = std::clamp(inside.begin, run.ow0, run.ow1);
    const int64_t end = std::clamp(inside.end, begin, run.ow1);
    std::fill_n(to, begin - run.ow0, column_t(0));
    if (begin < end)
      copy_strided(row + g.input_col(begin, s), g.stride_w, to + (begin - run.ow0), end - begin);
    std::fill_n(to + (end - run.ow0), run.ow1 - end, column_t(0));
  }
}

}  // namespace

template <int capability, class input_t, class column_t>
void fill_columns(const Conv2dGeometry& g, const ColumnBlock& block, const input_t* input,
                  column_t* columns, int64_t ld) {
  // A kernel that reaches far beyond the image would make long rows of zeros.
  const bool far = (g.S - 1) * g.dilation_w > 2 * g.W;
  const PhasedRows rows({g.W, g.OW, g.S, g.stride_w, g.pad_left, g.dilation_w});
  const auto phased = std::make_unique<column_t[]>(static_cast<size_t>(far ? 0 : rows.size()));
  std::vector<int64_t> offsets, offsets_in_place;
  for (int64_t s = 0; s < g.S; ++s) {
    offsets.push_back(rows.offset(s));
    offsets_in_place.push_back(s * g.dilation_w);
  }
  for_each_run(g, block.q0, block.q1, [&](const PixelRun& run) {
    const int64_t count = run.ow1 - run.ow0, first = g.input_col(run.ow0, 0);
    const bool inside = first >= 0 && g.input_col(run.ow1 - 1, g.S - 1) < g.W;
    column_t* to = columns + run.offset;
    for (int64_t c = block.c0; c < block.c1; ++c) {
      for (int64_t r = 0; r < g.R; ++r, to += g.S * ld) {
        const int64_t ih = g.input_row(run.oh, r);
        if (!g.row_inside(ih)) {
          for (int64_t s = 0; s < g.S; ++s) std::fill_n(to + s * ld, count, column_t(0));
          continue;
        }
        const input_t* row = input + ((run.n * g.C + c) * g.H + ih) * g.W;
        if constexpr (std::is_same_v<input_t, column_t>) {
          if (inside && g.stride_w == 1) {
            copy_shifted(row + first, offsets_in_place, count, to, ld);
            continue;
          }
        }
        if (far) {
          fill_cells(g, row, run, to, ld);
          continue;
        }
        rows.split(row, phased.get());  // between zeros
        copy_shifted(phased.get() + run.ow0, offsets, count, to, ld);
      }
    }
  });
}

template <int capability, class column_t, class input_t>
void scatter_columns(const Conv2dGeometry& g, const ColumnBlock& block, const column_t* columns,
                     int64_t ld, input_t* input) {
  for (int64_t c = block.c0; c < block.c1; ++c) {
    for_each_cell(g, [&](int64_t r, int64_t s) {
      const Interval inside = inside_columns(g, s);
      for_each_run(g, block.q0, block.q1, [&](const PixelRun& run) {
        const int64_t ih = g.input_row(run.oh, r);
        const int64_t begin = std::max(inside.begin, run.ow0);
        const int64_t end = std::min(inside.end, run.ow1);
        if (!g.row_inside(ih) || begin >= end) return;
        input_t* row = input + ((run.n * g.C + c) * g.H + ih) * g.W;
        add_strided(columns + run.offset + (begin - run.ow0), row + g.input_col(begin, s),
                    g.stride_w, end - begin);
      });
      columns += ld;
    });
  }
}

template <int capability, class input_t, class column_t>
void fill_columns_last(const Conv2dGeometry& g, const ColumnBlock& block, const input_t* input,
                       column_t* columns, int64_t ld) {
  const int64_t channels = block.c1 - block.c0;
  // Neighbouring kernel cells are neighbours in memory too, so they are copied as one run.
  const bool joined = g.dilation_w == 1 && channels == g.C;
  for_each_run(g, block.q0, block.q1, [&](const PixelRun& run) {
    for (int64_t ow = run.ow0; ow < run.ow1; ++ow) {
      column_t* to = columns + (run.offset + ow - run.ow0) * ld;
      const Interval inside = inside_cells(g, ow);
      for (int64_t r = 0; r < g.R; ++r, to += g.S * channels) {
        const int64_t ih = g.input_row(run.oh, r);
        if (!g.row_inside(ih)) {
          std::fill_n(to, g.S * channels, column_t(0));
          continue;
        }
        const input_t* from =
            input + ((run.n * g.H + ih) * g.W + g.input_col(ow, inside.begin)) * g.C + block.c0;
        std::fill_n(to, inside.begin * channels, column_t(0));
        if (joined) {
          copy_strided(from, 1, to + inside.begin * channels,
                       (inside.end - inside.begin) * channels);
        } else {
          for (int64_t s = inside.begin; s < inside.end; ++s, from += g.dilation_w * g.C)
            copy_strided(from, 1, to + s * channels, channels);
        }
        std::fill_n(to + inside.end * channels, (g.S - inside.end) * channels, column_t(0));
      }
    }
  });
}

template <int capability, class column_t, class input_t>
void scatter_columns_last(const Conv2dGeometry& g, const ColumnBlock& block,
                          const column_t* columns, int64_t ld, input_t* input) {
  const int64_t channels = block.c1 - block.c0;
  for_each_run(g, block.q0, block.q1, [&](const PixelRun& run) {
    for (int64_t ow = run.ow0; ow < run.ow1; ++ow) {
      const column_t* from = columns + (run.offset + ow - run.ow0) * ld;
      const Interval inside = inside_cells(g, ow);
      for (int64_t r = 0; r < g.R; ++r, from += g.S * channels) {
        const int64_t ih = g.input_row(run.oh, r);
        if (!g.row_inside(ih)) continue;
        for (int64_t s = inside.begin; s < inside.end; ++s) {
          input_t* to = input + ((run.n * g.H + ih) * g.W + g.input_col(ow, s)) * g.C + block.c0;
          add_strided(from + s * channels, to, 1, channels);
        }
      }
    }
  });
}

template <int capability, class from_t, class to_t>
void convert_row(const from_t* from, to_t* to, int64_t count) {
  convert_values(from, to, count);
}

template <int capability, class from_t, class to_t>
void convert_row_plus(const from_t* from, from_t bias, to_t* to, int64_t count) {
  if constexpr (!std::is_same_v<from_t, to_t>) {
    convert_each(from, to, count, [&](int64_t, auto values) { return values + bias; });
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] + bias;
  }
}

template <int capability, class from_t, class to_t>
void convert_row_plus_row(const from_t* from, const from_t* bias, to_t* to, int64_t count) {
  if constexpr (!std::is_same_v<from_t, to_t>) {
    convert_each(from, to, count,
                 [&](int64_t i, auto values) { return values + load<float>(bias + i, count - i); });
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] + bias[i];
  }
}

namespace {

// Copies runs as `vectors` whole vectors each; what is too much is written over by the next run.
template <class T, int64_t lanes, int64_t vectors>
T* copy_vectors(const T* const* runs, int64_t number, int64_t count, int64_t pad, int64_t step,
                int64_t times, T* to) {
  for (int64_t x = 0; x < times; ++x) {
    for (int64_t i = 0; i < number; ++i, to += count) {
      const T* from = runs[i] + x * step;
      for (int64_t v = 0; v < vectors; ++v)
        std::memcpy(to + v * lanes, from + v * lanes, lanes * sizeof(T));
    }
    for (int64_t i = 0; i < pad; ++i) *to++ = T(0);
  }
  return to;
}

}  // namespace

template <int capability, class T>
T* copy_runs(const T* const* runs, int64_t number, int64_t count, int64_t pad, int64_t step,
             int64_t times, T* to) {
  constexpr int64_t lanes = 64 / sizeof(T), quarter = lanes / 4;
  const auto copy = [&](auto width, auto vectors) {
    return copy_vectors<T, width, vectors>(runs, number, count, pad, step, times, to);
  };
  const auto whole = std::integral_constant<int64_t, lanes>{};
  if (count <= quarter)
    return copy(std::integral_constant<int64_t, quarter>{}, std::integral_constant<int64_t, 1>{});
  if (count <= lanes) return copy(whole, std::integral_constant<int64_t, 1>{});
  if (count <= 2 * lanes) return copy(whole, std::integral_constant<int64_t, 2>{});
  if (count <= 3 * lanes) return copy(whole, std::integral_constant<int64_t, 3>{});
  for (int64_t x = 0; x < times; ++x) {
    for (int64_t i = 0; i < number; ++i, to += count) std::copy_n(runs[i] + x * step, count, to);
    to = std::fill_n(to, pad, T(0));
  }
  return to;
}

template <int capability>
bool split_row(const float* from, c10::BFloat16* high, c10::BFloat16* low, int64_t count) {
  // On the bits, so that the compiler makes vectors of it.
  const auto rounded_bits = [](uint32_t bits) { return bits + 0x7fff + (bits >> 16 & 1); };
  auto* const high_bits = reinterpret_cast<uint16_t*>(high);
  auto* const low_bits = reinterpret_cast<uint16_t*>(low);
  uint32_t infinite = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto whole = std::bit_cast<uint32_t>(from[i]);
    const uint32_t bits = rounded_bits(whole) & 0xffff0000;
    // Rounding takes some finite numbers to infinity, and some NaN past it to zero.
    infinite |= (bits & 0x7f800000) == 0x7f800000 || (whole & 0x7f800000) == 0x7f800000;
    const float rest = from[i] - std::bit_cast<float>(bits);
    high_bits[i] = static_cast<uint16_t>(bits >> 16);
    low_bits[i] = static_cast<uint16_t>(rounded_bits(std::bit_cast<uint32_t>(rest)) >> 16);
  }
  return infinite == 0;
}

template <int capability, class T>
bool all_finite(const T* values, int64_t count) {
  // On the bits, which the compiler may take in any order.
  using bits_t = std::conditional_t<sizeof(T) == 2, uint16_t,
                                    std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  constexpr auto exponent = static_cast<bits_t>(sizeof(T) == 2   ? 0x7f80
                                                : sizeof(T) == 4 ? 0x7f800000
                                                                 : 0x7ff0000000000000);
  bits_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    bits_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    found |= static_cast<bits_t>((bits & exponent) == exponent);
  }
  return found == 0;
}

template <int capability, class from_t, class sum_t>
void add_row(const from_t* from, sum_t* sum, int64_t count) {
  add_strided(from, sum, 1, count);
}

template <int capability, class from_t, class sum_t>
void sum_rows(const from_t* from, int64_t rows, int64_t count, sum_t* sum) {
  // Some columns at a time, whose sums stay in registers.
  const auto add = [&]<int64_t width>(int64_t j, std::integral_constant<int64_t, width>) {
    sum_t partial[width] = {};
    for (const from_t* row = from + j; row < from + rows * count; row += count)
      for (int64_t l = 0; l < width; ++l) partial[l] += static_cast<sum_t>(row[l]);
    std::copy_n(partial, width, sum + j);
  };
  int64_t j = 0;
  for (; j + 64 <= count; j += 64) add(j, std::integral_constant<int64_t, 64>{});
  for (; j + 32 <= count; j += 32) add(j, std::integral_constant<int64_t, 32>{});
  for (; j + 16 <= count; j += 16) add(j, std::integral_constant<int64_t, 16>{});
  for (; j < count; ++j) add(j, std::integral_constant<int64_t, 1>{});
}

template <int capability, class from_t, class sum_t>
sum_t sum_row(const from_t* from, int64_t count) {
  constexpr int64_t lanes = 16;
  sum_t partial[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes)
    for (int64_t l = 0; l < lanes; ++l) partial[l] += static_cast<sum_t>(from[i + l]);
  for (int64_t l = 0; i < count; ++i, ++l) partial[l] += static_cast<sum_t>(from[i]);
  sum_t sum(0);
  for (int64_t l = 0; l < lanes; ++l) sum += partial[l];
  return sum;
}

template <int capability, class T>
void pair_rows(const T* even, const T* odd, int64_t ld, int64_t pairs, T* to, int64_t count) {
  static_assert(sizeof(T) == 2);
  constexpr int64_t L = kVectorBytes / 4;
  const auto bits = [](const T* row) { return reinterpret_cast<const uint16_t*>(row); };
  for (int64_t p = 0; p < pairs; ++p, even += ld, odd += ld, to += 2 * count) {
    for (int64_t i = 0; i < count; i += L) {
      const auto first = load_part<uint32_t, L>(bits(even + i), count - i);
      const auto second = load_part<uint32_t, L>(bits(odd + i), count - i);
      store_part<L>(first | second << 16, reinterpret_cast<uint32_t*>(to + 2 * i), count - i);
    }
  }
}

#define DLOPS_INSTANTIATE_FILL(input_t, column_t)                                     \
  template void fill_columns<DLOPS_CAPABILITY, input_t, column_t>(                    \
      const Conv2dGeometry&, const ColumnBlock&, const input_t*, column_t*, int64_t); \
  template void fill_columns_last<DLOPS_CAPABILITY, input_t, column_t>(               \
      const Conv2dGeometry&, const ColumnBlock&, const input_t*, column_t*, int64_t);

#define DLOPS_INSTANTIATE_SCATTER(column_t, input_t)                                  \
  template void scatter_columns<DLOPS_CAPABILITY, column_t, input_t>(                 \
      const Conv2dGeometry&, const ColumnBlock&, const column_t*, int64_t, input_t*); \
  template void scatter_columns_last<DLOPS_CAPABILITY, column_t, input_t>(            \
      const Conv2dGeometry&, const ColumnBlock&, const column_t*, int64_t, input_t*);

// The copies between a tensor's type and the type that its products are summed in.
#define DLOPS_INSTANTIATE_COPIES(scalar_t, sum_t)                                                 \
  template void convert_row<DLOPS_CAPABILITY, scalar_t, sum_t>(const scalar_t*, sum_t*, int64_t); \
  template void convert_row_plus<DLOPS_CAPABILITY, sum_t, scalar_t>(const sum_t*, sum_t,          \
                                                                    scalar_t*, int64_t);          \
  template void convert_row_plus_row<DLOPS_CAPABILITY, sum_t, scalar_t>(                          \
      const sum_t*, const sum_t*, scalar_t*, int64_t);                                            \
  template void add_row<DLOPS_CAPABILITY, scalar_t, sum_t>(const scalar_t*, sum_t*, int64_t);     \
  template void sum_rows<DLOPS_CAPABILITY, scalar_t, sum_t>(const scalar_t*, int64_t, int64_t,    \
                                                            sum_t*);                              \
  template sum_t sum_row<DLOPS_CAPABILITY, scalar_t, sum_t>(const scalar_t*, int64_t);

#define DLOPS_INSTANTIATE(scalar_t)             \
  DLOPS_INSTANTIATE_FILL(scalar_t, scalar_t)    \
  DLOPS_INSTANTIATE_SCATTER(scalar_t, scalar_t) \
  DLOPS_INSTANTIATE_COPIES(scalar_t, scalar_t)

#define DLOPS_INSTANTIATE_LOW(scalar_t)      \
  DLOPS_INSTANTIATE_FILL(scalar_t, scalar_t) \
  DLOPS_INSTANTIATE_FILL(scalar_t, float)    \
  DLOPS_INSTANTIATE_SCATTER(scalar_t, float) \
  DLOPS_INSTANTIATE_COPIES(scalar_t, float)  \
  template void convert_row<DLOPS_CAPABILITY, float, scalar_t>(const float*, scalar_t*, int64_t);

template void convert_row<DLOPS_CAPABILITY, c10::BFloat16, c10::BFloat16>(const c10::BFloat16*,
                                                                          c10::BFloat16*, int64_t);
template void pair_rows<DLOPS_CAPABILITY, c10::BFloat16>(const c10::BFloat16*, const c10::BFloat16*,
                                                         int64_t, int64_t, c10::BFloat16*, int64_t);
template bool split_row<DLOPS_CAPABILITY>(const float*, c10::BFloat16*, c10::BFloat16*, int64_t);
template bool all_finite<DLOPS_CAPABILITY, c10::BFloat16>(const c10::BFloat16*, int64_t);
template bool all_finite<DLOPS_CAPABILITY, double>(const double*, int64_t);
template bool all_finite<DLOPS_CAPABILITY, float>(const float*, int64_t);
template double* copy_runs<DLOPS_CAPABILITY, double>(const double* const*, int64_t, int64_t,
                                                     int64_t, int64_t, int64_t, double*);
template float* copy_runs<DLOPS_CAPABILITY, float>(const float* const*, int64_t, int64_t, int64_t,
                                                   int64_t, int64_t, float*);
template c10::BFloat16* copy_runs<DLOPS_CAPABILITY, c10::BFloat16>(const c10::BFloat16* const*,
                                                                   int64_t, int64_t, int64_t,
                                                                   int64_t, int64_t,
                                                                   c10::BFloat16*);
DLOPS_INSTANTIATE(double)
DLOPS_INSTANTIATE(float)
DLOPS_INSTANTIATE(c10::complex<double>)
DLOPS_INSTANTIATE(c10::complex<float>)
DLOPS_INSTANTIATE(int64_t)
DLOPS_INSTANTIATE(int32_t)
DLOPS_INSTANTIATE(int16_t)
DLOPS_INSTANTIATE(int8_t)
DLOPS_INSTANTIATE(uint8_t)
DLOPS_INSTANTIATE_FILL(bool, bool)
DLOPS_INSTANTIATE_SCATTER(bool, bool)
DLOPS_INSTANTIATE_LOW(c10::BFloat16)
DLOPS_INSTANTIATE_LOW(c10::Half)

}  // namespace dlops::cpu
