#include "cpu/conv2d_few_pixels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "cpu/conv2d_correlation.h"
#include "cpu/conv2d_panels.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"

namespace dlops::cpu {
namespace {

// What the columns of the batch may take, in elements; and how many pixels are few.
constexpr int64_t kColumns = 512 * 1024, kFewPixels = 64;

// Whether a weight of `outputs` rows of K elements is large beside the columns of P pixels.
bool pays(int64_t P, int64_t K, int64_t outputs, at::ScalarType dtype) {
  return (dtype == at::kFloat || dtype == at::kDouble) && P <= kFewPixels && P * K <= kColumns &&
         outputs >= 64 && outputs * K >= 256 * P;
}

// ------------------------------------------------------------------------------------ forward

// The products have the weight, where it is, as the left matrix, and for each tap the pixels that
// it meets as the right one, with zeros where it meets none.
template <class scalar_t>
class FewPixels {
 public:
  FewPixels(const Correlation& k, const ImageView<scalar_t>& input, const at::Tensor& weight,
            const scalar_t* bias, scalar_t* output)
      : k_(k), input_(input), bias_(bias), output_(output) {
    const int64_t C = weight.size(1), cells = weight.size(2) * weight.size(3);
    last_ = !weight.is_contiguous();
    weight_ = weight.const_data_ptr<scalar_t>();
    cell_ = last_ ? C : 1;
    strides_ = {
        .lda = C * cells, .ldb = ceil_div(pixels(), kLanes) * kLanes, .step = last_ ? 1 : cells};
  }

  void run(const at::TensorOptions& options) {
    const std::vector<Tap> taps = taps_in_order();
    const int64_t rows = static_cast<int64_t>(taps.size()) * k_.in_channels, ld = strides_.ldb;
    const at::Tensor columns = at::empty({rows * ld + kPadding}, options);
    scalar_t* data = columns.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, grain(ld), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        fill_row(taps[static_cast<size_t>(i / k_.in_channels)], i % k_.in_channels, data + i * ld);
    });
    const int64_t blocks = ceil_div(k_.out_channels, block());
    at::parallel_for(0, blocks, grain(block() * ld * rows), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<scalar_t>(block() * ld));
      scalar_t* sums = scratch.take<scalar_t>(block() * ld);
      for (int64_t i = begin; i < end; ++i) compute(taps, i * block(), data, sums);
    });
  }

 private:
  static constexpr int64_t kLanes = 16;
  struct Tap {
    int64_t row, col, cell;
  };

  const Phase& phase() const { return k_.phases[0]; }
  int64_t pixels() const { return k_.images * k_.H_out * k_.W_out; }
  // Outputs at a time. The cells of a contiguous weight share cache lines: those of so few outputs
  // stay in a second-level cache from one cell to the next.
  int64_t block() const { return last_ ? 64 : 24; }

  // In the order in which strips add them.
  std::vector<Tap> taps_in_order() const {
    const TapAxis &rows = phase().rows, &cols = phase().cols;
    std::vector<Tap> result;
    for (const Interval& run : adjacent_taps(cols, /*joined=*/true))
      for (int64_t i = 0; i < rows.taps(); ++i)
        for (int64_t j = run.begin; j < run.end; ++j)
          result.push_back({i, j, rows.cell(i) * k_.kernel_cols + cols.cell(j)});
    return result;
  }

  // What the pixels meet at a tap in one channel.
  void fill_row(const Tap& tap, int64_t channel, scalar_t* to) const {
    const TapAxis &rows = phase().rows, &cols = phase().cols;
    const Interval y = rows.inside(tap.row), x = cols.inside(tap.col);
    std::fill_n(to, strides_.ldb, scalar_t(0));
    for (int64_t n = 0; n < k_.images; ++n, to += k_.H_out * k_.W_out) {
      for (int64_t row = y.begin; row < y.end; ++row) {
        const scalar_t* from = input_.at(n, channel, row * rows.step + rows.offset(tap.row), 0);
        for (int64_t col = x.begin; col < x.end; ++col)
          to[row * k_.W_out + col] =
              from[(col * cols.step + cols.offset(tap.col)) * input_.pixel()];
      }
    }
  }

  void compute(const std::vector<Tap>& taps, int64_t first, const scalar_t* columns,
               scalar_t* sums) const {
    const int64_t count = std::min(block(), k_.out_channels - first), ld = strides_.ldb;
    for (int64_t i = 0; i < count; ++i)
      std::fill_n(sums + i * ld, ld, bias_ == nullptr ? scalar_t(0) : bias_[first + i]);
    std::vector<Factors<scalar_t>> factors;
    for (const Tap& tap : taps) {
      factors.push_back({weight_ + first * strides_.lda + tap.cell * cell_, columns});
      columns += k_.in_channels * ld;
    }
    matmul_of_factors(count, pixels(), k_.in_channels, factors.data(),
                      static_cast<int64_t>(factors.size()), strides_, sums, ld,
                      Addend<scalar_t>{sums, ld});
    for (int64_t i = 0; i < count; ++i) store(first + i, sums + i * ld);
  }

  void store(int64_t channel, const scalar_t* from) const {
    const int64_t plane = k_.H_out * k_.W_out, step = input_.last ? k_.out_channels : 1;
    scalar_t* to = output_ + channel * (input_.last ? 1 : plane);
    for (int64_t n = 0; n < k_.images; ++n, to += k_.out_channels * plane)
      for (int64_t i = 0; i < plane; ++i) to[i * step] = *from++;
  }

  const Correlation& k_;
  const ImageView<scalar_t> input_;
  const scalar_t *weight_, *bias_;
  scalar_t* output_;
  bool last_;
  int64_t cell_;  // from one of the kernel's cells to the next
  FactorStrides strides_;
};

// ---------------------------------------------------------------------- gradient of the weight

constexpr int64_t kOutputs = 64;  // of a task

// The columns of all pixels as a P x K matrix, K ordered as in the weight's memory.
template <class scalar_t, bool last>
at::Tensor columns_of(const Conv2dGeometry& g, int64_t group, const scalar_t* input,
                      const at::TensorOptions& options) {
  const int64_t P = g.N * g.output_pixels(), K = g.column_rows(), cells = g.R * g.S;
  const int64_t c0 = group * g.channels_per_group();
  at::Tensor columns = at::empty({P, K}, options);
  scalar_t* to = columns.mutable_data_ptr<scalar_t>();
  if constexpr (last) {
    at::parallel_for(0, P, grain(K), [&](int64_t begin, int64_t end) {
      const ColumnBlock block{c0, c0 + g.channels_per_group(), begin, end};
      DLOPS_SIMD(fill_columns_last, scalar_t, scalar_t)(g, block, input, to + begin * K, K);
    });
  } else {
    constexpr int64_t kChannels = 8;
    const int64_t blocks = ceil_div(g.channels_per_group(), kChannels);
    at::parallel_for(0, blocks, grain(kChannels * cells * P), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<scalar_t>(kChannels * cells * P));
      scalar_t* rows = scratch.take<scalar_t>(kChannels * cells * P);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * kChannels;
        const int64_t count = std::min(kChannels, g.channels_per_group() - first);
        const ColumnBlock block{c0 + first, c0 + first + count, 0, P};
        DLOPS_SIMD(fill_columns, scalar_t, scalar_t)(g, block, input, rows, P);
        DLOPS_SIMD(transpose, scalar_t, scalar_t)(rows, P, count * cells, P, to + first * cells, K);
      }
    });
  }
  return columns;
}

template <class scalar_t, bool last>
void multiply(const Conv2dGeometry& g, const scalar_t* grad_output, const at::Tensor& input,
              scalar_t* grad_weight) {
  const Panels<scalar_t, last> panels{g};
  const int64_t P = g.N * g.output_pixels(), K = g.column_rows(), Og = g.outputs_per_group();
  const int64_t blocks = ceil_div(Og, kOutputs);
  for (int64_t group = 0; group < g.groups; ++group) {
    const at::Tensor columns =
        columns_of<scalar_t, last>(g, group, input.const_data_ptr<scalar_t>(), input.options());
    const scalar_t* b = columns.const_data_ptr<scalar_t>();
    at::parallel_for(0, blocks, grain(kOutputs * P * K), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<scalar_t>(Og * P));
      scalar_t* space = scratch.take<scalar_t>(Og * P);
      const Matrix<scalar_t> grad =
          last ? panels.outputs_transposed(grad_output, group, {0, g.N * g.output_pixels()}, space)
               : panels.outputs(grad_output, group, {0, P}, space);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t o = i * kOutputs, count = std::min(kOutputs, Og - o);
        matmul(count, K, P, grad.data + o * grad.ld, grad.ld, b, K,
               grad_weight + (group * Og + o) * K, K, false);
      }
    });
  }
}

}  // namespace

bool few_pixels_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                        const at::Tensor& bias, const at::Tensor& output, at::MemoryFormat format) {
  // Below that, bringing the weight into order costs little.
  constexpr int64_t kLargeWeight = 512 * 1024;
  if (g.O * g.column_rows() < kLargeWeight) return false;
  // Strips sum up kTerms terms at a time: those must be channels of one tap.
  if (g.groups != 1 || g.C % kTerms != 0) return false;
  if (!pays(g.N * g.output_pixels(), g.column_rows(), g.O, input.scalar_type())) return false;
  if (!weight.is_contiguous() && !weight.is_contiguous(at::MemoryFormat::ChannelsLast))
    return false;
  return AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv2d", [&] {
    const Correlation k = forward_correlation(g, /*copied=*/false);
    const ImageView<scalar_t> images{input.const_data_ptr<scalar_t>(), g.C, g.H, g.W,
                                     format == at::MemoryFormat::ChannelsLast};
    const scalar_t* bias_data = bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* to = output.mutable_data_ptr<scalar_t>();
    FewPixels<scalar_t>(k, images, weight, bias_data, to).run(input.options());
    return DLOPS_SIMD(all_finite, scalar_t)(to, output.numel());
  });
}

bool few_pixels_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                            const at::Tensor& input, const at::Tensor& grad_weight,
                            at::MemoryFormat format) {
  if (!pays(g.N * g.output_pixels(), g.column_rows(), g.outputs_per_group(), input.scalar_type()))
    return false;
  return AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv2d_grad_weight", [&] {
    const scalar_t* grad = grad_output.const_data_ptr<scalar_t>();
    if (!DLOPS_SIMD(all_finite, scalar_t)(grad, grad_output.numel())) return false;
    scalar_t* to = grad_weight.mutable_data_ptr<scalar_t>();
    if (format == at::MemoryFormat::ChannelsLast) {
      multiply<scalar_t, true>(g, grad, input, to);
    } else {
      multiply<scalar_t, false>(g, grad, input, to);
    }
    return true;
  });
}

}  // namespace dlops::cpu
