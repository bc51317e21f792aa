// Vectors of any element type, in the compiler's own vector extension: comparisons, blends and sums
// on values and the integers that go with them, in registers, on every instruction set.
#pragma once

#if DLOPS_CAPABILITY >= 1
#include <immintrin.h>
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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

// The same bits as another type of the same size.
template <class V, class R>
V as(R bits) {
  static_assert(sizeof(V) == sizeof(R));
  V values;
  std::memcpy(&values, &bits, sizeof(values));
  return values;
}

// float16 to float32 and back, to the nearest. Neither the compiler nor c10::Half takes several at
// once.
template <int64_t lanes>
Vector<float, lanes> floats_of(const c10::Half* from) {
#if DLOPS_CAPABILITY >= 1
  if constexpr (lanes == 4) {
    return as<Vector<float, 4>>(
        _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
  } else if constexpr (lanes == 8) {
    return as<Vector<float, 8>>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
#if DLOPS_CAPABILITY == 2
  if constexpr (lanes == 16) {
    return as<Vector<float, 16>>(
        _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
#endif
#endif
  Vector<float, lanes> values;
  for (int64_t l = 0; l < lanes; ++l) values[l] = static_cast<float>(from[l]);
  return values;
}
template <int64_t lanes>
Vector<uint16_t, lanes> halves_of(Vector<float, lanes> values) {
  Vector<uint16_t, lanes> halves;
#if DLOPS_CAPABILITY >= 1
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  if constexpr (lanes == 4) {
    const __m128i bits = _mm_cvtps_ph(as<__m128>(values), nearest);
    std::memcpy(&halves, &bits, sizeof(halves));
    return halves;
  } else if constexpr (lanes == 8) {
    return as<Vector<uint16_t, 8>>(_mm256_cvtps_ph(as<__m256>(values), nearest));
  }
#if DLOPS_CAPABILITY == 2
  if constexpr (lanes == 16)
    return as<Vector<uint16_t, 16>>(_mm512_cvtps_ph(as<__m512>(values), nearest));
#endif
#endif
  for (int64_t l = 0; l < lanes; ++l) halves[l] = static_cast<c10::Half>(values[l]).x;
  return halves;
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
    return __builtin_convertvector((as<Vector<float, lanes>>(bits)), Vector<T, lanes>);
  } else if constexpr (std::is_same_v<from_t, c10::Half>) {
    return __builtin_convertvector(floats_of<lanes>(from), Vector<T, lanes>);
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
#if DLOPS_CAPABILITY == 2
  // As many bytes: `memcpy` of a length that is not constant is a call.
  const __mmask64 some = (uint64_t(1) << (static_cast<size_t>(count) * sizeof(from_t))) - 1;
  const __m512i bits = _mm512_maskz_loadu_epi8(some, from);
  std::memcpy(static_cast<void*>(part), &bits, sizeof(part));
#else
  std::memcpy(static_cast<void*>(part), from, static_cast<size_t>(count) * sizeof(from_t));
#endif
  return load<T, lanes>(part);
}

// Each lane as a to_t.
template <class to_t, int64_t lanes, class V>
Vector<to_t, lanes> converted(V values) {
#if DLOPS_CAPABILITY == 2
  // GCC takes bytes from their lanes one by one.
  if constexpr (std::is_same_v<to_t, uint8_t> && std::is_same_v<V, Vector<uint32_t, 16>>)
    return as<Vector<uint8_t, 16>>(_mm512_cvtepi32_epi8(as<__m512i>(values)));
#endif
  return __builtin_convertvector(values, Vector<to_t, lanes>);
}

#if DLOPS_CAPABILITY == 2
// Writes the first `bytes` of a register's 8, 16, 32 or 64: `memcpy` of a length that is not
// constant is a call.
template <class V>
void store_bytes(V values, void* to, int64_t bytes) {
  const uint64_t some = (uint64_t(1) << bytes) - 1;
  if constexpr (sizeof(V) == 64) {
    _mm512_mask_storeu_epi8(to, some, as<__m512i>(values));
  } else if constexpr (sizeof(V) == 32) {
    _mm256_mask_storeu_epi8(to, static_cast<__mmask32>(some), as<__m256i>(values));
  } else {
    static_assert(sizeof(V) == 16 || sizeof(V) == 8);
    __m128i bits = {};
    std::memcpy(&bits, &values, sizeof(values));
    _mm_mask_storeu_epi8(to, static_cast<__mmask16>(some), bits);
  }
}
#endif

// Writes the first `count` lanes (at most all), converted.
template <int64_t lanes, class V, class to_t>
void store_part(V values, to_t* to, int64_t count) {
  if constexpr (std::is_same_v<to_t, c10::BFloat16>) {
    const auto number = __builtin_convertvector(values, Vector<float, lanes>);
    auto bits = as<Vector<uint32_t, lanes>>(number);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    bits = number == number ? bits : fill<uint32_t, lanes>(0x7fc0);
    store_part<lanes>(bits, reinterpret_cast<uint16_t*>(to), count);
  } else if constexpr (std::is_same_v<to_t, c10::Half>) {
    const auto numbers = __builtin_convertvector(values, Vector<float, lanes>);
    store_part<lanes>(halves_of<lanes>(numbers), reinterpret_cast<uint16_t*>(to), count);
  } else {
    const Vector<to_t, lanes> result = converted<to_t, lanes>(values);
    if (count >= lanes) {
      std::memcpy(to, &result, sizeof(result));
    } else {
#if DLOPS_CAPABILITY == 2
      store_bytes(result, to, count * static_cast<int64_t>(sizeof(to_t)));
#else
      std::memcpy(to, &result, static_cast<size_t>(count) * sizeof(to_t));
#endif
    }
  }
}

// A writer of whole results. One far larger than the caches goes past them with AVX-512, where its
// vectors fill cache lines: old contents are then not read first, and nothing else is pushed out.
class Writer {
 public:
  explicit Writer(int64_t bytes) : past_caches_(bytes > (int64_t(64) << 20)) {}
  ~Writer() {
#if DLOPS_CAPABILITY == 2
    if (past_caches_) _mm_sfence();
#endif
  }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  template <int64_t lanes, class V, class to_t>
  void store(V values, to_t* to, int64_t count) const {
#if DLOPS_CAPABILITY == 2
    if constexpr (lanes * sizeof(to_t) == 64) {
      if (past_caches_ && count >= lanes && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to),
                            as<__m512i>(converted<to_t, lanes>(values)));
        return;
      }
    }
#endif
    store_part<lanes>(values, to, count);
  }

 private:
  bool past_caches_;
};

// Lane number from(l) of two vectors in a row, for each lane l.
template <class T, int64_t lanes, class F>
Vector<T, lanes> shuffled(Vector<T, lanes> a, Vector<T, lanes> b, const F& from) {
  return [&]<size_t... l>(std::index_sequence<l...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, from(l)...);
#else
    using id_t = UnsignedOf<T>;
    return __builtin_shuffle(a, b, Vector<id_t, lanes>{static_cast<id_t>(from(l))...});
#endif
  }(std::make_index_sequence<lanes>());
}
// Lanes `first`, `first` + 2, ... of two vectors in a row.
template <size_t first, class T, int64_t lanes>
Vector<T, lanes> every_second(Vector<T, lanes> a, Vector<T, lanes> b) {
  return shuffled<T, lanes>(a, b, [](size_t l) constexpr { return first + 2 * l; });
}
// The lanes of two vectors in turn: one half of them.
template <size_t half, class T, int64_t lanes>
Vector<T, lanes> in_turn(Vector<T, lanes> a, Vector<T, lanes> b) {
  return shuffled<T, lanes>(
      a, b, [](size_t l) constexpr { return half * lanes / 2 + l / 2 + l % 2 * lanes; });
}

}  // namespace
}  // namespace dlops::cpu
