// The gradient of the weight from contiguous images of few channels, without im2col:
//
//   grad_weight[o, (s, r, c)] += sum over x of grad_output[o, y, x] * cells[y][x + s, (r, c)]
//
// where cells[y] has, for each column, the pixels of all kernel rows and channels that output row y
// meets there. What lies under a window is then a row of the right matrix, and these rows overlap;
// the left matrix is grad_output itself.
#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <vector>

#include "cpu/capability.h"
#include "cpu/conv2d_row_strips.h"
#include "cpu/conv2d_rows.h"
#include "cpu/conv2d_taps.h"
#include "cpu/conv2d_weight_tasks.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d.h"
#include "cpu/simd/transpose.h"
#include "cpu/sums.h"

namespace dlops::cpu {
namespace {

// What the cells of a strip may take, in elements, within a second-level cache.
constexpr int64_t kCells = 32 * 1024;

// Of a row of outputs.
int64_t cells_of_row(const Conv2dGeometry& g) {
  return RowStrip(g, 1).row * g.channels_per_group() * g.R;
}

template <class T>
class RowsGradWeight {
 public:
  RowsGradWeight(const Conv2dGeometry& g, const T* grad_output, const T* input)
      : g_(g),
        rows_(ceil_div(g.OH, ceil_div(g.OH, std::max<int64_t>(1, kCells / cells_of_row(g))))),
        strip_(g, rows_),
        tasks_(g, g.N * strips(), g.O * g.column_rows()),
        grad_(grad_output),
        input_(input) {}

  void run(const at::Tensor& grad_weight) {
    const int64_t size = g_.O * g_.column_rows(), Cg = g_.channels_per_group();
    const at::Tensor sums = at::empty({tasks_.chunks(), size}, grad_weight.options());
    T* const data = sums.mutable_data_ptr<T>();
    tasks_.fill([&](const auto& each) {
      const int64_t strip = Cg * strip_.plane() + kRunSlack;
      const int64_t cells = rows_ * cells_of_row(g_) + std::max(kRunSlack, kPadding);
      Scratch scratch(2 * Scratch::size<T>(strip) + Scratch::size<T>(cells));
      T* const strip_space = scratch.take<T>(strip);
      T* const turned_space = scratch.take<T>(strip);
      T* const cell_space = scratch.take<T>(cells);
      each([&](int64_t chunk, int64_t group, int64_t unit, Interval blocks, bool first) {
        const int64_t n = unit / strips(), y = unit % strips() * rows_;
        fill(n, group, y, strip_space, turned_space, cell_space);
        multiply(n, group, {y, std::min(g_.OH, y + rows_)}, blocks, cell_space,
                 data + chunk * size + group * g_.outputs_per_group() * g_.column_rows(), first);
      });
    });
    add_chunks<T>(sums);
    grad_weight.copy_(sums.select(0, 0).view({g_.O, g_.S, g_.R, Cg}).permute({0, 3, 2, 1}));
  }

 private:
  int64_t strips() const { return ceil_div(g_.OH, rows_); }

  // The strip as [row][channel][column], turned to [column][row][channel], whose runs are copied.
  void fill(int64_t n, int64_t group, int64_t y, T* strip, T* turned, T* cells) const {
    const int64_t Cg = g_.channels_per_group(), height = strip_.rows * Cg;
    const T* const images = input_ + (n * g_.C + group * Cg) * g_.H * g_.W;
    for (int64_t c = 0; c < Cg; ++c)
      fill_plane(g_, strip_, images + c * g_.H * g_.W, y, strip + c * strip_.row, Cg * strip_.row);
    DLOPS_SIMD(transpose, T, T)(strip, strip_.row, height, strip_.row, turned, height);
    const auto copy = DLOPS_SIMD(copy_runs, T);
    const bool adjacent = g_.dilation_h == 1;  // kernel rows
    std::vector<const T*> runs(static_cast<size_t>(adjacent ? 1 : g_.R));
    for (int64_t row = 0; row < std::min(rows_, g_.OH - y); ++row) {
      for (size_t r = 0; r < runs.size(); ++r)
        runs[r] = turned + (row * g_.stride_h + static_cast<int64_t>(r) * g_.dilation_h) * Cg;
      copy(runs.data(), static_cast<int64_t>(runs.size()), adjacent ? g_.R * Cg : Cg, 0, height,
           strip_.row, cells + row * cells_of_row(g_));
    }
  }

  void multiply(int64_t n, int64_t group, Interval y, Interval blocks, const T* cells, T* sums,
                bool first) const {
    const int64_t K = g_.column_rows(), plane = g_.output_pixels();
    const T* const grad = grad_ + (n * g_.O + group * g_.outputs_per_group()) * plane;
    std::vector<Factors<T>> factors;
    for (int64_t row = y.begin; row < y.end; ++row)
      factors.push_back({grad + row * g_.OW, cells + (row - y.begin) * cells_of_row(g_)});
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t o = block * WeightTasks::kBlock;
      T* const to = sums + o * K;
      matmul_of_factors(
          tasks_.width(block), K, g_.OW, factors.data(), length(y),
          {.lda = plane, .ldb = g_.stride_w * g_.channels_per_group() * g_.R, .shift = o * plane},
          to, K, first ? Addend<T>{} : Addend<T>{to, K});
    }
  }

  const Conv2dGeometry& g_;
  int64_t rows_;  // of outputs, in a strip
  RowStrip strip_;
  WeightTasks tasks_;
  const T *grad_, *input_;
};

}  // namespace

bool takes_rows_grad_weight(const Conv2dGeometry& g, at::ScalarType dtype) {
  constexpr int64_t kLeastSums = 8;  // vectors of a product that hide its latency
  constexpr int64_t kStride = 4;     // past that, most of what is copied meets nothing
  if ((dtype != at::kFloat && dtype != at::kDouble) || !has_few_channels(g)) return false;
  return g.dilation_w == 1 && std::max(g.stride_h, g.stride_w) <= kStride &&
         g.outputs_per_group() * ceil_div(g.column_rows(), 16) >= kLeastSums &&
         cells_of_row(g) <= kCells && g.channels_per_group() * RowStrip(g, 1).plane() <= kCells;
}

void rows_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                      const at::Tensor& input, const at::Tensor& grad_weight) {
  AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv2d_grad_weight", [&] {
    RowsGradWeight<scalar_t>(g, grad_output.const_data_ptr<scalar_t>(),
                             input.const_data_ptr<scalar_t>())
        .run(grad_weight);
  });
}

}  // namespace dlops::cpu
