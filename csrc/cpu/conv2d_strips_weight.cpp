// The gradient of the weight, for each kernel row r and output o:
//
//   grad_weight[o, r, (0 .. S-1), c] += grad_output[o, pixel] * input[pixel + (0 .. S-1), c]
//
// one matrix product whose depth is the pixels of a strip, with the gradient's channels apart and
// the input in channels_last order. Where images are so small that a strip holds few pixels, its
// depth is the images instead.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include "cpu/conv2d_correlation.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/conv2d_strips.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"

namespace dlops::cpu {
namespace {

constexpr int64_t kStripElements = 64 * 1024, kBatchElements = 256 * 1024;
constexpr int64_t kTasks = 8;
// What the sums of all chunks may take, where that is more than the gradient itself.
constexpr int64_t kPartialElements = 512 * 1024;
constexpr int64_t kFewPixels = 100, kManyImages = 16;

template <class scalar_t>
class WeightGradient {
  using sum_t = at::opmath_type<scalar_t>;
  static constexpr bool kSameType = std::is_same_v<scalar_t, sum_t>;

 public:
  WeightGradient(const Conv2dGeometry& g, const at::Tensor& grad_output, const at::Tensor& input,
                 bool last)
      : g_(g),
        rows_(live(forward_axis(g.OH, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h))),
        cols_(live(forward_axis(g.OW, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w))),
        grad_{grad_output.const_data_ptr<scalar_t>(), g.O, g.OH, g.OW, last},
        input_{input.const_data_ptr<scalar_t>(), g.C, g.H, g.W, last},
        unfolder_(input_, g.channels_per_group(), rows_, cols_),
        unfolds_(g.R * g.S > 1 && rows_.taps() == g.R && cols_.taps() == g.S &&
                 g.channels_per_group() <= kFewChannels) {
    if (any_taps())
      columns_ = {cols_.offset(0), (g.OW - 1) * g.stride_w + cols_.offset(cols_.taps() - 1) + 1};
    in_place_ = kSameType && last && !unfolds_;
    // Rows of zeros beside the image make the pixels of a strip one run.
    whole_columns_ = columns_.begin >= 0 && columns_.end <= g.W && g.groups == 1;
    flat_ = unfolds_ || (g.stride_h == 1 && g.stride_w == 1);
    choose_images();
    segments_ = segments(cols_, !in_place_ || g.groups == 1);
    const int64_t row =
        std::max<int64_t>({1, pitch() * depth() * (unfolds_ ? 1 : g.stride_h), pitch() * kBlock});
    strip_rows_ = std::clamp<int64_t>(kStripElements / row, 1, g.OH);
    strip_rows_ = ceil_div(g.OH, ceil_div(g.OH, strip_rows_));
    strips_ = ceil_div(g.OH, strip_rows_);
    const int64_t units = by_images() ? ceil_div(g.N, images_) : g.N * strips_;
    const int64_t most = std::max<int64_t>(1, kPartialElements / (g.O * g.column_rows()));
    chunks_ = std::min({units, most, ceil_div(kTasks, g.groups)});
    splits_ = std::min(blocks(), ceil_div(kTasks, chunks_ * g.groups));
    units_ = units;
  }

  void run(const at::Tensor& result, bool last) {
    sums_ = at::zeros({chunks_, g_.O, g_.column_rows()},
                      result.options()
                          .dtype(c10::CppTypeToScalarType<sum_t>::value)
                          .memory_format(at::MemoryFormat::Contiguous));
    sum_data_ = sums_.mutable_data_ptr<sum_t>();
    const int64_t work = g_.N * g_.output_pixels() * g_.column_rows() * g_.outputs_per_group() /
                         std::max<int64_t>(1, chunks_ * splits_);
    at::parallel_for(
        0, chunks_ * g_.groups * splits_, grain(work), [&](int64_t begin, int64_t end) {
          Scratch scratch(Scratch::size<sum_t>(input_size()) + Scratch::size<sum_t>(space_size()) +
                          Scratch::size<sum_t>(grad_size()));
          sum_t* input = scratch.take<sum_t>(input_size());
          sum_t* space = scratch.take<sum_t>(space_size());
          sum_t* grad = scratch.take<sum_t>(grad_size());
          for (int64_t task = begin; task < end; ++task) {
            const int64_t split = task % splits_, group = task / splits_ % g_.groups;
            const int64_t chunk = task / splits_ / g_.groups;
            const Interval some{split * blocks() / splits_, (split + 1) * blocks() / splits_};
            for (int64_t unit = chunk * units_ / chunks_;
                 any_taps() && unit < (chunk + 1) * units_ / chunks_; ++unit) {
              if (by_images()) {
                add_images(chunk, group, unit, some, input, grad);
              } else {
                add_strip(chunk, group, unit, some, input, space, grad);
              }
            }
          }
        });
    finish(result.mutable_data_ptr<scalar_t>(), last);
  }

 private:
  int64_t channels() const { return g_.channels_per_group(); }
  int64_t outputs() const { return g_.outputs_per_group(); }
  int64_t blocks() const { return ceil_div(outputs(), kBlock); }
  int64_t depth() const { return unfolds_ ? g_.column_rows() : channels(); }
  bool any_taps() const { return rows_.taps() > 0 && cols_.taps() > 0; }
  int64_t row_taps() const { return unfolds_ ? 1 : rows_.taps(); }
  int64_t col_taps() const { return unfolds_ ? 1 : cols_.taps(); }
  bool by_images() const { return images_ > 0; }
  bool strip_in_place() const { return in_place_ && whole_columns_; }
  // Columns from one row of a strip to the next.
  int64_t pitch() const { return unfolds_ ? g_.OW : strip_in_place() ? g_.W : length(columns_); }
  int64_t grad_pitch() const { return flat_ ? pitch() : g_.OW; }
  Interval outputs_of(int64_t block) const {
    return {block * kBlock, std::min(outputs(), (block + 1) * kBlock)};
  }
  // A chunk's sums of an output: [row tap][column tap][depth].
  sum_t* sums(int64_t chunk, int64_t group, int64_t output, int64_t i, int64_t j) const {
    return sum_data_ + (chunk * g_.O + group * outputs() + output) * g_.column_rows() +
           (rows_.cell(i) * g_.S + cols_.cell(j)) * channels();
  }

  void choose_images() {
    if (unfolds_ || g_.output_pixels() > kFewPixels || g_.N < kManyImages) return;
    const int64_t grad = g_.output_pixels() * std::min(kBlock, outputs());
    const int64_t input = in_place_ ? 0 : g_.H * g_.W * channels();
    // Enough units for all tasks, of as many images as a product needs to be deep.
    const int64_t units = ceil_div(kTasks, g_.groups * blocks());
    const int64_t fitting =
        std::min(std::max(kManyImages, g_.N / units), kBatchElements / (grad + input));
    if (fitting >= kManyImages) images_ = ceil_div(g_.N, ceil_div(g_.N, fitting));
  }

  int64_t input_size() const {
    if (by_images()) return in_place_ ? 0 : images_ * g_.H * g_.W * channels();
    if (strip_in_place()) return 0;
    if (unfolds_) return unfolder_.size(strip_rows_);
    int64_t rows = 0;
    for (int64_t y = 0; y < g_.OH; y += strip_rows_)
      rows = std::max(rows, length(source_rows({y, std::min(g_.OH, y + strip_rows_)})));
    return rows * pitch() * depth();
  }
  int64_t space_size() const { return unfolds_ ? unfolder_.space_size(strip_rows_) : 0; }
  int64_t grad_size() const {
    const int64_t width = std::min(kBlock, outputs());
    return width * (by_images() ? images_ * g_.output_pixels() : strip_rows_ * grad_pitch());
  }

  // -------------------------------------------------------------------------- strips of an image

  void add_strip(int64_t chunk, int64_t group, int64_t unit, Interval some, sum_t* input_space,
                 sum_t* space, sum_t* grad_space) const {
    const int64_t n = unit / strips_, y0 = unit % strips_ * strip_rows_;
    const Interval y{y0, std::min(g_.OH, y0 + strip_rows_)};
    const Interval c{group * channels(), (group + 1) * channels()};
    const Interval rows = unfolds_ ? y : source_rows(y);
    if (length(rows) == 0) return;
    const sum_t* input = input_space;
    if (unfolds_) {
      unfolder_.fill(n, c.begin, y, space, input_space);
    } else if (!strip_in_place()) {
      fill_strip(input_, n, c, rows, columns_, input_space);
    } else if constexpr (kSameType) {
      input = input_.at(n, 0, rows.begin, columns_.begin);
    }
    // The zeros between the gradient's rows meet pixels, too: a product that is NaN if one is not
    // finite.
    const bool joined =
        flat_ && (grad_pitch() == g_.OW ||
                  DLOPS_SIMD(all_finite, sum_t)(input, length(rows) * pitch() * depth()));
    for (int64_t block = some.begin; block < some.end; ++block) {
      const Matrix grad =
          gradient(n, group * outputs() + block * kBlock, length(outputs_of(block)), y, grad_space);
      for (int64_t i = 0; i < row_taps(); ++i)
        add_row_tap(chunk, group, block, i, y, rows, input, grad, joined);
    }
  }

  Interval source_rows(Interval y) const {
    Interval result{g_.H, 0};
    for (int64_t i = 0; i < rows_.taps(); ++i) {
      const Interval some = intersect(y, rows_.inside(i));
      if (length(some) == 0) continue;
      result.begin = std::min(result.begin, some.begin * rows_.step + rows_.offset(i));
      result.end = std::max(result.end, (some.end - 1) * rows_.step + rows_.offset(i) + 1);
    }
    return {std::min(result.begin, result.end), result.end};
  }

  struct Matrix {
    const sum_t* data;
    int64_t ld;
  };

  // The gradient as [output][row][column], rows grad_pitch() apart with zeros between them.
  Matrix gradient(int64_t n, int64_t o0, int64_t width, Interval y, sum_t* space) const {
    if constexpr (kSameType) {
      if (!grad_.last && grad_pitch() == g_.OW) return {grad_.at(n, o0, y.begin, 0), grad_.plane()};
    }
    fill_gradient(n, o0, width, y, space);
    return {space, length(y) * grad_pitch()};
  }
  void fill_gradient(int64_t n, int64_t o0, int64_t width, Interval y, sum_t* to) const {
    const auto flip = DLOPS_SIMD(transpose, scalar_t, sum_t);
    const auto convert = DLOPS_SIMD(convert_row, scalar_t, sum_t);
    const int64_t ld = length(y) * grad_pitch(), junk = grad_pitch() - g_.OW;
    if (!grad_.last && junk == 0) {
      for (int64_t o = 0; o < width; ++o) convert(grad_.at(n, o0 + o, y.begin, 0), to + o * ld, ld);
      return;
    }
    for (int64_t row = y.begin; row < y.end; ++row, to += grad_pitch()) {
      if (grad_.last) flip(grad_.at(n, o0, row, 0), g_.O, g_.OW, width, to, ld);
      for (int64_t o = 0; o < width; ++o) {
        if (!grad_.last) convert(grad_.at(n, o0 + o, row, 0), to + o * ld, g_.OW);
        std::fill_n(to + o * ld + g_.OW, junk, sum_t(0));
      }
    }
  }

  void add_row_tap(int64_t chunk, int64_t group, int64_t block, int64_t i, Interval y,
                   Interval rows, const sum_t* input, Matrix grad, bool joined) const {
    const Interval some = unfolds_ ? y : intersect(y, rows_.inside(i));
    if (length(some) == 0) return;
    const Interval out = outputs_of(block);
    const int64_t step = unfolds_ ? 1 : rows_.step;
    const int64_t row = unfolds_ ? 0 : some.begin * step + rows_.offset(i) - rows.begin;
    const int64_t row_size = pitch() * depth(), pixel = (unfolds_ ? 1 : g_.stride_w) * depth();
    const sum_t* a = grad.data + (some.begin - y.begin) * grad_pitch();
    for (int64_t j0 = 0, j1; j0 < col_taps(); j0 = j1) {
      for (j1 = j0 + 1; j1 < col_taps() && cols_.offset(j1) == cols_.offset(j1 - 1) + 1;) ++j1;
      const int64_t column = unfolds_ ? 0 : cols_.offset(j0) - columns_.begin;
      const sum_t* b = input + row * row_size + column * depth();
      const auto add = [&](int64_t first, int64_t pixels) {
        matmul(length(out), (j1 - j0) * depth(), pixels, a + first * grad_pitch(), grad.ld,
               b + first * step * row_size, pixel, sums(chunk, group, out.begin, i, j0),
               g_.column_rows(), true);
      };
      if (joined) {
        add(0, (length(some) - 1) * pitch() + g_.OW);
      } else {
        for (int64_t k = 0; k < length(some); ++k) add(k, g_.OW);
      }
    }
  }

  // ------------------------------------------------------------------------- many small images

  void add_images(int64_t chunk, int64_t group, int64_t unit, Interval some, sum_t* input_space,
                  sum_t* grad_space) const {
    const int64_t n0 = unit * images_, count = std::min(g_.N, n0 + images_) - n0;
    const Interval c{group * channels(), (group + 1) * channels()};
    const sum_t* input = input_space;
    int64_t pixel = channels(), image = g_.H * g_.W * channels();
    if (!in_place_) {
      for (int64_t n = 0; n < count; ++n)
        fill_strip(input_, n0 + n, c, {0, g_.H}, {0, g_.W}, input_space + n * image);
    } else if constexpr (kSameType) {
      input = input_.at(n0, c.begin, 0, 0);
      pixel = g_.C;
      image = g_.H * g_.W * g_.C;
    }
    for (int64_t block = some.begin; block < some.end; ++block) {
      const Interval out = outputs_of(block);
      flip_images(n0, count, group * outputs() + out.begin, length(out), grad_space);
      for (const Segment& segment : segments_)
        for (int64_t i = 0; i < rows_.taps(); ++i)
          for (int64_t y = rows_.inside(i).begin; y < rows_.inside(i).end; ++y)
            for (int64_t x = segment.outputs.begin; x < segment.outputs.end; ++x) {
              const int64_t row = y * rows_.step + rows_.offset(i), j = segment.taps.begin;
              const int64_t col = x * cols_.step + cols_.offset(j);
              matmul(length(out), length(segment.taps) * channels(), count,
                     grad_space + grad_offset(y * g_.OW + x, length(out), count),
                     grad_.last ? count : g_.output_pixels() * count,
                     input + (row * g_.W + col) * pixel, image, sums(chunk, group, out.begin, i, j),
                     g_.column_rows(), true);
            }
    }
  }

  // The gradient with images innermost: [output][pixel][image], or channels_last
  // [pixel][output][image].
  void flip_images(int64_t n0, int64_t count, int64_t o0, int64_t width, sum_t* to) const {
    const auto flip = DLOPS_SIMD(transpose, scalar_t, sum_t);
    const int64_t pixels = g_.output_pixels(), ld = g_.O * pixels;
    if (!grad_.last) {
      flip(grad_.at(n0, o0, 0, 0), ld, count, width * pixels, to, count);
      return;
    }
    for (int64_t p = 0; p < pixels; ++p)
      flip(grad_.at(n0, o0, 0, 0) + p * g_.O, ld, count, width, to + p * width * count, count);
  }
  int64_t grad_offset(int64_t pixel, int64_t width, int64_t count) const {
    return pixel * count * (grad_.last ? width : 1);
  }

  // ------------------------------------------------------------------------------------ the end

  // Adds up the chunks in their order and writes each output's weights as the result has them.
  void finish(scalar_t* result, bool last) const {
    const auto add = DLOPS_SIMD(add_row, sum_t, sum_t);
    const auto convert = DLOPS_SIMD(convert_row, sum_t, scalar_t);
    const auto flip = DLOPS_SIMD(transpose, sum_t, scalar_t);
    const int64_t size = g_.column_rows(), cells = g_.R * g_.S;
    at::parallel_for(0, g_.O, grain(chunks_ * size), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        sum_t* sum = sum_data_ + o * size;
        for (int64_t chunk = 1; chunk < chunks_; ++chunk) add(sum + chunk * g_.O * size, sum, size);
        if (last) {
          convert(sum, result + o * size, size);
        } else {
          flip(sum, channels(), cells, channels(), result + o * size, cells);
        }
      }
    });
  }

  const Conv2dGeometry& g_;
  const TapAxis rows_, cols_;
  const ImageView<scalar_t> grad_, input_;
  const Unfolder<scalar_t, sum_t> unfolder_;
  const bool unfolds_;      // few channels go through im2col
  Interval columns_{0, 0};  // of the input that a strip holds
  bool in_place_, whole_columns_, flat_;
  std::vector<Segment> segments_;
  int64_t images_ = 0;  // of a unit, where products run over images
  int64_t strip_rows_, strips_, units_, chunks_, splits_;
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
