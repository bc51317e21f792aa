// Windows of max pooling at work with AVX-512, one in each lane of a vector, as in pool_windows.h.
// Their cells are bytes all along, chosen by the mask that chooses the values.
#pragma once

#include <c10/macros/Macros.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/simd/lanes.h"
#include "cpu/simd/pool_windows.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

using Floats = Vector<float, 16>;
using Doubles = Vector<double, 8>;

// The lanes where a > b, and where either is NaN.
C10_ALWAYS_INLINE __mmask16 greater(Floats a, Floats b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
}
C10_ALWAYS_INLINE __mmask16 greater(Doubles a, Doubles b) {
  return _mm512_cmp_pd_mask(a, b, _CMP_GT_OQ);
}
C10_ALWAYS_INLINE __mmask16 unordered(Floats a, Floats b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
}
C10_ALWAYS_INLINE __mmask16 unordered(Doubles a, Doubles b) {
  return _mm512_cmp_pd_mask(a, b, _CMP_UNORD_Q);
}
// Whether denormal numbers are taken for 0 on this thread, as torch.set_flush_denormal asks for.
inline bool flushes_denormals() { return (_mm_getcsr() & _MM_DENORMALS_ZERO_ON) != 0; }
// a > b ? a : b, zeros of either sign included; but 0 for a denormal number that is taken for it.
C10_ALWAYS_INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
C10_ALWAYS_INLINE Doubles larger(Doubles a, Doubles b) { return _mm512_max_pd(a, b); }
// b in the lanes of `mask`, a in the others.
C10_ALWAYS_INLINE Floats chosen(Floats a, __mmask16 mask, Floats b) {
  return _mm512_mask_mov_ps(a, mask, b);
}
C10_ALWAYS_INLINE Doubles chosen(Doubles a, __mmask16 mask, Doubles b) {
  return _mm512_mask_mov_pd(a, static_cast<__mmask8>(mask), b);
}

// One cell's number for all lanes.
C10_ALWAYS_INLINE __m128i byte_cells(int64_t cell) {
  return _mm_set1_epi8(static_cast<char>(cell));
}
// Which cells are `ids`, among those of `some`: as bytes, which are masks at once.
C10_ALWAYS_INLINE __mmask16 equal_cells(const uint8_t* cells, __mmask16 some, __m128i ids) {
  return _mm_mask_cmpeq_epi8_mask(some, _mm_maskz_loadu_epi8(some, cells), ids);
}
// The same for a whole vector's.
template <int64_t lanes>
C10_ALWAYS_INLINE __mmask16 equal_cells(const uint8_t* cells, __m128i ids) {
  if constexpr (lanes < 16) return equal_cells(cells, (1 << lanes) - 1, ids);
  return _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(cells)), ids);
}
// sum += grad in the lanes of `mine`.
C10_ALWAYS_INLINE void add(Floats grad, __mmask16 mine, Floats& sum) {
  sum = _mm512_mask_add_ps(sum, mine, sum, grad);
}
C10_ALWAYS_INLINE void add(Doubles grad, __mmask16 mine, Doubles& sum) {
  sum = _mm512_mask_add_pd(sum, static_cast<__mmask8>(mine), sum, grad);
}

// `any`: whether values may be NaN, or denormal numbers that are taken for 0; where they are
// neither, the largest is found without waiting for the mask. `numbered`: whether the cells are
// wanted.
template <class T, bool any, bool numbered>
struct ByteWindows {
  static constexpr int64_t lanes = kVectorBytes / static_cast<int64_t>(sizeof(T));
  using Values = Vector<T, lanes>;
  Values best;
  __m128i cell;

  C10_ALWAYS_INLINE void visit(Values value, __m128i id) {
    if constexpr (any) {
      const __mmask16 takes =
          static_cast<__mmask16>(greater(value, best) | unordered(value, value));
      best = chosen(best, takes, value);
      if constexpr (numbered) cell = _mm_mask_mov_epi8(cell, takes, id);
    } else {
      if constexpr (numbered) cell = _mm_mask_mov_epi8(cell, greater(value, best), id);
      best = larger(value, best);
    }
  }
  // Element `at` and those after it, `count` of them or a vector's.
  template <class scalar_t>
  C10_ALWAYS_INLINE void store(scalar_t* output, uint8_t* cells, int64_t at, int64_t count) const {
    store_part<lanes>(best, output + at, count);
    if constexpr (numbered) store_part<lanes>(first_bytes(cell), cells + at, count);
  }

 private:
  static Vector<uint8_t, lanes> first_bytes(__m128i bytes) {
    Vector<uint8_t, lanes> first;
    std::memcpy(&first, &bytes, sizeof(first));
    return first;
  }
};

}  // namespace
}  // namespace dlops::cpu
