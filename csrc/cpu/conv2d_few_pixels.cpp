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

// The columns of all pixels of a group, K ordered as in the images' memory: a P x K matrix or,
// `transposed`, K x P. `ld` is the distance between rows.
template <class scalar_t, bool last, bool transposed>
at::Tensor columns_of(const Conv2dGeometry& g, int64_t group, const scalar_t* input, int64_t ld,
                      const at::TensorOptions& options) {
  // im2col makes rows of pixels (channels_last) or of the kernel's cells, for some pixels or
  // channels at a time, which are turned round where the others are wanted.
  constexpr int64_t kSome = 8;
  constexpr bool turned = last == transposed;
  const int64_t P = g.N * g.output_pixels(), K = g.column_rows();
  const int64_t c0 = group * g.channels_per_group(), c1 = c0 + g.channels_per_group();
  const int64_t count = last ? P : c1 - c0, each = last ? 1 : g.R * g.S, row = last ? K : P;
  at::Tensor columns = at::empty({(transposed ? K : P) * ld + kPadding}, options);
  scalar_t* const to = columns.mutable_data_ptr<scalar_t>();
  at::parallel_for(
      0, ceil_div(count, kSome), grain(kSome * each * row), [&](int64_t begin, int64_t end) {
        Scratch scratch(Scratch::size<scalar_t>(turned ? kSome * each * row : 0));
        scalar_t* const space = scratch.take<scalar_t>(turned ? kSome * each * row : 0);
        for (int64_t first = begin * kSome; first < std::min(count, end * kSome); first += kSome) {
          const int64_t some = std::min(kSome, count - first);
          scalar_t* const rows = turned ? space : to + first * each * ld;
          const int64_t rows_ld = turned ? row : ld;
          if constexpr (last) {
            const ColumnBlock block{c0, c1, first, first + some};
            DLOPS_SIMD(fill_columns_last, scalar_t, scalar_t)(g, block, input, rows, rows_ld);
          } else {
            const ColumnBlock block{c0 + first, c0 + first + some, 0, P};
            DLOPS_SIMD(fill_columns, scalar_t, scalar_t)(g, block, input, rows, rows_ld);
          }
          if constexpr (turned) DLOPS_SIMD(transpose, scalar_t, scalar_t)
          (rows, row, some * each, row, to + first * each, ld);
        }
      });
  return columns;
}

// ------------------------------------------------------------------------------------ forward

// The products have the weight, where it is, as the left matrix, and for each tap the pixels that
// it meets as the right one, with zeros where it meets none.
template <class scalar_t>
class FewPixels {
 public:
  FewPixels(const Conv2dGeometry& g, const at::Tensor& weight, const scalar_t* bias, bool last,
            scalar_t* output)
      : g_(g),
        weight_(weight.const_data_ptr<scalar_t>()),
        bias_(bias),
        output_(output),
        last_(last),
        last_weight_(!weight.is_contiguous()),
        ld_(ceil_div(pixels(), kLanes) * kLanes) {}

  void run(const scalar_t* input, const at::TensorOptions& options) {
    const at::Tensor columns = last_
                                   ? columns_of<scalar_t, true, true>(g_, 0, input, ld_, options)
                                   : columns_of<scalar_t, false, true>(g_, 0, input, ld_, options);
    const scalar_t* const data = columns.const_data_ptr<scalar_t>();
    const std::vector<int64_t> cells = cells_in_order();
    const int64_t blocks = ceil_div(g_.O, block()), work = block() * ld_ * g_.column_rows();
    at::parallel_for(0, blocks, grain(work), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<scalar_t>(block() * ld_));
      scalar_t* sums = scratch.take<scalar_t>(block() * ld_);
      for (int64_t i = begin; i < end; ++i) compute(cells, i * block(), data, sums);
    });
  }

 private:
  static constexpr int64_t kLanes = 16;

  int64_t pixels() const { return g_.N * g_.output_pixels(); }
  // Outputs at a time. The cells of a contiguous weight share cache lines: those of so few outputs
  // stay in a second-level cache from one cell to the next.
  int64_t block() const { return last_weight_ ? 64 : 24; }

  // The kernel's cells that meet the images, in the order in which strips add them.
  std::vector<int64_t> cells_in_order() const {
    const Correlation k = forward_correlation(g_, /*copied=*/false);
    const TapAxis &rows = k.phases[0].rows, &cols = k.phases[0].cols;
    std::vector<int64_t> result;
    for (const Interval& run : adjacent_taps(cols, /*joined=*/true))
      for (int64_t i = 0; i < rows.taps(); ++i)
        for (int64_t j = run.begin; j < run.end; ++j)
          result.push_back(rows.cell(i) * g_.S + cols.cell(j));
    return result;
  }

  void compute(const std::vector<int64_t>& cells, int64_t first, const scalar_t* columns,
               scalar_t* sums) const {
    const int64_t count = std::min(block(), g_.O - first), all = g_.R * g_.S;
    for (int64_t i = 0; i < count; ++i)
      std::fill_n(sums + i * ld_, ld_, bias_ == nullptr ? scalar_t(0) : bias_[first + i]);
    std::vector<Factors<scalar_t>> factors;
    for (const int64_t cell : cells)
      factors.push_back({weight_ + first * all * g_.C + cell * (last_weight_ ? g_.C : 1),
                         columns + cell * (last_ ? g_.C : 1) * ld_});
    const FactorStrides strides{
        .lda = all * g_.C, .ldb = last_ ? ld_ : all * ld_, .step = last_weight_ ? 1 : all};
    matmul_of_factors(count, pixels(), g_.C, factors.data(), static_cast<int64_t>(factors.size()),
                      strides, sums, ld_, Addend<scalar_t>{sums, ld_});
    for (int64_t i = 0; i < count; ++i) store(first + i, sums + i * ld_);
  }

  void store(int64_t channel, const scalar_t* from) const {
    const int64_t plane = g_.output_pixels(), step = last_ ? g_.O : 1;
    scalar_t* to = output_ + channel * (last_ ? 1 : plane);
    for (int64_t n = 0; n < g_.N; ++n, to += g_.O * plane)
      for (int64_t i = 0; i < plane; ++i) to[i * step] = *from++;
  }

  const Conv2dGeometry& g_;
  const scalar_t *weight_, *bias_;
  scalar_t* output_;
  bool last_, last_weight_;
  int64_t ld_;
};

// ---------------------------------------------------------------------- gradient of the weight

constexpr int64_t kOutputs = 64;  // of a task

template <class scalar_t, bool last>
void multiply(const Conv2dGeometry& g, const scalar_t* grad_output, const at::Tensor& input,
              scalar_t* grad_weight) {
  const Panels<scalar_t, last> panels{g};
  const int64_t P = g.N * g.output_pixels(), K = g.column_rows(), Og = g.outputs_per_group();
  const int64_t blocks = ceil_div(Og, kOutputs);
  for (int64_t group = 0; group < g.groups; ++group) {
    const at::Tensor columns = columns_of<scalar_t, last, false>(
        g, group, input.const_data_ptr<scalar_t>(), K, input.options());
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
    const scalar_t* bias_data = bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr;
    scalar_t* to = output.mutable_data_ptr<scalar_t>();
    FewPixels<scalar_t>(g, weight, bias_data, format == at::MemoryFormat::ChannelsLast, to)
        .run(input.const_data_ptr<scalar_t>(), input.options());
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
