// im2col and col2im on blocks that stay in cache, and the copies that go with them.
//
// A block of columns covers the channels [c0, c1) and the output pixels [q0, q1), where a pixel's
// number q = (n * OH + oh) * OW + ow runs over the whole batch. Its layout follows the tensor's:
//   contiguous (NCHW):     row ((c - c0) * R + r) * S + s, column q - q0
//   channels_last (NHWC):  row q - q0, column (r * S + s) * (c1 - c0) + (c - c0)
// `ld` is the distance between rows.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "conv2d_math.h"

namespace dlops::cpu {

struct ColumnBlock {
  int64_t c0, c1;
  int64_t q0, q1;
};

// columns = im2col(input), with zeros for the padding.
template <int capability, class input_t, class column_t>
void fill_columns(const Conv2dGeometry& g, const ColumnBlock& block, const input_t* input,
                  column_t* columns, int64_t ld);
template <int capability, class input_t, class column_t>
void fill_columns_last(const Conv2dGeometry& g, const ColumnBlock& block, const input_t* input,
                       column_t* columns, int64_t ld);

// input += col2im(columns), the transpose.
template <int capability, class column_t, class input_t>
void scatter_columns(const Conv2dGeometry& g, const ColumnBlock& block, const column_t* columns,
                     int64_t ld, input_t* input);
template <int capability, class column_t, class input_t>
void scatter_columns_last(const Conv2dGeometry& g, const ColumnBlock& block,
                          const column_t* columns, int64_t ld, input_t* input);

// to[i] = from[i], converted.
template <int capability, class from_t, class to_t>
void convert_row(const from_t* from, to_t* to, int64_t count);
// to[i] = from[i] + bias, converted.
template <int capability, class from_t, class to_t>
void convert_row_plus(const from_t* from, from_t bias, to_t* to, int64_t count);
// to[i] = from[i] + bias[i], converted.
template <int capability, class from_t, class to_t>
void convert_row_plus_row(const from_t* from, const from_t* bias, to_t* to, int64_t count);
// to[p][i] = (even[p][i], odd[p][i]) for `count` elements: rows of a matrix, every other one of
// which is `ld` further on, as one of pairs.
template <int capability, class T>
void pair_rows(const T* even, const T* odd, int64_t ld, int64_t pairs, T* to, int64_t count);
// `count` elements of each run, one run after the other, and `pad` zeros, for each of `times`
// pixels; then the runs begin `step` further on. Returns where the next pixel goes. May read and
// write kRunSlack elements more than these.
constexpr int64_t kRunSlack = 64;
template <int capability, class T>
T* copy_runs(const T* const* runs, int64_t number, int64_t count, int64_t pad, int64_t step,
             int64_t times, T* to);
// Whether none of them is infinite or NaN.
template <int capability, class T>
bool all_finite(const T* values, int64_t count);
// from[i] = high[i] + low[i] but for 2^-17 of it: the nearest bfloat16 number, and the one nearest
// to what that leaves. Whether all of them have such parts: infinite numbers and NaN have none.
template <int capability>
bool split_row(const float* from, c10::BFloat16* high, c10::BFloat16* low, int64_t count);
// sum[i] += from[i].
template <int capability, class from_t, class sum_t>
void add_row(const from_t* from, sum_t* sum, int64_t count);
// sum[j] = the sum of from[i][j] over the rows, in their order; rows of `count` elements.
template <int capability, class from_t, class sum_t>
void sum_rows(const from_t* from, int64_t rows, int64_t count, sum_t* sum);
// The sum of count values, in a fixed order.
template <int capability, class from_t, class sum_t>
sum_t sum_row(const from_t* from, int64_t count);

}  // namespace dlops::cpu
