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

// --------------------------------------------------------------- forward, gradient of the input

// One correlation. Its products have the weight, where it is, as the left matrix, and for each tap
// the pixels that it meets as the right one, with zeros where it meets none.
template <class scalar_t>
class FewPixels {
 public:
  FewPixels(const Correlation& k, const ImageView<scalar_t>& source, const at::Tensor& weight,
            const scalar_t* bias, scalar_t* result)
      : k_(k), source_(source), bias_(bias), result_(result) {
    const int64_t C = weight.size(1), cells = weight.size(2) * weight.size(3);
    last_ = !weight.is_contiguous();
    weight_ = weight.const_data_ptr<scalar_t>();
    cell_ = last_ ? C : 1;
    const int64_t channel = last_ ? 1 : cells;
    strides_ = {.lda = k.from_outputs ? channel : C * cells,
                .ldb = 0,
                .step = k.from_outputs ? C * cells : channel};
  }

  static int64_t pixels(const Correlation& k, const Phase& phase) {
    return k.images * phase.rows.outputs * phase.cols.outputs;
  }

  void run(const at::TensorOptions& options) {
    for (const Phase& phase : k_.phases) {
      const int64_t P = pixels(k_, phase), ld = ceil_div(P, kLanes) * kLanes;
      if (P == 0) continue;
      const std::vector<Tap> taps = taps_of(phase);
      const int64_t count = static_cast<int64_t>(taps.size()), channels = k_.in_channels;
      const at::Tensor columns = at::empty({count * channels * ld + kPadding}, options);
      scalar_t* data = columns.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, count * channels, grain(ld), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          fill_row(phase, taps[static_cast<size_t>(i / channels)], i % channels, data + i * ld, ld);
      });
      const int64_t blocks = ceil_div(k_.out_channels, kRows);
      at::parallel_for(0, blocks, grain(kRows * P * count * channels),
                       [&](int64_t begin, int64_t end) {
                         Scratch scratch(Scratch::size<scalar_t>(kRows * ld));
                         scalar_t* sums = scratch.take<scalar_t>(kRows * ld);
                         for (int64_t i = begin; i < end; ++i)
                           compute(phase, taps, i * kRows, data, ld, sums);
                       });
    }
  }

 private:
  // A contiguous weight's rows stay in the second-level cache from one of its cells to the next.
  static constexpr int64_t kRows = 24, kLanes = 16;
  struct Tap {
    int64_t row, col, cell;
  };

  // In the order in which strips add them.
  std::vector<Tap> taps_of(const Phase& phase) const {
    std::vector<Tap> result;
    for (const Interval& run : adjacent_taps(phase.cols, /*joined=*/true))
      for (int64_t i = 0; i < phase.rows.taps(); ++i)
        for (int64_t j = run.begin; j < run.end; ++j)
          result.push_back({i, j, phase.rows.cell(i) * k_.kernel_cols + phase.cols.cell(j)});
    return result;
  }

  // What the phase's pixels meet at a tap in one channel.
  void fill_row(const Phase& phase, const Tap& tap, int64_t channel, scalar_t* to,
                int64_t count) const {
    const TapAxis &rows = phase.rows, &cols = phase.cols;
    const Interval y = rows.inside(tap.row), x = cols.inside(tap.col);
    std::fill_n(to, count, scalar_t(0));
    for (int64_t n = 0; n < k_.images; ++n, to += rows.outputs * cols.outputs) {
      for (int64_t row = y.begin; row < y.end; ++row) {
        const scalar_t* from = source_.at(n, channel, row * rows.step + rows.offset(tap.row), 0);
        for (int64_t col = x.begin; col < x.end; ++col)
          to[row * cols.outputs + col] =
              from[(col * cols.step + cols.offset(tap.col)) * source_.pixel()];
      }
    }
  }

  void compute(const Phase& phase, const std::vector<Tap>& taps, int64_t first,
               const scalar_t* columns, int64_t ld, scalar_t* sums) const {
    const int64_t count = std::min(kRows, k_.out_channels - first);
    for (int64_t i = 0; i < count; ++i)
      std::fill_n(sums + i * ld, ld, bias_ == nullptr ? scalar_t(0) : bias_[first + i]);
    std::vector<Factors<scalar_t>> factors;
    const scalar_t* rows = weight_ + first * strides_.lda;
    for (const Tap& tap : taps) {
      factors.push_back({rows + tap.cell * cell_, columns});
      columns += k_.in_channels * ld;
    }
    FactorStrides strides = strides_;
    strides.ldb = ld;
    matmul_of_factors(count, pixels(k_, phase), k_.in_channels, factors.data(),
                      static_cast<int64_t>(factors.size()), strides, sums, ld,
                      Addend<scalar_t>{sums, ld});
    for (int64_t i = 0; i < count; ++i) store(phase, first + i, sums + i * ld);
  }

  void store(const Phase& phase, int64_t channel, const scalar_t* from) const {
    const int64_t pixel = source_.last ? k_.out_channels : 1;
    for (int64_t n = 0; n < k_.images; ++n) {
      scalar_t* image = result_ + n * k_.out_channels * k_.H_out * k_.W_out +
                        channel * (source_.last ? 1 : k_.H_out * k_.W_out);
      for (int64_t y = 0; y < phase.rows.outputs; ++y) {
        scalar_t* row = image + ((phase.row0 + y * k_.row_step) * k_.W_out + phase.col0) * pixel;
        for (int64_t x = 0; x < phase.cols.outputs; ++x) row[x * k_.col_step * pixel] = *from++;
      }
    }
  }

  const Correlation& k_;
  const ImageView<scalar_t> source_;
  const scalar_t *weight_, *bias_;
  scalar_t* result_;
  bool last_;
  int64_t cell_;  // from one of the kernel's cells to the next
  FactorStrides strides_;
};

// Strips sum up kTerms terms at a time: those are channels of one tap, or the order is another.
bool takes(const Correlation& k, const at::Tensor& source, const at::Tensor& weight) {
  if (k.groups != 1 || k.in_channels % kTerms != 0) return false;
  if (!weight.is_contiguous() && !weight.is_contiguous(at::MemoryFormat::ChannelsLast))
    return false;
  int64_t P = 0;
  for (const Phase& phase : k.phases) P = std::max(P, FewPixels<float>::pixels(k, phase));
  return pays(P, k.taps * k.in_channels, k.out_channels, source.scalar_type());
}

bool correlate(const Correlation& k, const at::Tensor& source, const at::Tensor& weight,
               const at::Tensor& bias, const at::Tensor& result, at::MemoryFormat format) {
  if (!takes(k, source, weight)) return false;
  return AT_DISPATCH_FLOATING_TYPES(source.scalar_type(), "conv2d", [&] {
    const ImageView<scalar_t> images{source.const_data_ptr<scalar_t>(), source.size(1),
                                     source.size(2), source.size(3),
                                     format == at::MemoryFormat::ChannelsLast};
    const scalar_t* bias_data = bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* to = result.mutable_data_ptr<scalar_t>();
    FewPixels<scalar_t>(k, images, weight, bias_data, to).run(source.options());
    return DLOPS_SIMD(all_finite, scalar_t)(to, result.numel());
  });
}

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
  return correlate(forward_correlation(g, /*copied=*/false), input, weight, bias, output, format);
}

bool few_pixels_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                           const at::Tensor& weight, const at::Tensor& grad_input,
                           at::MemoryFormat format) {
  return correlate(backward_correlation(g), grad_output, weight, {}, grad_input, format);
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
