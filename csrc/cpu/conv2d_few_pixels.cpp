#include "cpu/conv2d_few_pixels.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <vector>

#include "cpu/conv2d_correlation.h"
#include "cpu/conv2d_few_pixels_columns.h"
#include "cpu/conv2d_panels.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {
namespace {

// ------------------------------------------------------------------------------------ forward

// Whether some taps of some outputs lie outside the image.
bool meets_borders(const Conv2dGeometry& g) {
  const auto all_inside = [](const TapAxis& axis) {
    return length(axis.inside(0)) == axis.outputs &&
           length(axis.inside(axis.taps() - 1)) == axis.outputs;
  };
  const auto rows = forward_axis(g.OH, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h);
  const auto cols = forward_axis(g.OW, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w);
  return !all_inside(rows) || !all_inside(cols);
}

// The products have the weight, where it is, as the left matrix, and for each tap the pixels that
// it meets as the right one, with zeros where it meets none.
template <class scalar_t>
class FewPixels {
  using sum_t = at::opmath_type<scalar_t>;

 public:
  FewPixels(const Conv2dGeometry& g, const at::Tensor& weight, const sum_t* bias, bool last,
            scalar_t* output)
      : g_(g),
        weight_(weight.const_data_ptr<scalar_t>()),
        bias_(bias),
        output_(output),
        last_(last),
        last_weight_(!weight.is_contiguous()),
        ld_(ceil_div(pixels(), kLanes) * kLanes) {}

  void run(const scalar_t* input) {
    const at::Tensor columns = last_ ? FewColumns<scalar_t, true, true>(g_, 0, ld_).fill(input)
                                     : FewColumns<scalar_t, false, true>(g_, 0, ld_).fill(input);
    const scalar_t* const data = columns.const_data_ptr<scalar_t>();
    const std::vector<Cells> cells = cells_in_order();
    const int64_t blocks = ceil_div(g_.O, block()), work = block() * ld_ * g_.column_rows();
    at::parallel_for(0, blocks, grain(work), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<sum_t>(block() * ld_));
      sum_t* sums = scratch.take<sum_t>(block() * ld_);
      for (int64_t i = begin; i < end; ++i) compute(cells, i * block(), data, sums);
    });
  }

 private:
  static constexpr int64_t kLanes = 16;

  int64_t pixels() const { return g_.N * g_.output_pixels(); }
  // Outputs at a time. The cells of a contiguous weight share cache lines: those of so few outputs
  // stay in a second-level cache from one cell to the next.
  int64_t block() const { return last_weight_ ? 64 : 24; }

  // Kernel cells whose products are summed together.
  using Cells = std::vector<int64_t>;

  // The cells that meet the images, in the order in which strips add them.
  std::vector<Cells> cells_in_order() const {
    const Correlation k = forward_correlation(g_, /*copied=*/false);
    const TapAxis &rows = k.phases[0].rows, &cols = k.phases[0].cols;
    std::vector<Cells> result;
    for (const Interval& run : adjacent_taps(cols, /*joined=*/true)) {
      const int64_t together = std::max<int64_t>(1, kTerms / (length(run) * g_.C));
      for (int64_t i = 0; i < rows.taps(); ++i) {
        if (i % together == 0) result.emplace_back();
        for (int64_t j = run.begin; j < run.end; ++j)
          result.back().push_back(rows.cell(i) * g_.S + cols.cell(j));
      }
    }
    return result;
  }

  void compute(const std::vector<Cells>& cells, int64_t first, const scalar_t* columns,
               sum_t* sums) const {
    const int64_t count = std::min(block(), g_.O - first), all = g_.R * g_.S;
    for (int64_t i = 0; i < count; ++i)
      std::fill_n(sums + i * ld_, ld_, bias_ == nullptr ? sum_t(0) : bias_[first + i]);
    const FactorStrides strides{
        .lda = all * g_.C, .ldb = last_ ? ld_ : all * ld_, .step = last_weight_ ? 1 : all};
    for (const Cells& some : cells) {
      std::vector<Factors<scalar_t>> factors;
      for (const int64_t cell : some)
        factors.push_back({weight_ + first * all * g_.C + cell * (last_weight_ ? g_.C : 1),
                           columns + cell * (last_ ? g_.C : 1) * ld_});
      matmul_of_factors(count, pixels(), g_.C, factors.data(), static_cast<int64_t>(factors.size()),
                        strides, sums, ld_, Addend<sum_t>{sums, ld_});
    }
    for (int64_t i = 0; i < count; ++i) store(first + i, sums + i * ld_);
  }

  void store(int64_t channel, const sum_t* from) const {
    const int64_t plane = g_.output_pixels(), step = last_ ? g_.O : 1;
    scalar_t* to = output_ + channel * (last_ ? 1 : plane);
    for (int64_t n = 0; n < g_.N; ++n, to += g_.O * plane)
      for (int64_t i = 0; i < plane; ++i) to[i * step] = static_cast<scalar_t>(*from++);
  }

  const Conv2dGeometry& g_;
  const scalar_t* weight_;
  const sum_t* bias_;
  scalar_t* output_;
  bool last_, last_weight_;
  int64_t ld_;
};

// ----------------------------------------------------------------------- gradient of the image

// What a pixel of grad_output gives through each cell of the kernel is a product whose right matrix
// is the weight where it is; each pixel of the image then adds up what it meets, as strips do.
template <class scalar_t>
class FewPixelsGradInput {
 public:
  static constexpr int64_t kChannels = 32;  // of a task

  FewPixelsGradInput(const Conv2dGeometry& g, const Correlation& k, const at::Tensor& weight,
                     bool last, scalar_t* grad_input)
      : g_(g),
        k_(k),
        weight_(weight.const_data_ptr<scalar_t>()),
        grad_input_(grad_input),
        last_(last),
        last_weight_(!weight.is_contiguous()) {}

  // `grad`: P x O, with rows `ld` apart.
  void run(const scalar_t* grad, int64_t ld) const {
    const int64_t blocks = ceil_div(g_.C, kChannels);
    const int64_t given = kChannels * cells() * chunks() * pixels(), sums = kChannels * image();
    const int64_t raw = last_weight_ ? 0 : kChannels * cells() * pixels();
    at::parallel_for(0, blocks, grain(given * kTerms), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<scalar_t>(given) + Scratch::size<scalar_t>(raw) +
                      Scratch::size<scalar_t>(sums));
      scalar_t* to = scratch.take<scalar_t>(given);
      scalar_t* space = scratch.take<scalar_t>(raw);
      scalar_t* sum = scratch.take<scalar_t>(sums);
      for (int64_t i = begin; i < end; ++i) {
        const Interval channels{i * kChannels, std::min(g_.C, (i + 1) * kChannels)};
        for (int64_t chunk = 0; chunk < chunks(); ++chunk)
          give(grad + chunk * kTerms, ld, channels, chunk, to, space);
        gather(to, length(channels), sum);
        store(channels, sum);
      }
    });
  }

 private:
  int64_t pixels() const { return g_.N * g_.output_pixels(); }
  int64_t image() const { return g_.N * g_.H * g_.W; }
  int64_t cells() const { return g_.R * g_.S; }
  int64_t chunks() const { return g_.O / kTerms; }
  // Where a cell's part lies: [cell][chunk][pixel][channel].
  int64_t place(int64_t cell, int64_t chunk) const {
    return (cell * chunks() + chunk) * pixels() * kChannels;
  }

  // The products of kTerms outputs.
  void give(const scalar_t* grad, int64_t ld, Interval channels, int64_t chunk, scalar_t* to,
            scalar_t* space) const {
    const int64_t P = pixels(), width = length(channels), row = cells() * g_.C;
    const scalar_t* weight = weight_ + chunk * kTerms * row;
    const FactorStrides strides{.lda = ld, .ldb = row, .padded = false};
    const auto product = [&](const scalar_t* b, int64_t columns, scalar_t* c, int64_t ldc) {
      const Factors<scalar_t> factors{grad, b};
      matmul_of_factors(P, columns, kTerms, &factors, 1, strides, c, ldc, Addend<scalar_t>{});
    };
    if (last_weight_) {
      for (int64_t cell = 0; cell < cells(); ++cell) {
        if (k_.places[static_cast<size_t>(cell)] < 0) continue;
        product(weight + cell * g_.C + channels.begin, width, to + place(cell, chunk), kChannels);
      }
      return;
    }
    // All cells, for those that meet no pixel share cache lines with the others.
    product(weight + channels.begin * cells(), width * cells(), space, width * cells());
    const auto flip = DLOPS_SIMD(transpose, scalar_t, scalar_t);
    for (int64_t p = 0; p < P; ++p)
      flip(space + p * width * cells(), cells(), width, cells(),
           to + place(0, chunk) + p * kChannels, place(1, 0));
  }

  // Adds up what each pixel of the images meets, in the order of the strips.
  void gather(const scalar_t* from, int64_t width, scalar_t* sums) const {
    std::fill_n(sums, image() * kChannels, scalar_t(0));
    for (const Phase& phase : k_.phases)
      for (const Interval& run : adjacent_taps(phase.cols, /*joined=*/true))
        for (int64_t i = 0; i < phase.rows.taps(); ++i)
          for (int64_t j = run.begin; j < run.end; ++j)
            for (int64_t chunk = 0; chunk < chunks(); ++chunk)
              add_tap(phase, i, j,
                      from + place(phase.rows.cell(i) * g_.S + phase.cols.cell(j), chunk), width,
                      sums);
  }
  void add_tap(const Phase& phase, int64_t i, int64_t j, const scalar_t* from, int64_t width,
               scalar_t* sums) const {
    const auto add = DLOPS_SIMD(add_row, scalar_t, scalar_t);
    const Interval rows = phase.rows.inside(i), cols = phase.cols.inside(j);
    for (int64_t n = 0; n < g_.N; ++n) {
      for (int64_t y = rows.begin; y < rows.end; ++y) {
        for (int64_t x = cols.begin; x < cols.end; ++x) {
          const int64_t source =
              (n * g_.OH + y + phase.rows.offset(i)) * g_.OW + x + phase.cols.offset(j);
          const int64_t pixel =
              (n * g_.H + phase.row0 + y * k_.row_step) * g_.W + phase.col0 + x * k_.col_step;
          add(from + source * kChannels, sums + pixel * kChannels, width);
        }
      }
    }
  }

  void store(Interval channels, const scalar_t* sums) const {
    const int64_t plane = g_.H * g_.W, width = length(channels);
    const auto flip = DLOPS_SIMD(transpose, scalar_t, scalar_t);
    for (int64_t n = 0; n < g_.N; ++n, sums += plane * kChannels) {
      if (last_) {
        for (int64_t p = 0; p < plane; ++p)
          std::copy_n(sums + p * kChannels, width,
                      grad_input_ + (n * plane + p) * g_.C + channels.begin);
      } else {
        flip(sums, kChannels, plane, width, grad_input_ + (n * g_.C + channels.begin) * plane,
             plane);
      }
    }
  }

  const Conv2dGeometry& g_;
  const Correlation& k_;
  const scalar_t* weight_;
  scalar_t* grad_input_;
  bool last_, last_weight_;
};

}  // namespace

bool few_pixels_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                        const at::Tensor& bias, const at::Tensor& output, at::MemoryFormat format) {
  // Below that, bringing the weight into order costs little.
  const bool borders = meets_borders(g);
  const int64_t large_weight = borders ? 512 * 1024 : 256 * 1024;
  if (g.O * g.column_rows() < large_weight) return false;
  // Strips sum up kTerms terms at a time. Those must be channels of one tap or, as long as all
  // pixels have the same ones, of a few whole taps.
  const bool same_order = g.C % kTerms == 0 || (!borders && kTerms % g.C == 0);
  if (g.groups != 1 || !same_order) return false;
  if (!are_few_pixels(g.N * g.output_pixels(), g.column_rows(), g.O, input.scalar_type()))
    return false;
  const bool last = format == at::MemoryFormat::ChannelsLast;
  const bool last_weight = weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  if (!weight.is_contiguous() && !last_weight) return false;
  // Pairs are of neighbours in memory.
  if (input.scalar_type() == at::kBFloat16 && !(last && last_weight)) return false;
  return AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, input.scalar_type(), "conv2d", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const sum_t* bias_data = bias.defined() ? bias.const_data_ptr<sum_t>() : nullptr;
    scalar_t* to = output.mutable_data_ptr<scalar_t>();
    FewPixels<scalar_t>(g, weight, bias_data, last, to).run(input.const_data_ptr<scalar_t>());
    return DLOPS_SIMD(all_finite, scalar_t)(to, output.numel());
  });
}

bool few_pixels_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                           const at::Tensor& weight, const at::Tensor& grad_input,
                           at::MemoryFormat format) {
  constexpr int64_t kLargeWeight = 128 * 1024, kImage = 1024, kGiven = 8 * 1024;
  const int64_t P = g.N * g.output_pixels();
  // Strips sum up kTerms terms at a time: those must be outputs of one tap.
  if (g.groups != 1 || g.O % kTerms != 0 || g.C < 32) return false;
  if (g.O * g.column_rows() < kLargeWeight || g.N * g.H * g.W > kImage) return false;
  const at::ScalarType dtype = grad_output.scalar_type();
  if (dtype == at::kBFloat16 || !are_few_pixels(P, g.O, g.column_rows(), dtype)) return false;
  if (g.R * g.S * (g.O / kTerms) * P > kGiven) return false;
  if (!weight.is_contiguous() && !weight.is_contiguous(at::MemoryFormat::ChannelsLast))
    return false;
  const Correlation k = backward_correlation(g);
  const bool last = format == at::MemoryFormat::ChannelsLast;
  AT_DISPATCH_FLOATING_TYPES(grad_output.scalar_type(), "conv2d_grad_input", [&] {
    const scalar_t* grad = grad_output.const_data_ptr<scalar_t>();
    const FewPixelsGradInput<scalar_t> product(g, k, weight, last,
                                               grad_input.mutable_data_ptr<scalar_t>());
    if (last) return product.run(grad, g.O);
    const at::Tensor turned = at::empty({P, g.O}, grad_output.options());
    scalar_t* const to = turned.mutable_data_ptr<scalar_t>();
    Panels<scalar_t, false>{g}.outputs_transposed(grad, 0, {0, P}, to);
    product.run(to, g.O);
  });
  return true;
}

}  // namespace dlops::cpu
