// Vectors of any element type, in the compiler's own vector extension: comparisons, blends and sums
// on values and the integers that go with them, in registers, on every instruction set.
#pragma once

#include <c10/macros/Macros.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// For functions that hold vectors in registers: handed to a function, or to a lambda that is called
// in several places, they would go through memory. A sanitizer's checks, of which there would be
// thousands, take minutes to compile then.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DLOPS_FLATTEN
#else
#define DLOPS_FLATTEN [[gnu::flatten]]
#endif

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

template <int64_t value>
using Constant = std::integral_constant<int64_t, value>;

// Calls f(i) for 0 <= i < count, all known to the compiler: what they index stays in registers.
template <int64_t count, class F>
C10_ALWAYS_INLINE void unrolled(const F& f) {
  [&]<int64_t... i>(std::integer_sequence<int64_t, i...>) __attribute__((always_inline)) {
    (f(Constant<i>()), ...);
  }(std::make_integer_sequence<int64_t, count>());
}

// Calls f(i) for 0 <= i < count; `known`, where it is not 0, is that number, known to the compiler.
template <int64_t known, class F>
C10_ALWAYS_INLINE void repeated(int64_t count, const F& f) {
  if constexpr (known > 0) {
    unrolled<known>(f);
  } else {
    for (int64_t i = 0; i < count; ++i) f(i);
  }
}

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

// The same bits as another type of the same size.
template <class V, class R>
V as(R bits) {
  static_assert(sizeof(V) == sizeof(R));
  V values;
  std::memcpy(&values, &bits, sizeof(values));
  return values;
}

// Lane number F()(l) of two vectors in a row, for each lane l.
template <class T, int64_t lanes, class F>
C10_ALWAYS_INLINE Vector<T, lanes> shuffled(Vector<T, lanes> a, Vector<T, lanes> b, F) {
  return [&]<size_t... l>(std::index_sequence<l...>) __attribute__((always_inline)) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, F()(l)...);
#else
    using id_t = UnsignedOf<T>;
    return __builtin_shuffle(a, b, Vector<id_t, lanes>{static_cast<id_t>(F()(l))...});
#endif
  }(std::make_index_sequence<lanes>());
}
// Lanes `first`, `first` + 2, ... of two vectors in a row.
template <size_t first, class T, int64_t lanes>
C10_ALWAYS_INLINE Vector<T, lanes> every_second(Vector<T, lanes> a, Vector<T, lanes> b) {
  return shuffled<T, lanes>(a, b, [](size_t l) constexpr { return first + 2 * l; });
}
// The lanes of two vectors in turn: one half of them.
template <size_t half, class T, int64_t lanes>
C10_ALWAYS_INLINE Vector<T, lanes> in_turn(Vector<T, lanes> a, Vector<T, lanes> b) {
  return shuffled<T, lanes>(
      a, b, [](size_t l) constexpr { return half * lanes / 2 + l / 2 + l % 2 * lanes; });
}

}  // namespace
}  // namespace dlops::cpu
