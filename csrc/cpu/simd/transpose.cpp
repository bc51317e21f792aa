#include "cpu/simd/transpose.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>

#include <algorithm>
#include <cstdint>

#include "cpu/simd/transpose_tiles.h"

namespace dlops::cpu {

template <int capability, class from_t, class to_t>
void transpose(const from_t* from, int64_t from_ld, int64_t rows, int64_t cols, to_t* to,
               int64_t to_ld) {
  if constexpr (sizeof(from_t) <= sizeof(uint64_t)) {
    transpose_tiles(from, from_ld, rows, cols, to, to_ld);
  } else {
    constexpr int64_t tile = 8;  // the caches hold what is begun of each row
    for (int64_t i0 = 0; i0 < rows; i0 += tile)
      for (int64_t j0 = 0; j0 < cols; j0 += tile)
        for (int64_t j = j0; j < std::min(cols, j0 + tile); ++j)
          for (int64_t i = i0; i < std::min(rows, i0 + tile); ++i)
            to[j * to_ld + i] = from[i * from_ld + j];
  }
}

template <int capability, class T>
void transpose_pairs(const T* from, int64_t from_ld, int64_t rows, int64_t cols, T* to,
                     int64_t to_ld) {
  static_assert(2 * sizeof(T) == sizeof(uint32_t));  // which are moved, whatever they mean
  transpose_tiles(reinterpret_cast<const uint32_t*>(from), from_ld, rows, cols,
                  reinterpret_cast<uint32_t*>(to), to_ld);
}

#define DLOPS_INSTANTIATE(from_t, to_t)                                                    \
  template void transpose<DLOPS_CAPABILITY, from_t, to_t>(const from_t*, int64_t, int64_t, \
                                                          int64_t, to_t*, int64_t);

#define DLOPS_INSTANTIATE_LOW(scalar_t) \
  DLOPS_INSTANTIATE(scalar_t, scalar_t) \
  DLOPS_INSTANTIATE(scalar_t, float)    \
  DLOPS_INSTANTIATE(float, scalar_t)

DLOPS_INSTANTIATE(double, double)
DLOPS_INSTANTIATE(float, float)
DLOPS_INSTANTIATE(c10::complex<double>, c10::complex<double>)
DLOPS_INSTANTIATE(c10::complex<float>, c10::complex<float>)
DLOPS_INSTANTIATE(int64_t, int64_t)
DLOPS_INSTANTIATE(int32_t, int32_t)
DLOPS_INSTANTIATE(int16_t, int16_t)
DLOPS_INSTANTIATE(int8_t, int8_t)
DLOPS_INSTANTIATE(uint8_t, uint8_t)
DLOPS_INSTANTIATE_LOW(c10::BFloat16)
DLOPS_INSTANTIATE_LOW(c10::Half)
template void transpose_pairs<DLOPS_CAPABILITY, c10::BFloat16>(const c10::BFloat16*, int64_t,
                                                               int64_t, int64_t, c10::BFloat16*,
                                                               int64_t);

}  // namespace dlops::cpu
