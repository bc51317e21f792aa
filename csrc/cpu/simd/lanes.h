// Vectors from and to memory, converted: whole ones and parts.
#pragma once

#if DLOPS_CAPABILITY == 2
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/low_precision.h"
#include "cpu/simd/vectors.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// The elements at `from`, converted to T.
template <class T, int64_t lanes, class from_t>
Vector<T, lanes> load(const from_t* from) {
  if constexpr (is_low<from_t>) {
    const auto bits = load<uint16_t, lanes>(reinterpret_cast<const uint16_t*>(from));
    return __builtin_convertvector((floats_of<from_t, lanes>(bits)), Vector<T, lanes>);
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
// Writes the first `bytes` of a vector: `memcpy` of a length that is not constant is a call.
template <class V>
void store_bytes(V values, void* to, int64_t bytes) {
  const uint64_t some = (uint64_t(1) << bytes) - 1;
  if constexpr (sizeof(V) == 64) {
    _mm512_mask_storeu_epi8(to, some, as<__m512i>(values));
  } else if constexpr (sizeof(V) == 32) {
    _mm256_mask_storeu_epi8(to, static_cast<__mmask32>(some), as<__m256i>(values));
  } else {
    static_assert(sizeof(V) <= 16);
    __m128i bits = {};
    std::memcpy(&bits, &values, sizeof(values));
    _mm_mask_storeu_epi8(to, static_cast<__mmask16>(some), bits);
  }
}
#endif

// Writes the first `count` lanes (at most all), converted.
template <int64_t lanes, class V, class to_t>
void store_part(V values, to_t* to, int64_t count) {
  if constexpr (is_low<to_t>) {
    const auto numbers = __builtin_convertvector(values, Vector<float, lanes>);
    store_part<lanes>(bits_of<to_t, lanes>(numbers), reinterpret_cast<uint16_t*>(to), count);
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

}  // namespace
}  // namespace dlops::cpu
