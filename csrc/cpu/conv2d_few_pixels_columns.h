// The columns of a batch of few pixels, and whether it is one.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <type_traits>

#include "conv2d_math.h"
#include "cpu/capability.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {

// Whether a weight of `outputs` rows of K elements is large beside the columns of P pixels.
inline bool are_few_pixels(int64_t P, int64_t K, int64_t outputs, at::ScalarType dtype) {
  constexpr int64_t kColumns = 512 * 1024, kFewPixels = 64;
  const bool multiplied = dtype == at::kFloat || dtype == at::kDouble ||
                          (dtype == at::kBFloat16 && multiplies_bfloat16());
  return multiplied && P <= kFewPixels && P * K <= kColumns && outputs >= 64 &&
         outputs * K >= 256 * P;
}

// The columns of all pixels of a group, K ordered as in the images' memory: a P x K matrix or,
// `transposed`, K x P. `ld` is the distance between rows. Those of bfloat16 stand in pairs, as
// products want them, with zeros beside an odd last one.
template <class scalar_t, bool last, bool transposed>
class FewColumns {
 public:
  FewColumns(const Conv2dGeometry& g, int64_t group, int64_t ld)
      : g_(g), c0_(group * g.channels_per_group()), ld_(ld) {}

  at::Tensor fill(const scalar_t* input) const {
    const int64_t rows = ceil_div(transposed ? K() : P(), int64_t{2}) * 2;
    const at::Tensor result =
        at::empty({rows * ld_ + kPadding}, at::TensorOptions(c10::CppTypeToScalarType<scalar_t>()));
    scalar_t* const to = result.mutable_data_ptr<scalar_t>();
    const int64_t count = last ? P() : g_.channels_per_group();
    at::parallel_for(0, ceil_div(count, kSome), grain(kSome * each() * row()),
                     [&](int64_t begin, int64_t end) {
                       const int64_t size = kCopied ? (kSome * each() + 1) * copied_ld() : 0;
                       Scratch scratch(Scratch::size<scalar_t>(size));
                       scalar_t* const space = scratch.take<scalar_t>(size);
                       for (int64_t i = begin * kSome; i < std::min(count, end * kSome); i += kSome)
                         fill_some({i, std::min(count, i + kSome)}, input, space, to);
                     });
    return result;
  }

 private:
  // im2col makes rows of pixels (channels_last) or of the kernel's cells, for some pixels or
  // channels at a time, which are turned round where the others are wanted.
  static constexpr int64_t kSome = 8;
  static constexpr bool kTurned = last == transposed;
  static constexpr bool kPairs = std::is_same_v<scalar_t, c10::BFloat16>;
  static constexpr bool kCopied = kTurned || kPairs;

  int64_t P() const { return g_.N * g_.output_pixels(); }
  int64_t K() const { return g_.column_rows(); }
  // The rows that im2col makes of a pixel or of a channel, and their length.
  int64_t each() const { return last ? 1 : g_.R * g_.S; }
  int64_t row() const { return last ? K() : P(); }
  int64_t copied_ld() const { return ceil_div(row(), int64_t{2}) * 2; }

  void fill_some(Interval some, const scalar_t* input, scalar_t* space, scalar_t* to) const {
    const int64_t first = some.begin * each(), count = (some.end - some.begin) * each();
    scalar_t* const rows = kCopied ? space : to + first * ld_;
    const int64_t rows_ld = kCopied ? copied_ld() : ld_;
    if constexpr (last) {
      const ColumnBlock block{c0_, c0_ + g_.channels_per_group(), some.begin, some.end};
      DLOPS_SIMD(fill_columns_last, scalar_t, scalar_t)(g_, block, input, rows, rows_ld);
    } else {
      const ColumnBlock block{c0_ + some.begin, c0_ + some.end, 0, P()};
      DLOPS_SIMD(fill_columns, scalar_t, scalar_t)(g_, block, input, rows, rows_ld);
    }
    if constexpr (kPairs) {
      pair(first, count, rows, to);
    } else if constexpr (kTurned) {
      DLOPS_SIMD(transpose, scalar_t, scalar_t)(rows, rows_ld, count, row(), to + first, ld_);
    }
  }
  void pair(int64_t first, int64_t count, scalar_t* rows, scalar_t* to) const {
    const int64_t rows_ld = copied_ld();
    if constexpr (kTurned) {
      for (int64_t i = 0; row() < rows_ld && i < count; ++i) rows[i * rows_ld + row()] = 0;
      DLOPS_SIMD(transpose_pairs, scalar_t)(rows, rows_ld / 2, count, rows_ld / 2, to + 2 * first,
                                            ld_);
    } else {
      if (count % 2 == 1) std::fill_n(rows + count * rows_ld, rows_ld, scalar_t(0));
      for (int64_t i = 0; i < count; i += 2, rows += 2 * rows_ld) DLOPS_SIMD(pair_rows, scalar_t)
      (rows, rows + rows_ld, 0, 1, to + (first + i) * ld_, row());
    }
  }

  const Conv2dGeometry& g_;
  int64_t c0_, ld_;
};

}  // namespace dlops::cpu
