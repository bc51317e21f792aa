// bfloat16 and float16 as float32 and back, to the nearest, a vector at a time. Neither the
// compiler nor their classes take several at once.
#pragma once

#if DLOPS_CAPABILITY >= 1
#include <immintrin.h>
#endif

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/vectors.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

template <class T>
constexpr bool is_low = std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>;

template <class low_t, int64_t lanes>
Vector<float, lanes> floats_of(Vector<uint16_t, lanes> bits) {
  if constexpr (std::is_same_v<low_t, c10::BFloat16>) {
    // The upper half of a float32's. GCC 12 would widen 16 lanes by halves.
#if DLOPS_CAPABILITY == 2
    if constexpr (lanes == 16)
      return as<Vector<float, 16>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(as<__m256i>(bits)), 16));
#endif
    return as<Vector<float, lanes>>(__builtin_convertvector(bits, Vector<uint32_t, lanes>) << 16);
  } else {
#if DLOPS_CAPABILITY >= 1
    if constexpr (lanes == 4) {
      __m128i four = {};
      std::memcpy(&four, &bits, sizeof(bits));
      return as<Vector<float, 4>>(_mm_cvtph_ps(four));
    } else if constexpr (lanes == 8) {
      return as<Vector<float, 8>>(_mm256_cvtph_ps(as<__m128i>(bits)));
    }
#if DLOPS_CAPABILITY == 2
    if constexpr (lanes == 16) return as<Vector<float, 16>>(_mm512_cvtph_ps(as<__m256i>(bits)));
#endif
#endif
    Vector<float, lanes> values;
    for (int64_t l = 0; l < lanes; ++l)
      values[l] = static_cast<float>(c10::Half(bits[l], c10::Half::from_bits()));
    return values;
  }
}

template <class low_t, int64_t lanes>
Vector<uint16_t, lanes> bits_of(Vector<float, lanes> values) {
  if constexpr (std::is_same_v<low_t, c10::BFloat16>) {
    auto bits = as<Vector<uint32_t, lanes>>(values);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // ties to even
    bits = values == values ? bits : fill<uint32_t, lanes>(0x7fc0);
    return __builtin_convertvector(bits, Vector<uint16_t, lanes>);
  } else {
    Vector<uint16_t, lanes> bits;
#if DLOPS_CAPABILITY >= 1
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    if constexpr (lanes == 4) {
      const __m128i four = _mm_cvtps_ph(as<__m128>(values), nearest);
      std::memcpy(&bits, &four, sizeof(bits));
      return bits;
    } else if constexpr (lanes == 8) {
      return as<Vector<uint16_t, 8>>(_mm256_cvtps_ph(as<__m256>(values), nearest));
    }
#if DLOPS_CAPABILITY == 2
    if constexpr (lanes == 16)
      return as<Vector<uint16_t, 16>>(_mm512_cvtps_ph(as<__m512>(values), nearest));
#endif
#endif
    for (int64_t l = 0; l < lanes; ++l) bits[l] = static_cast<c10::Half>(values[l]).x;
    return bits;
  }
}

}  // namespace
}  // namespace dlops::cpu
