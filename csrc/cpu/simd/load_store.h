// Vectors of the type that arithmetic runs in, from and to memory of a tensor's type.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// The first `count` elements, at most a vector's, and zeros; reads nothing past them.
template <class T, class scalar_t>
at::vec::Vectorized<T> load(const scalar_t* from, int64_t count) {
  using V = at::vec::Vectorized<T>;
  if constexpr (std::is_same_v<T, scalar_t>) {
    return count >= V::size() ? V::loadu(from) : V::loadu(from, static_cast<int16_t>(count));
  } else {
    if (count < V::size()) {
      const auto part = at::vec::Vectorized<scalar_t>::loadu(from, static_cast<int16_t>(count));
      return std::get<0>(at::vec::convert_to_float<scalar_t>(part));
    }
    V values;
    at::vec::load_to_float<scalar_t>(from, values);
    return values;
  }
}

template <class T, class scalar_t>
void store(at::vec::Vectorized<T> values, scalar_t* to, int64_t count) {
  const int some = static_cast<int>(std::min<int64_t>(count, values.size()));
  if constexpr (!std::is_same_v<T, scalar_t>) {
    at::vec::convert_from_float<scalar_t>(values, values).store(to, some);
  } else if (some == values.size()) {
    values.store(to);
  } else {
    values.store(to, some);
  }
}

}  // namespace
}  // namespace dlops::cpu
