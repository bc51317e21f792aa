// Matrices turned round.
#pragma once

#include <cstdint>

namespace dlops::cpu {

// to[j][i] = from[i][j], converted, for i < rows, j < cols. They may not overlap.
template <int capability, class from_t, class to_t>
void transpose(const from_t* from, int64_t from_ld, int64_t rows, int64_t cols, to_t* to,
               int64_t to_ld);
// The same for pairs of elements. Counted in pairs all through.
template <int capability, class T>
void transpose_pairs(const T* from, int64_t from_ld, int64_t rows, int64_t cols, T* to,
                     int64_t to_ld);

}  // namespace dlops::cpu
