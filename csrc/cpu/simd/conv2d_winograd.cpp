#include "cpu/simd/conv2d_winograd.h"

#include <algorithm>
#include <utility>

#include "cpu/simd/load_store.h"

namespace dlops::cpu {
namespace {

template <class T>
using Vec = at::vec::Vectorized<T>;

// Calls f(first, count) for the vectors of `count` numbers.
template <class T, class F>
void for_each_vector(int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i += Vec<T>::size())
    f(i, std::min<int64_t>(count - i, Vec<T>::size()));
}

template <class V>
bool is_zero(const V& vector) {
  using T = typename V::value_type;
  T numbers[V::size()];
  vector.store(numbers);
  return std::all_of(numbers, numbers + V::size(), [](T x) { return x == T(0); });
}

// G x of three numbers.
template <class V>
void expand(const V& a, const V& b, const V& c, V* to, int step) {
  const V half(typename V::value_type(0.5)), sum = (a + c) * half, middle = b * half;
  to[0] = a;
  to[step] = sum + middle;
  to[2 * step] = sum - middle;
  to[3 * step] = c;
}

// The positions of the 2x2 gradients a b, c d.
template <class T, class V = Vec<T>>
void store_grad(const V& a, const V& b, const V& c, const V& d, T* to, int64_t position,
                int64_t some) {
  const auto row = [&](const V& left, const V& right, T* first) {
    store(left, first, some);
    store(left + right, first + position, some);
    store(left - right, first + 2 * position, some);
    store(right, first + 3 * position, some);
  };
  row(a, b, to);
  row(a + c, b + d, to + 4 * position);
  row(a - c, b - d, to + 8 * position);
  row(c, d, to + 12 * position);
}

}  // namespace

template <int capability, class T>
void transform_weights(const T* cells, int64_t cell, int64_t count, bool turned, T* to,
                       int64_t position) {
  using V = Vec<T>;
  for_each_vector<T>(count, [&](int64_t i, int64_t some) {
    V weights[9], rows[12], result[kPositions];
    for (int j = 0; j < 9; ++j) weights[j] = load<T>(cells + (turned ? 8 - j : j) * cell + i, some);
    for (int j = 0; j < 3; ++j) expand(weights[j], weights[3 + j], weights[6 + j], rows + j, 3);
    for (int j = 0; j < 4; ++j)
      expand(rows[3 * j], rows[3 * j + 1], rows[3 * j + 2], result + 4 * j, 1);
    for (int j = 0; j < kPositions; ++j) store(result[j], to + j * position + i, some);
  });
}

template <int capability, class T>
void transform_input(const T* const* pixels, int64_t channels, T* to, int64_t position) {
  using V = Vec<T>;
  for_each_vector<T>(channels, [&](int64_t i, int64_t some) {
    V rows[kPositions];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V a = load<T>(pixels[j] + i, some), b = load<T>(pixels[4 + j] + i, some);
      const V c = load<T>(pixels[8 + j] + i, some), d = load<T>(pixels[12 + j] + i, some);
      rows[j] = a - c;
      rows[4 + j] = b + c;
      rows[8 + j] = c - b;
      rows[12 + j] = b - d;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V* const row = rows + 4 * j;
      T* const first = to + 4 * j * position + i;
      store(row[0] - row[2], first, some);
      store(row[1] + row[2], first + position, some);
      store(row[2] - row[1], first + 2 * position, some);
      store(row[1] - row[3], first + 3 * position, some);
    }
  });
}

template <int capability, class T>
bool transform_output(const T* sums, int64_t position, int64_t channels, const T* bias,
                      T* const* outputs) {
  using V = Vec<T>;
  V nothing(T(0));  // stays zero as long as all numbers are finite
  for_each_vector<T>(channels, [&](int64_t i, int64_t some) {
    V rows[8];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto row = [&](int k) { return load<T>(sums + (4 * k + j) * position + i, some); };
      const V b = row(1), c = row(2);
      rows[j] = row(0) + b + c;
      rows[4 + j] = b - c - row(3);
    }
    const V added = bias == nullptr ? V(T(0)) : load<T>(bias + i, some);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const V* const row = rows + 4 * j;
      const V left = row[0] + row[1] + row[2] + added, right = row[1] - row[2] - row[3] + added;
      const auto finish = [&](const V& value, T* to) {
        if (to == nullptr) return;
        store(value, to + i, some);
        nothing = nothing + value * V(T(0));
      };
      finish(left, outputs[2 * j]);
      finish(right, outputs[2 * j + 1]);
    }
  });
  return is_zero(nothing);
}

template <int capability, class T>
void transform_grad(const T* const* pixels, int64_t channels, T* to, int64_t position) {
  for_each_vector<T>(channels, [&](int64_t i, int64_t some) {
    const auto pixel = [&](int k) { return load<T>(pixels[k] + i, some); };
    store_grad(pixel(0), pixel(1), pixel(2), pixel(3), to + i, position, some);
  });
}

template <int capability, class T>
void transform_grad_rows(const T* first, const T* second, int64_t width, T* to, int64_t position) {
  using V = Vec<T>;
  const auto pairs = [](const T* row, int64_t count) {
    if (row == nullptr) return std::pair{V(T(0)), V(T(0))};
    const V low = load<T>(row, count);
    return at::vec::deinterleave2(
        low, count > V::size() ? load<T>(row + V::size(), count - V::size()) : V(T(0)));
  };
  for_each_vector<T>((width + 1) / 2, [&](int64_t i, int64_t some) {
    const auto [a, b] = pairs(first + 2 * i, width - 2 * i);
    const auto [c, d] = pairs(second == nullptr ? nullptr : second + 2 * i, width - 2 * i);
    store_grad(a, b, c, d, to + i, position, some);
  });
}

template <int capability, class T>
bool transform_grad_weight(const T* sums, int64_t position, int64_t channels, T* cells) {
  using V = Vec<T>;
  V nothing(T(0));
  const V half(T(0.5));
  for_each_vector<T>(channels, [&](int64_t i, int64_t some) {
    V rows[12];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto row = [&](int k) { return load<T>(sums + (4 * k + j) * position + i, some); };
      const V b = row(1), c = row(2), both = (b + c) * half;
      rows[j] = row(0) + both;
      rows[4 + j] = (b - c) * half;
      rows[8 + j] = both - row(3);
    }
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      const V* const row = rows + 4 * j;
      const V both = (row[1] + row[2]) * half;
      const auto finish = [&](const V& value, int k) {
        store(value, cells + (3 * j + k) * channels + i, some);
        nothing = nothing + value * V(T(0));
      };
      finish(row[0] + both, 0);
      finish((row[1] - row[2]) * half, 1);
      finish(both - row[3], 2);
    }
  });
  return is_zero(nothing);
}

#define DLOPS_INSTANTIATE(T)                                                                 \
  template void transform_weights<DLOPS_CAPABILITY, T>(const T*, int64_t, int64_t, bool, T*, \
                                                       int64_t);                             \
  template void transform_input<DLOPS_CAPABILITY, T>(const T* const*, int64_t, T*, int64_t); \
  template void transform_grad<DLOPS_CAPABILITY, T>(const T* const*, int64_t, T*, int64_t);  \
  template void transform_grad_rows<DLOPS_CAPABILITY, T>(const T*, const T*, int64_t, T*,    \
                                                         int64_t);                           \
  template bool transform_grad_weight<DLOPS_CAPABILITY, T>(const T*, int64_t, int64_t, T*);  \
  template bool transform_output<DLOPS_CAPABILITY, T>(const T*, int64_t, int64_t, const T*,  \
                                                      T* const*);

DLOPS_INSTANTIATE(float)

}  // namespace dlops::cpu
