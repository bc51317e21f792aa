#include "cpu/conv2d_rows.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/capability.h"
#include "cpu/conv2d_row_strips.h"
#include "cpu/conv2d_taps.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {
namespace {

// Elements of a strip, which then leaves a first-level cache room for the weights.
constexpr int64_t kStrip = 4 * 1024;
// Elements of results that are turned round together: while one tile is stored, the next one's
// products begin.
constexpr int64_t kTile = 4 * 1024;
// Lanes of a vector at most; of those that a row takes, so many of 16 must be filled.
constexpr int64_t kLanes = 16, kFilled = 12;

int64_t lanes_taken(int64_t elements) { return ceil_div(elements, kLanes) * kLanes; }
bool fills_vectors(int64_t elements) {
  return elements * kLanes >= lanes_taken(elements) * kFilled;
}

// Whether a vector's lanes are channels and not pixels: where they fill vectors better, or pixels
// are no rows. One vector of channels would use each pixel only once.
bool by_channels(const Conv2dGeometry& g) {
  const int64_t Og = g.outputs_per_group();
  if (Og <= kLanes || !fills_vectors(Og)) return false;
  return g.stride_w != 1 || Og * lanes_taken(g.OW) >= g.OW * lanes_taken(Og);
}

// The products of the first row of outputs, one for each kernel row of each channel:
// factor(the kernel row's place in the weight, its row's in the strip).
template <class T, class F>
std::vector<Factors<T>> factors_of(const Conv2dGeometry& g, const RowStrip& layout,
                                   const F& factor) {
  std::vector<Factors<T>> result;
  for (int64_t c = 0; c < g.channels_per_group(); ++c)
    for (int64_t r = 0; r < g.R; ++r)
      result.push_back(
          factor((c * g.R + r) * g.S, (c * layout.rows + r * g.dilation_h) * layout.row));
  return result;
}

// Calls f(image and group, rows of outputs, their strip of the image, `more` elements of working
// memory) in parallel.
template <class T, class F>
void for_each_strip(const Conv2dGeometry& g, const RowStrip& layout, int64_t rows, const T* input,
                    int64_t more, const F& f) {
  const int64_t Cg = g.channels_per_group(), strips = ceil_div(g.OH, rows);
  const int64_t size = Cg * layout.plane() + kPadding;
  const int64_t work = rows * g.OW * g.outputs_per_group() * g.column_rows();
  at::parallel_for(0, g.N * g.groups * strips, grain(work), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::size<T>(size) + Scratch::size<T>(more));
    T* strip = scratch.take<T>(size);
    T* space = scratch.take<T>(more);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / strips, y0 = task % strips * rows;
      for (int64_t c = 0; c < Cg; ++c)
        fill_plane(g, layout, input + (part * Cg + c) * g.H * g.W, y0, strip + c * layout.plane(),
                   layout.row);
      f(part, Interval{y0, std::min(g.OH, y0 + rows)}, static_cast<const T*>(strip), space);
    }
  });
}

// A product for each row of outputs: of the weight, and pixels side by side.
template <class T>
void forward_by_pixels(const Conv2dGeometry& g, const T* input, const T* weights, const T* biases,
                       T* output) {
  const int64_t Og = g.outputs_per_group(), K = g.column_rows();
  const int64_t rows = strip_rows(g, kStrip);
  const RowStrip layout(g, rows);
  const FactorStrides strides{.lda = K, .ldb = g.dilation_w};
  const auto product = DLOPS_SIMD(matmul_in_order, T);
  for_each_strip(g, layout, rows, input, 0, [&](int64_t part, Interval ys, const T* strip, T*) {
    const int64_t group = part % g.groups;
    const T* weight = weights + group * Og * K;
    const T* bias = biases == nullptr ? nullptr : biases + group * Og;
    std::vector<Factors<T>> factors = factors_of<T>(g, layout, [&](int64_t w, int64_t pixels) {
      return Factors<T>{weight + w, strip + pixels};
    });
    for (int64_t y = ys.begin; y < ys.end; ++y) {
      product(Og, g.OW, g.S, factors.data(), static_cast<int64_t>(factors.size()), strides,
              output + (part * Og * g.OH + y) * g.OW, g.OH * g.OW, {}, bias);
      for (Factors<T>& factor : factors) factor.b += g.stride_h * layout.row;
    }
  });
}

// Asks for the places of a row of outputs in all channels, while its product is worked out: they
// are so many and so short that no machine foresees them.
template <class T>
void prefetch_row(const Conv2dGeometry& g, T* first) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t o = 0; o < g.outputs_per_group(); ++o, first += g.OH * g.OW)
    for (int64_t x = 0; x < g.OW; x += kLine) __builtin_prefetch(first + x, /*for writing*/ 1);
}

// The same of pixels, one below the other, and the weight turned round; so are the results, some
// rows at a time.
template <class T>
void forward_by_channels(const Conv2dGeometry& g, const T* input, const T* weights, const T* biases,
                         T* output) {
  const int64_t Og = g.outputs_per_group(), K = g.column_rows(), row = g.OW * Og;
  const int64_t rows = strip_rows(g, kStrip), together = std::clamp<int64_t>(kTile / row, 1, rows);
  const RowStrip layout(g, rows);
  const FactorStrides strides{.lda = g.stride_w, .ldb = Og, .step = g.dilation_w};
  const auto product = DLOPS_SIMD(matmul_in_order, T);
  const auto turn = DLOPS_SIMD(transpose, T, T);
  const auto turned = std::make_unique_for_overwrite<T[]>(g.groups * K * Og + kPadding);
  for (int64_t group = 0; group < g.groups; ++group)
    turn(weights + group * Og * K, K, Og, K, turned.get() + group * K * Og, Og);
  for_each_strip(g, layout, rows, input, together * row,
                 [&](int64_t part, Interval ys, const T* strip, T* tile) {
                   const int64_t group = part % g.groups;
                   const T* weight = turned.get() + group * K * Og;
                   Addend<T> bias;
                   if (biases != nullptr) bias.data = biases + group * Og;
                   std::vector<Factors<T>> factors =
                       factors_of<T>(g, layout, [&](int64_t w, int64_t pixels) {
                         return Factors<T>{strip + pixels, weight + w * Og};
                       });
                   for (int64_t y = ys.begin, count; y < ys.end; y += count) {
                     count = std::min(together, ys.end - y);
                     T* const to = output + (part * Og * g.OH + y) * g.OW;
                     for (int64_t i = 0; i < count; ++i) {
                       prefetch_row(g, to + i * g.OW);
                       product(g.OW, Og, g.S, factors.data(), static_cast<int64_t>(factors.size()),
                               strides, tile + i * row, Og, bias, nullptr);
                       for (Factors<T>& factor : factors) factor.a += g.stride_h * layout.row;
                     }
                     turn(tile, Og, count * g.OW, Og, to, g.OH * g.OW);
                   }
                 });
}

}  // namespace

bool takes_rows(const Conv2dGeometry& g, at::ScalarType dtype) {
  // Of one row of outputs: the rest of a strip is a few times as much.
  constexpr int64_t kLongest = 4 * kStrip, kStride = 4;
  if (g.stride_w > kStride || g.stride_h > kStride) return false;
  if ((dtype != at::kFloat && dtype != at::kDouble) || !has_few_channels(g)) return false;
  if (!by_channels(g) && (g.stride_w != 1 || !fills_vectors(g.OW))) return false;
  const RowStrip one(g, 1);
  return one.rows <= kLongest && one.row <= kLongest &&
         g.channels_per_group() * one.rows * one.row <= kLongest;
}

void rows_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                  const at::Tensor& bias, const at::Tensor& output) {
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv2d", [&] {
    const auto forward =
        by_channels(g) ? forward_by_channels<scalar_t> : forward_by_pixels<scalar_t>;
    forward(g, input.const_data_ptr<scalar_t>(), weight.const_data_ptr<scalar_t>(),
            bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr,
            output.mutable_data_ptr<scalar_t>());
  });
}

}  // namespace dlops::cpu
