#include "cpu/conv2d_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/capability.h"
#include "cpu/conv2d_row_strips.h"
#include "cpu/conv2d_taps.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"

namespace dlops::cpu {
namespace {

// Elements of a strip, which then leaves a first-level cache room for the weights.
constexpr int64_t kStrip = 4 * 1024;
// Lanes of a vector at most; of those that a row of outputs takes, so many of 16 must be filled.
constexpr int64_t kLanes = 16, kFilled = 12;

// The products of the first row of outputs, one for each kernel row of each channel.
template <class T>
std::vector<Factors<T>> factors_of(const Conv2dGeometry& g, const RowStrip& strip, const T* weight,
                                   const T* rows) {
  std::vector<Factors<T>> result;
  for (int64_t c = 0; c < g.channels_per_group(); ++c)
    for (int64_t r = 0; r < g.R; ++r)
      result.push_back(
          {weight + (c * g.R + r) * g.S, rows + (c * strip.rows + r * g.dilation_h) * strip.row});
  return result;
}

template <class T>
void forward(const Conv2dGeometry& g, const T* input, const T* weight, const T* bias, T* output) {
  const int64_t Cg = g.channels_per_group(), Og = g.outputs_per_group(), K = g.column_rows();
  const int64_t rows = strip_rows(g, kStrip), strips = ceil_div(g.OH, rows);
  const RowStrip layout(g, rows);
  const FactorStrides strides{.lda = K, .ldb = g.dilation_w};
  const auto product = DLOPS_SIMD(matmul_in_order, T);
  at::parallel_for(
      0, g.N * g.groups * strips, grain(rows * g.OW * Og * K), [&](int64_t begin, int64_t end) {
        Scratch scratch(Scratch::size<T>(Cg * layout.plane() + kPadding));
        T* space = scratch.take<T>(Cg * layout.plane() + kPadding);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t y0 = task % strips * rows, part = task / strips;  // of an image
          const int64_t group = part % g.groups;
          for (int64_t c = 0; c < Cg; ++c)
            fill_plane(g, layout, input + (part * Cg + c) * g.H * g.W, y0,
                       space + c * layout.plane(), layout.row);
          std::vector<Factors<T>> factors =
              factors_of(g, layout, weight + group * Og * K, static_cast<const T*>(space));
          for (int64_t y = y0; y < std::min(g.OH, y0 + rows); ++y) {
            product(Og, g.OW, g.S, factors.data(), static_cast<int64_t>(factors.size()), strides,
                    output + (part * Og * g.OH + y) * g.OW, g.OH * g.OW, {},
                    bias == nullptr ? nullptr : bias + group * Og);
            for (Factors<T>& factor : factors) factor.b += g.stride_h * layout.row;
          }
        }
      });
}

}  // namespace

bool takes_rows(const Conv2dGeometry& g, at::ScalarType dtype) {
  // Of one row of outputs: the rest of a strip is a few times as much.
  constexpr int64_t kLongest = 4 * kStrip, kStride = 4;
  if (g.stride_w != 1 || g.stride_h > kStride) return false;
  if ((dtype != at::kFloat && dtype != at::kDouble) || !has_few_channels(g)) return false;
  if (g.OW * kLanes < ceil_div(g.OW, kLanes) * kLanes * kFilled) return false;
  const RowStrip one(g, 1);
  return one.rows <= kLongest && one.row <= kLongest &&
         g.channels_per_group() * one.rows * one.row <= kLongest;
}

void rows_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                  const at::Tensor& bias, const at::Tensor& output) {
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv2d", [&] {
    forward(g, input.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(),
            bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr,
            output.mutable_data_ptr<scalar_t>());
  });
}

}  // namespace dlops::cpu
