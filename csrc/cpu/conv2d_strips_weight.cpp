// The gradient of the weight, for each kernel row r and output o:
//
//   grad_weight[o, r, (0 .. S-1), c] += grad_output[o, pixel] * input[pixel + (0 .. S-1), c]
//
// a sum of matrix products whose depth is the pixels of a row, a column or the images, with the
// input in channels_last order and the gradient in either. Pixels at the border, which meet fewer
// cells, are products of their own: but for few channels, which go through im2col where they are
// copied anyway, nothing is multiplied with padding.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/conv2d_correlation.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/conv2d_strips.h"
#include "cpu/conv2d_weight_tasks.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {
namespace {

// Positions that a sum runs over, and how far apart they are in A and in B.
struct Axis {
  int64_t count, a, b;
};

// C += A B, where the sum runs over three axes, the outermost first.
template <class T>
void add_products(int64_t m, int64_t n, Factors<T> first, int64_t lda, std::array<Axis, 3> axes,
                  bool padded, T* c, int64_t ldc) {
  // An axis that goes on where the next one ends is a part of it.
  for (size_t i = 1; i < axes.size(); ++i) {
    Axis &outer = axes[i - 1], &inner = axes[i];
    if (outer.a != inner.count * inner.a || outer.b != inner.count * inner.b) continue;
    inner.count *= outer.count;
    outer = {1, 0, 0};
  }
  // The longest, but a few neighbours in A are worth more: they share a cache line.
  const auto value = [](const Axis& x) {
    constexpr int64_t kFew = 4, kLong = 1024;
    return x.a == 1 && x.count >= kFew ? x.count + kLong : x.count;
  };
  const auto longest =  // the innermost of equal ones
      std::max_element(axes.rbegin(), axes.rend(),
                       [&](const Axis& x, const Axis& y) { return value(x) < value(y); });
  std::swap(*longest, axes.back());
  const auto [outer, inner, depth] = axes;
  std::vector<Factors<T>> factors;
  for (int64_t i = 0; i < outer.count; ++i)
    for (int64_t j = 0; j < inner.count; ++j)
      factors.push_back({first.a + i * outer.a + j * inner.a, first.b + i * outer.b + j * inner.b});
  matmul_of_factors(m, n, depth.count, factors.data(), static_cast<int64_t>(factors.size()),
                    {.lda = lda, .ldb = depth.b, .step = depth.a, .padded = padded}, c, ldc,
                    Addend<T>{c, ldc});
}

// How a batch is cut into units, each some images or some rows of one: what a product reads stays
// in a second-level cache, and is at least as much as the sums that it is added to. It depends on
// the shapes alone.
struct Cut {
  static constexpr int64_t kElements = 64 * 1024, kMost = 256 * 1024, kLeastTasks = 4;
  int64_t images = 1, rows, strips, units;
  // `depth`: elements of a source pixel, of which there are `pixels` for each output row.
  Cut(const Conv2dGeometry& g, int64_t pixels, int64_t depth) : rows(g.OH) {
    const int64_t outputs = std::min(WeightTasks::kBlock, g.outputs_per_group());
    const int64_t row = std::max<int64_t>(1, pixels * depth + g.OW * outputs);
    const int64_t most = std::clamp(outputs * g.column_rows(), kElements, kMost);
    if (row * g.OH <= most) {
      const int64_t fitting =
          std::min(most / (row * g.OH), ceil_div(g.N, WeightTasks::tasks_per_block(g)));
      images = ceil_div(g.N, ceil_div(g.N, fitting));
    } else {
      rows = ceil_div(g.OH, ceil_div(g.OH, std::clamp<int64_t>(most / row, 1, g.OH)));
    }
    // A part of one image each, where that leaves less than a few threads have to do.
    const int64_t blocks = g.groups * ceil_div(g.outputs_per_group(), WeightTasks::kBlock);
    if (images == 1) {
      const int64_t parts = std::min(ceil_div(kLeastTasks, g.N * blocks), ceil_div(g.OH, 4));
      rows = std::min(rows, ceil_div(g.OH, parts));
    }
    strips = ceil_div(g.OH, rows);
    units = ceil_div(g.N, images) * strips;
  }
};

template <class scalar_t>
class WeightGradient {
  using sum_t = at::opmath_type<scalar_t>;
  static constexpr bool kSameType = std::is_same_v<scalar_t, sum_t>;
  static constexpr int64_t kBlock = WeightTasks::kBlock;

 public:
  WeightGradient(const Conv2dGeometry& g, const at::Tensor& grad_output, const at::Tensor& input,
                 bool last)
      : g_(g),
        taps_h_(live(forward_axis(g.OH, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h))),
        taps_w_(live(forward_axis(g.OW, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w))),
        in_place_(kSameType && last),
        few_(has_few_channels(g)),
        unfolds_(few_ && !in_place_ && taps_h_.taps() == g.R && taps_w_.taps() == g.S),
        rows_(unfolds_ ? forward_axis(g.OH, g.OH, 1, 1, 0, 1) : taps_h_),
        cols_(unfolds_ ? forward_axis(g.OW, g.OW, 1, 1, 0, 1) : taps_w_),
        grad_{grad_output.const_data_ptr<scalar_t>(), g.O, g.OH, g.OW, last},
        input_{input.const_data_ptr<scalar_t>(), g.C, g.H, g.W, last},
        unfolder_(input_, g.channels_per_group(), taps_h_, taps_w_),
        segments_(segments(cols_, !in_place_ || g.groups == 1)),
        cut_(g, width() * std::min(rows_.step, g.H), depth()),
        tasks_(g, cut_.units, g.O * g.column_rows()) {}

  void run(const at::Tensor& result, bool last) {
    // Whether the sums lie as the result does.
    const bool direct = in_place_ && !turned() && tasks_.chunks() == 1;
    sums_ = direct ? result.zero_()
                   : at::zeros({tasks_.chunks(), g_.O, g_.column_rows()},
                               result.options()
                                   .dtype(c10::CppTypeToScalarType<sum_t>::value)
                                   .memory_format(at::MemoryFormat::Contiguous));
    sum_data_ = sums_.mutable_data_ptr<sum_t>();
    tasks_.fill([&](const auto& each) {
      Scratch scratch(Scratch::size<sum_t>(input_size()) + Scratch::size<sum_t>(space_size()) +
                      Scratch::size<sum_t>(grad_size()));
      const Space space{scratch.take<sum_t>(input_size()), scratch.take<sum_t>(space_size()),
                        scratch.take<sum_t>(grad_size())};
      each([&](int64_t chunk, int64_t group, int64_t unit, Interval blocks, bool) {
        add_unit(chunk, group, unit, blocks, space);
      });
    });
    if (!direct) finish(result.mutable_data_ptr<scalar_t>(), last);
  }

 private:
  struct Space {
    sum_t *input, *columns, *grad;
  };
  // Where pixels stand, and how far apart.
  struct Images {
    const sum_t* data;
    int64_t image, row, pixel, channel;
    bool padded = true;  // whether products may read past the last of them
  };
  struct Unit {
    int64_t group;
    Interval images, y;  // and output rows
    Interval rows;       // of the source
  };

  int64_t channels() const { return g_.channels_per_group(); }
  int64_t outputs() const { return g_.outputs_per_group(); }
  // Of the source: elements of a pixel, and pixels of a row.
  int64_t depth() const { return unfolds_ ? g_.column_rows() : channels(); }
  int64_t width() const { return unfolds_ ? g_.OW : g_.W; }

  // Rows of few channels would fill a part of a vector each: then vectors are of outputs, and the
  // sums are [cell][channel][output].
  bool turned() const { return in_place_ && few_; }

  int64_t input_size() const {
    if (unfolds_) return cut_.images * unfolder_.size(cut_.rows);
    if (in_place_) return 0;
    int64_t rows = 0;
    for (int64_t y = 0; y < g_.OH; y += cut_.rows)
      rows = std::max(rows, length(source_rows({y, std::min(g_.OH, y + cut_.rows)})));
    return cut_.images * rows * width() * depth() + kPadding;
  }
  int64_t space_size() const { return unfolds_ ? unfolder_.space_size(cut_.rows) : 0; }
  int64_t grad_size() const {
    return kSameType ? 0 : cut_.images * cut_.rows * g_.OW * std::min(kBlock, outputs());
  }
  // Whether products of rows that stand in `view` up to `end`, in B, may read past it.
  bool padded(const ImageView<scalar_t>& view, const scalar_t* end) const {
    return end + kPadding <= view.data + g_.N * view.plane() * view.channels;
  }

  Interval source_rows(Interval y) const {
    Interval result{rows_.inputs, 0};
    for (int64_t i = 0; i < rows_.taps(); ++i) {
      const Interval some = intersect(y, rows_.inside(i));
      if (length(some) == 0) continue;
      result.begin = std::min(result.begin, some.begin * rows_.step + rows_.offset(i));
      result.end = std::max(result.end, (some.end - 1) * rows_.step + rows_.offset(i) + 1);
    }
    return {std::min(result.begin, result.end), result.end};
  }

  void add_unit(int64_t chunk, int64_t group, int64_t index, Interval blocks, Space space) const {
    const int64_t n0 = index / cut_.strips * cut_.images, y0 = index % cut_.strips * cut_.rows;
    Unit unit{group,
              {n0, std::min(g_.N, n0 + cut_.images)},
              {y0, std::min(g_.OH, y0 + cut_.rows)},
              {0, 0}};
    unit.rows = source_rows(unit.y);
    if (length(unit.rows) == 0 || cols_.taps() == 0) return;
    const Images input = source(unit, space);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const Images grad = gradient(unit, block, space);
      for (int64_t i = 0; i < rows_.taps(); ++i) add_row_tap(chunk, unit, block, i, input, grad);
    }
  }

  // The unit's pixels where they are, or as a channels_last copy.
  Images source(const Unit& unit, Space space) const {
    const int64_t c0 = unit.group * channels();
    if constexpr (kSameType) {
      const scalar_t* end = input_.at(unit.images.end - 1, c0, unit.rows.end, 0);
      if (in_place_)
        return {input_.at(unit.images.begin, c0, unit.rows.begin, 0),
                g_.H * g_.W * g_.C,
                g_.W * g_.C,
                g_.C,
                1,
                padded(input_, end)};
    }
    const int64_t row = width() * depth(), image = length(unit.rows) * row;
    sum_t* to = space.input;
    for (int64_t n = unit.images.begin; n < unit.images.end; ++n, to += image) {
      if (unfolds_) {
        unfolder_.fill(n, c0, unit.y, space.columns, to);
      } else {
        fill_strip(input_, n, {c0, c0 + channels()}, unit.rows, {0, g_.W}, to);
      }
    }
    return {space.input, image, row, depth(), 1};
  }

  // A block of the gradient where it is, or converted.
  Images gradient(const Unit& unit, int64_t block, Space space) const {
    const int64_t o0 = unit.group * outputs() + block * kBlock;
    const scalar_t* from = grad_.at(unit.images.begin, o0, unit.y.begin, 0);
    const int64_t image = g_.O * g_.output_pixels();
    if constexpr (kSameType) {
      const scalar_t* end = grad_.at(unit.images.end - 1, o0, unit.y.end, 0);
      if (grad_.last) return {from, image, g_.OW * g_.O, g_.O, 1, padded(grad_, end)};
      return {from, image, g_.OW, 1, grad_.plane()};
    }
    const auto convert = DLOPS_SIMD(convert_row, scalar_t, sum_t);
    const int64_t outs = tasks_.width(block), pixels = length(unit.y) * g_.OW;
    sum_t* to = space.grad;
    for (int64_t n = 0; n < length(unit.images); ++n, from += image) {
      if (grad_.last) {
        for (int64_t p = 0; p < pixels; ++p, to += outs) convert(from + p * g_.O, to, outs);
      } else {
        for (int64_t o = 0; o < outs; ++o, to += pixels)
          convert(from + o * grad_.plane(), to, pixels);
      }
    }
    if (grad_.last) return {space.grad, pixels * outs, g_.OW * outs, outs, 1};
    return {space.grad, pixels * outs, g_.OW, 1, pixels};
  }

  void add_row_tap(int64_t chunk, const Unit& unit, int64_t block, int64_t i, const Images& input,
                   const Images& grad) const {
    const Interval y = intersect(unit.y, rows_.inside(i));
    if (length(y) == 0) return;
    const int64_t row = y.begin * rows_.step + rows_.offset(i) - unit.rows.begin;
    const int64_t output = unit.group * outputs() + block * kBlock;
    for (const Segment& segment : segments_) {
      const int64_t x = segment.outputs.begin, j = segment.taps.begin;
      const int64_t width = tasks_.width(block), size = length(segment.taps) * depth();
      const int64_t place = (rows_.cell(i) * g_.S + cols_.cell(j)) * depth();
      const sum_t* a = grad.data + (y.begin - unit.y.begin) * grad.row + x * grad.pixel;
      const sum_t* b =
          input.data + row * input.row + (x * cols_.step + cols_.offset(j)) * input.pixel;
      std::array<Axis, 3> axes{Axis{length(unit.images), grad.image, input.image},
                               Axis{length(y), grad.row, input.row * rows_.step},
                               Axis{length(segment.outputs), grad.pixel, input.pixel * cols_.step}};
      sum_t* sums = sum_data_ + chunk * g_.O * g_.column_rows();
      if (turned()) {
        for (Axis& axis : axes) std::swap(axis.a, axis.b);
        sums += (unit.group * g_.column_rows() + place) * outputs() + block * kBlock;
        add_products(size, width, {b, a}, input.channel, axes, grad.padded, sums, outputs());
      } else {
        sums += output * g_.column_rows() + place;
        add_products(width, size, {a, b}, grad.channel, axes, input.padded, sums, g_.column_rows());
      }
    }
  }

  // Adds up the chunks in their order and writes each output's weights as the result has them.
  void finish(scalar_t* result, bool last) const {
    const auto add = DLOPS_SIMD(add_row, sum_t, sum_t);
    if (turned()) {
      for (int64_t chunk = 1; chunk < tasks_.chunks(); ++chunk)
        add(sum_data_ + chunk * g_.O * g_.column_rows(), sum_data_, g_.O * g_.column_rows());
      const auto flip = DLOPS_SIMD(transpose, sum_t, scalar_t);
      const int64_t group = outputs() * g_.column_rows();
      for (int64_t i = 0; i < g_.groups; ++i)
        flip(sum_data_ + i * group, outputs(), g_.column_rows(), outputs(), result + i * group,
             g_.column_rows());
      return;
    }
    const auto convert = DLOPS_SIMD(convert_row, sum_t, scalar_t);
    const auto flip = DLOPS_SIMD(transpose, sum_t, scalar_t);
    const int64_t size = g_.column_rows(), cells = g_.R * g_.S, chunks = tasks_.chunks();
    at::parallel_for(0, g_.O, grain(chunks * size), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        sum_t* sum = sum_data_ + o * size;
        for (int64_t chunk = 1; chunk < chunks; ++chunk) add(sum + chunk * g_.O * size, sum, size);
        if (last) {
          convert(sum, result + o * size, size);
        } else {
          flip(sum, channels(), cells, channels(), result + o * size, cells);
        }
      }
    });
  }

  const Conv2dGeometry& g_;
  const TapAxis taps_h_, taps_w_;
  const bool in_place_;        // products read the images where they are
  const bool few_;             // channels
  const bool unfolds_;         // few channels go through im2col:
  const TapAxis rows_, cols_;  // then a 1x1 kernel meets the columns
  const ImageView<scalar_t> grad_, input_;
  const Unfolder<scalar_t, sum_t> unfolder_;
  const std::vector<Segment> segments_;
  const Cut cut_;
  const WeightTasks tasks_;
  at::Tensor sums_;
  sum_t* sum_data_ = nullptr;
};

}  // namespace

void strips_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                        const at::Tensor& input, const at::Tensor& grad_weight,
                        at::MemoryFormat format) {
  const bool last = format == at::MemoryFormat::ChannelsLast;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "conv2d_grad_weight",
      [&] { WeightGradient<scalar_t>(g, grad_output, input, last).run(grad_weight, last); });
}

}  // namespace dlops::cpu
