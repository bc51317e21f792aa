// Vectors of any element type, in the compiler's own vector extension: comparisons, blends and sums
// on values and the integers that go with them, in registers, on every instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/rounded.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// The width of this instruction set's registers.
constexpr int64_t kVectorBytes = DLOPS_CAPABILITY == 2 ? 64 : DLOPS_CAPABILITY == 1 ? 32 : 16;

template <class T, int64_t lanes>
struct VectorType {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};
template <class T, int64_t lanes>
using Vector = typename VectorType<T, lanes>::type;

// The unsigned integer as wide as T.
template <class T>
using UnsignedOf =
    std::conditional_t<sizeof(T) == 1, uint8_t,
                       std::conditional_t<sizeof(T) == 2, uint16_t,
                                          std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>>;

template <class T, int64_t lanes>
Vector<T, lanes> fill(T value) {
  return Vector<T, lanes>{} + value;
}

// The elements at `from`, converted to T.
template <class T, int64_t lanes, class from_t>
Vector<T, lanes> load(const from_t* from) {
  if constexpr (std::is_same_v<from_t, c10::BFloat16>) {
    // The upper half of a float32's bits.
    const auto bits =
        __builtin_convertvector((load<uint16_t, lanes>(reinterpret_cast<const uint16_t*>(from))),
                                Vector<uint32_t, lanes>)
        << 16;
    Vector<float, lanes> values;
    std::memcpy(&values, &bits, sizeof(values));
    return __builtin_convertvector(values, Vector<T, lanes>);
  } else if constexpr (std::is_same_v<from_t, c10::Half>) {
    Vector<float, lanes> values;
    for (int64_t l = 0; l < lanes; ++l) values[l] = static_cast<float>(from[l]);
    return __builtin_convertvector(values, Vector<T, lanes>);
  } else {
    Vector<from_t, lanes> values;
    std::memcpy(&values, from, sizeof(values));
    if constexpr (std::is_same_v<from_t, uint8_t> && sizeof(T) > 2) {
      // GCC widens bytes by doubling them in registers, and any further one by one.
      const auto twice = __builtin_convertvector(values, Vector<uint16_t, lanes>);
      const auto four_times = __builtin_convertvector(twice, Vector<uint32_t, lanes>);
      return __builtin_convertvector(four_times, Vector<T, lanes>);
    } else {
      return __builtin_convertvector(values, Vector<T, lanes>);
    }
  }
}

// The first `count` elements, 0 in the other lanes; reads nothing past them.
template <class T, int64_t lanes, class from_t>
Vector<T, lanes> load_part(const from_t* from, int64_t count) {
  if (count >= lanes) return load<T, lanes>(from);
  from_t part[lanes] = {};
  std::memcpy(static_cast<void*>(part), from, static_cast<size_t>(count) * sizeof(from_t));
  return load<T, lanes>(part);
}

// Writes the first `count` lanes (at most all), converted.
template <int64_t lanes, class V, class to_t>
void store_part(V values, to_t* to, int64_t count) {
  if constexpr (std::is_class_v<to_t>) {  // BFloat16 and Half
    for (int64_t l = 0; l < (count < lanes ? count : lanes); ++l) to[l] = rounded<to_t>(values[l]);
  } else {
    const Vector<to_t, lanes> converted = __builtin_convertvector(values, Vector<to_t, lanes>);
    if (count >= lanes) {
      std::memcpy(to, &converted, sizeof(converted));
    } else {
      std::memcpy(to, &converted, static_cast<size_t>(count) * sizeof(to_t));
    }
  }
}

}  // namespace
}  // namespace dlops::cpu
