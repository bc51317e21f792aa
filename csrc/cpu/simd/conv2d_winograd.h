// The transforms of Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", CVPR 2016, arXiv:1509.09308), over vectors of channels:
//
//   output = A^T [(G weight G^T) * (B^T input B)] A
//
// for a tile of 4x4 input pixels, 3x3 weights and 2x2 outputs, where * multiplies the 16 positions.
#pragma once

#include <cstdint>

namespace dlops::cpu {

constexpr int kPositions = 16;

// `count` numbers of each kernel cell, the cells `cell` apart, from the first one to the last or,
// `turned`, the other way, as those of the positions, `position` apart.
template <int capability, class T>
void transform_weights(const T* cells, int64_t cell, int64_t count, bool turned, T* to,
                       int64_t position);
// The channels of a tile's pixels, row by row, as those of the positions, `position` apart.
template <int capability, class T>
void transform_input(const T* const* pixels, int64_t channels, T* to, int64_t position);
// The sums of the positions, `position` apart, as a tile's four outputs, plus the bias where there
// is one. Outputs whose place is null are dropped. Whether the others are finite.
template <int capability, class T>
bool transform_output(const T* sums, int64_t position, int64_t channels, const T* bias,
                      T* const* outputs);
// For the gradient of the weight, F(3x3, 2x2): the channels of a tile of 2x2 gradients as those of
// the positions, but for factors of 1/2, which transform_grad_weight has.
template <int capability, class T>
void transform_grad(const T* const* pixels, int64_t channels, T* to, int64_t position);
// The same of a row of tiles, side by side: two rows of one channel's gradients, of which the
// second may be missing (null), and a last column.
template <int capability, class T>
void transform_grad_rows(const T* first, const T* second, int64_t width, T* to, int64_t position);
// The sums of the positions, `position` apart, as the gradients of the 9 cells, `channels` apart.
// Whether they are finite.
template <int capability, class T>
bool transform_grad_weight(const T* sums, int64_t position, int64_t channels, T* cells);

}  // namespace dlops::cpu
