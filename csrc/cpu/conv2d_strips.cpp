#include "cpu/conv2d_strips.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/conv2d_correlation.h"
#include "cpu/conv2d_packed_weights.h"
#include "cpu/conv2d_parts.h"
#include "cpu/conv2d_planes.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {
namespace {

// What a strip of images may take beside the weights in a second-level cache, in elements.
constexpr int64_t kStripElements = 64 * 1024;
// Tasks that keep a few threads evenly busy, and so few that some would have none.
constexpr int64_t kTasks = 8, kLeastTasks = 4;

struct Strides {
  int64_t image, row, pixel;
  int64_t at(int64_t n, int64_t y, int64_t x) const { return n * image + y * row + x * pixel; }
};

// Calls f(count, ld, n, y, x) for each side of a block of pixels, along which they are `count`,
// from (n, y, x) on and `ld` of the strides apart. Sides that go on in all of the strides are one.
template <class F, class... strides_t>
void for_each_side(int64_t images, int64_t rows, int64_t cols, const F& f,
                   const strides_t&... strides) {
  constexpr int64_t kLong = 12;  // as good as any longer side, and its pixels are neighbours
  if (((strides.row == cols * strides.pixel) && ...)) cols *= std::exchange(rows, 1);
  if (rows == 1 && ((strides.image == cols * strides.pixel) && ...))
    cols *= std::exchange(images, 1);
  if (cols >= kLong || cols >= std::max(rows, images)) {
    for (int64_t n = 0; n < images; ++n)
      for (int64_t y = 0; y < rows; ++y) f(cols, &Strides::pixel, n, y, 0);
  } else if (rows >= std::min(kLong, images)) {
    for (int64_t n = 0; n < images; ++n)
      for (int64_t x = 0; x < cols; ++x) f(rows, &Strides::row, n, 0, x);
  } else {
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < cols; ++x) f(images, &Strides::image, 0, y, x);
  }
}

// Where the sums of pixels are, and where they go rounded, which is null where they stay.
template <class sum_t, class scalar_t>
struct Outputs {
  sum_t* sums;
  Strides strides;
  scalar_t* rounded = nullptr;
  Strides places = {};

  Outputs from(int64_t y, int64_t x) const {
    Outputs result = *this;
    result.sums += strides.at(0, y, x);
    if (rounded != nullptr) result.rounded += places.at(0, y, x);
    return result;
  }
  // Those of a phase.
  Outputs every(int64_t row_step, int64_t col_step) const {
    const auto wider = [&](const Strides& s) {
      return Strides{s.image, s.row * row_step, s.pixel * col_step};
    };
    return {sums, wider(strides), rounded, wider(places)};
  }
};

// c[n, y, x, :] = before + a[n, y, x, :] b for a block of pixels and the sum over some factors, one
// product along a side of the block. Before is c itself or, where `fresh`, the bias or nothing.
template <class operand_t, class sum_t, class scalar_t>
void multiply(int64_t images, int64_t rows, int64_t cols, int64_t depth, int64_t width,
              const Factors<operand_t>* factors, int64_t count, Strides from, int64_t ldb,
              const Outputs<sum_t, scalar_t>& out, bool fresh, const sum_t* bias) {
  const bool rounds = out.rounded != nullptr;
  for_each_side(
      images, rows, cols,
      [&](int64_t m, int64_t Strides::* ld, int64_t n, int64_t y, int64_t x) {
        const FactorStrides strides{.lda = from.*ld, .ldb = ldb, .shift = from.at(n, y, x)};
        sum_t* const c = out.sums + out.strides.at(n, y, x);
        const int64_t ldc = out.strides.*ld;
        const Addend<sum_t> before = fresh ? Addend<sum_t>{bias, 0} : Addend<sum_t>{c, ldc};
        if constexpr (std::is_same_v<scalar_t, at::BFloat16> &&
                      std::is_same_v<operand_t, at::BFloat16>) {
          if (rounds) {
            const Rounded rounded{out.rounded + out.places.at(n, y, x), out.places.*ld};
            return matmul_rounded(m, width, depth, factors, count, strides, c, ldc, before,
                                  rounded);
          }
        }
        matmul_of_factors(m, width, depth, factors, count, strides, c, ldc, before);
      },
      from, out.strides, rounds ? out.places : out.strides);
}

// Where the taps that meet an axis' outputs change, within some outputs.
std::vector<Interval> bands(const TapAxis& axis, Interval outputs) {
  std::vector<int64_t> edges{outputs.begin, outputs.end};
  for (int64_t t = 0; t < axis.taps(); ++t) {
    const Interval inside = intersect(outputs, axis.inside(t));
    if (length(inside) == 0) continue;  // it may lie past them
    edges.push_back(inside.begin);
    edges.push_back(inside.end);
  }
  std::sort(edges.begin(), edges.end());
  std::vector<Interval> result;
  for (size_t i = 0; i + 1 < edges.size(); ++i)
    if (edges[i] < edges[i + 1]) result.push_back({edges[i], edges[i + 1]});
  return result;
}

// --------------------------------------------------------------------------------------- tasks

// How a correlation is cut: by images, rows of the result, and blocks of output channels. It
// depends on the shapes alone.
struct Cut {
  int64_t images, rows, blocks;  // of a task
  // `together`: images that share what a block of many weights costs to read.
  Cut(const Correlation& k, int64_t together) {
    const int64_t source_row = k.W_in * k.depth() * k.phases[0].rows.step / k.row_step;
    const int64_t row = std::max<int64_t>({1, source_row, k.W_out * k.block()});
    const int64_t weights = k.taps * k.in_channels * k.block();
    const int64_t fitting = std::max(k.row_step, kStripElements / row);
    blocks = k.blocks();
    images = 1;
    if (fitting >= k.H_out) {
      const int64_t least = weights > kStripElements / 2 ? together : 1;
      images = std::clamp(fitting / k.H_out, std::min(least, k.images), k.images);
      // As many tasks as a multiple of kTasks, for an even load.
      const int64_t rounds = ceil_div(ceil_div(k.images, images), kTasks);
      images = std::max<int64_t>(1, ceil_div(k.images, rounds * kTasks));
      if (least > 1) images = std::max(images, std::min<int64_t>(least, k.images / 2));
    }
    const int64_t parts = ceil_div(kTasks, k.groups * ceil_div(k.images, images));
    int64_t strips = ceil_div(k.H_out, fitting);
    // What is less to read again is split: the source is by each block, the weights by each strip.
    if (weights * blocks > k.W_in * k.H_in * k.in_channels) {
      blocks = ceil_div(blocks, std::min(blocks, ceil_div(parts, strips)));
    } else {
      strips = std::max(strips, std::min(parts, ceil_div(k.H_out, 4)));
    }
    // Strips after all where that leaves less than a few threads have to do.
    const int64_t tasks = k.groups * ceil_div(k.images, images) * ceil_div(k.blocks(), blocks);
    strips = std::max(strips, std::min(ceil_div(kLeastTasks, tasks), ceil_div(k.H_out, 4)));
    rows = std::min(k.H_out, ceil_div(ceil_div(k.H_out, strips), k.row_step) * k.row_step);
  }
};

// Whether each output pixel of a phase is in the first product of one band and one segment: that
// one writes it, and nothing needs to be there before.
bool writes_all(const Phase& phase) {
  int64_t column = 0;
  for (const Segment& segment : phase.segments) {
    if (segment.outputs.begin != column) return false;
    column = segment.outputs.end;
  }
  const auto met = [&](const Interval& band) {
    for (int64_t i = 0; i < phase.rows.taps(); ++i)
      if (length(intersect(band, phase.rows.inside(i))) > 0) return true;
    return false;
  };
  const std::vector<Interval> all = bands(phase.rows, {0, phase.rows.outputs});
  return column == phase.cols.outputs && std::all_of(all.begin(), all.end(), met);
}

// float32 numbers as operands in bfloat16 are split in parts (conv2d_parts.h): then the correlation
// has three channels for each of the source's, and the weight is split already.
template <class scalar_t, class operand_t>
class Strips {
  using sum_t = at::opmath_type<scalar_t>;
  // Whether products take the source as it is, and leave the result as it is.
  static constexpr bool kTakes = std::is_same_v<scalar_t, operand_t>;
  static constexpr bool kLeaves = std::is_same_v<scalar_t, sum_t>;
  static constexpr bool kRounds = kTakes && std::is_same_v<scalar_t, at::BFloat16>;
  static constexpr bool kSplits = !kTakes && std::is_same_v<operand_t, at::BFloat16>;
  using weight_t = std::conditional_t<kSplits, operand_t, scalar_t>;

 public:
  Strips(Correlation& k, const ImageView<scalar_t>& source, const at::Tensor& weight,
         const sum_t* bias, scalar_t* result)
      : k_(prepared(k, source)),
        source_(source),
        weights_(k_, weight),
        bias_(bias),
        result_(result),
        cut_(k_, kLeaves ? 16 : 8),  // low precision takes copies of them
        fresh_(std::all_of(k_.phases.begin(), k_.phases.end(), writes_all)),
        rounds_(kRounds && fresh_ && source_.last && rounds_products()) {
    if (!k_.unfolded.empty())
      unfolder_.emplace(source_, k_.in_channels, k_.unfolded[0], k_.unfolded[1], k_.pad);
  }

  // False, and the result is not worked out, where a number of the source cannot be split.
  bool run() {
    const int64_t images = ceil_div(k_.images, cut_.images), strips = ceil_div(k_.H_out, cut_.rows);
    const int64_t splits = ceil_div(k_.blocks(), cut_.blocks);
    const int64_t work = cut_.images * cut_.rows * k_.W_out * k_.taps * k_.in_channels;
    at::parallel_for(
        0, k_.groups * images * strips * splits, grain(work), [&](int64_t begin, int64_t end) {
          Scratch scratch(
              Scratch::size<operand_t>(source_size()) + Scratch::size<operand_t>(space_size()) +
              Scratch::size<scalar_t>(whole_size()) + Scratch::size<sum_t>(result_size()));
          operand_t* source = scratch.take<operand_t>(source_size());
          operand_t* space = scratch.take<operand_t>(space_size());
          scalar_t* whole = scratch.take<scalar_t>(whole_size());
          sum_t* result = scratch.take<sum_t>(result_size());
          for (int64_t task = begin; task < end; ++task) {
            const int64_t split = task % splits, strip = task / splits % strips;
            const int64_t image = task / splits / strips % images;
            const int64_t first = image * cut_.images, row = strip * cut_.rows;
            Task t{task / splits / strips / images,
                   {first, std::min(k_.images, first + cut_.images)},
                   {row, std::min(k_.H_out, row + cut_.rows)}};
            if (!load(t, source, space, whole)) can_split_ = false;
            if (!can_split_) return;
            for (int64_t block = split * cut_.blocks;
                 block < std::min(k_.blocks(), (split + 1) * cut_.blocks); ++block)
              compute(t, block, result);
          }
        });
    return can_split_;
  }

 private:
  struct Task {
    int64_t group;
    Interval images, rows;
    // The source: its first row, and where that stands.
    int64_t source_row = 0;
    const operand_t* source = nullptr;
    Strides strides = {};
  };

  static const Correlation& prepared(Correlation& k, const ImageView<scalar_t>& source) {
    k.finish(!reads_in_place(k, source) || k.groups == 1);
    return k;
  }
  static bool reads_in_place(const Correlation& k, const ImageView<scalar_t>& source) {
    return kTakes && source.last && k.unfolded.empty();
  }
  bool reads_in_place() const { return reads_in_place(k_, source_); }
  bool writes_in_place() const { return kLeaves && source_.last; }
  int64_t source_size() const {
    if (reads_in_place()) return 0;
    if (unfolder_) return cut_.images * unfolder_->size(cut_.rows);
    return cut_.images * most_rows() * k_.W_in * k_.depth();
  }
  // Rows of the source that a strip meets at most.
  int64_t most_rows() const {
    int64_t rows = 0;
    for (int64_t row = 0; row < k_.H_out; row += cut_.rows)
      rows = std::max(rows, length(source_interval({row, std::min(k_.H_out, row + cut_.rows)})));
    return rows;
  }
  // The source's own channels in a group.
  int64_t channels() const { return kSplits ? k_.in_channels / kParts : k_.in_channels; }
  // A strip of an image before it is split.
  int64_t whole_size() const { return kSplits ? most_rows() * k_.W_in * channels() : 0; }
  int64_t space_size() const { return unfolder_ ? unfolder_->space_size(cut_.rows) : 0; }
  int64_t result_size() const {
    return writes_in_place() ? 0 : cut_.images * cut_.rows * k_.W_out * k_.block();
  }

  // A phase's outputs in the result's rows.
  Interval phase_rows(const Phase& phase, Interval rows) const {
    const auto first = [&](int64_t row) {
      return std::clamp<int64_t>(ceil_div(std::max<int64_t>(0, row - phase.row0), k_.row_step), 0,
                                 phase.rows.outputs);
    };
    return {first(rows.begin), first(rows.end)};
  }
  // The source rows that a strip needs.
  Interval source_interval(Interval rows) const {
    Interval result{k_.H_in, 0};
    for (const Phase& phase : k_.phases) {
      for (int64_t i = 0; i < phase.rows.taps(); ++i) {
        const Interval y = intersect(phase_rows(phase, rows), phase.rows.inside(i));
        if (length(y) == 0) continue;
        const int64_t step = phase.rows.step, offset = phase.rows.offset(i);
        result.begin = std::min(result.begin, y.begin * step + offset);
        result.end = std::max(result.end, (y.end - 1) * step + offset + 1);
      }
    }
    return {std::min(result.begin, result.end), result.end};
  }

  // Reads the images where they are, or makes a channels_last copy of the strip. False where it
  // cannot be split.
  bool load(Task& task, operand_t* to, operand_t* space, scalar_t* whole) const {
    const Interval rows = source_interval(task.rows);
    const int64_t c0 = task.group * channels();
    task.source_row = rows.begin;
    if constexpr (kTakes) {
      if (reads_in_place()) {
        const int64_t row = source_.W * source_.channels;
        task.source = source_.at(task.images.begin, c0, rows.begin, 0);
        task.strides = {source_.H * row, row, source_.channels};
        return true;
      }
    }
    const int64_t row = k_.W_in * k_.depth();
    task.source = to;
    task.strides = {length(rows) * row, row, k_.depth()};
    for (int64_t n = task.images.begin; n < task.images.end; ++n, to += task.strides.image) {
      if constexpr (kSplits) {
        fill_strip(source_, n, {c0, c0 + channels()}, rows, {0, k_.W_in}, whole);
        if (!split_pixels(whole, length(rows) * k_.W_in, channels(), to)) return false;
      } else if (unfolder_) {
        unfolder_->fill(n, c0, rows, space, to);
      } else {
        fill_strip(source_, n, {c0, c0 + channels()}, rows, {0, k_.W_in}, to);
      }
    }
    return true;
  }

  using Out = Outputs<sum_t, scalar_t>;

  void compute(const Task& task, int64_t block, sum_t* space) const {
    const int64_t first = block * k_.block();
    const int64_t width = std::min(k_.block(), k_.out_channels - first);
    const int64_t o0 = task.group * k_.out_channels + first;
    const int64_t channels = k_.groups * k_.out_channels, row = k_.W_out * channels;
    const Strides places{k_.H_out * row, row, channels};
    scalar_t* const result = result_ + (task.images.begin * k_.H_out + task.rows.begin) * row + o0;
    Out out{space, {length(task.rows) * k_.W_out * width, k_.W_out * width, width}};
    if constexpr (kLeaves) {
      if (writes_in_place()) out = {result, places};
    }
    if (rounds_) {
      out.rounded = result;
      out.places = places;
    }
    const sum_t* bias = bias_ == nullptr ? nullptr : bias_ + o0;
    if (!fresh_) begin(task, bias, width, out.sums, out.strides);
    const operand_t* weights = weights_.block(task.group, block);
    for (const Phase& phase : k_.phases) {
      const Interval y = phase_rows(phase, task.rows);
      const Out corner =
          out.from(phase.row0 - task.rows.begin, phase.col0).every(k_.row_step, k_.col_step);
      for (const Interval& band : bands(phase.rows, y))
        add_band(task, phase, band, weights, bias, width, corner);
    }
    if (!writes_in_place() && !rounds_) store(task, o0, width, space);
  }

  // Adds up the kernel rows that meet a band of outputs.
  void add_band(const Task& task, const Phase& phase, Interval band, const operand_t* weights,
                const sum_t* bias, int64_t width, const Out& out) const {
    const Strides& from = task.strides;
    const TapAxis& rows = phase.rows;
    for (const Segment& segment : phase.segments) {
      const int64_t x = segment.outputs.begin, j = segment.taps.begin;
      const int64_t col = x * phase.cols.step + phase.cols.offset(j);
      const int64_t depth = length(segment.taps) * k_.depth();
      std::vector<Factors<operand_t>> factors;
      for (int64_t i = 0; i < rows.taps(); ++i) {
        const Interval inside = rows.inside(i);
        if (band.begin < inside.begin || band.end > inside.end) continue;
        const int64_t row = band.begin * rows.step + rows.offset(i) - task.source_row;
        const int64_t tap = phase.first_tap + i * phase.cols.taps() + j;
        factors.push_back({task.source + row * from.row + col * from.pixel,
                           weights + tap * k_.in_channels * k_.block()});
      }
      // As many at a time as are summed in registers.
      const int64_t all = static_cast<int64_t>(factors.size());
      const int64_t together = std::max<int64_t>(1, kTerms / std::max<int64_t>(1, depth));
      Out to = out.from(band.begin, x);
      scalar_t* const rounded = to.rounded;
      for (int64_t f = 0; f < all; f += together) {
        to.rounded = f + together < all ? nullptr : rounded;
        multiply(length(task.images), length(band), length(segment.outputs), depth, width,
                 factors.data() + f, std::min(together, all - f),
                 {from.image, from.row * rows.step, from.pixel * phase.cols.step}, k_.block(), to,
                 fresh_ && f == 0, bias);
      }
    }
  }

  void begin(const Task& task, const sum_t* bias, int64_t width, sum_t* to, Strides strides) const {
    const int64_t pixels = length(task.rows) * k_.W_out;
    for (int64_t n = 0; n < length(task.images); ++n, to += strides.image) {
      if (bias == nullptr && strides.pixel == width) {
        std::fill_n(to, pixels * width, sum_t(0));
        continue;
      }
      for (int64_t p = 0; p < pixels; ++p) {
        if (bias == nullptr) {
          std::fill_n(to + p * strides.pixel, width, sum_t(0));
        } else {
          std::copy_n(bias, width, to + p * strides.pixel);
        }
      }
    }
  }

  void store(const Task& task, int64_t o0, int64_t width, const sum_t* from) const {
    const auto flip = DLOPS_SIMD(transpose, sum_t, scalar_t);
    const auto convert = DLOPS_SIMD(convert_row, sum_t, scalar_t);
    const int64_t pixels = length(task.rows) * k_.W_out, plane = k_.H_out * k_.W_out;
    const int64_t channels = k_.groups * k_.out_channels, first = task.rows.begin * k_.W_out;
    for (int64_t n = task.images.begin; n < task.images.end; ++n, from += pixels * width) {
      if (source_.last) {
        scalar_t* to = result_ + (n * plane + first) * channels + o0;
        if (width == channels) {
          convert(from, to, pixels * width);
          continue;
        }
        for (int64_t p = 0; p < pixels; ++p) convert(from + p * width, to + p * channels, width);
      } else {
        flip(from, width, pixels, width, result_ + (n * channels + o0) * plane + first, plane);
      }
    }
  }

  const Correlation& k_;
  const ImageView<scalar_t> source_;
  const PackedWeights<weight_t, operand_t> weights_;
  const sum_t* bias_;
  scalar_t* result_;
  const Cut cut_;
  const bool fresh_, rounds_;
  std::optional<Unfolder<scalar_t, std::conditional_t<kSplits, scalar_t, operand_t>>> unfolder_;
  std::atomic<bool> can_split_ = true;
};

template <class scalar_t>
ImageView<scalar_t> view(const at::Tensor& images, at::MemoryFormat format) {
  return {images.const_data_ptr<scalar_t>(), images.size(1), images.size(2), images.size(3),
          format == at::MemoryFormat::ChannelsLast};
}

void correlate(Correlation k, const at::Tensor& source, const at::Tensor& weight,
               const at::Tensor& bias, const at::Tensor& result, at::MemoryFormat format) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, source.scalar_type(), "conv2d", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const ImageView<scalar_t> images = view<scalar_t>(source, format);
    const sum_t* sum_bias = bias.defined() ? bias.const_data_ptr<sum_t>() : nullptr;
    scalar_t* data = result.mutable_data_ptr<scalar_t>();
    if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      const bool even = k.in_channels % 2 == 0;
      if (multiplies_bfloat16() && (even || !k.unfolded.empty())) {
        k.pad = even ? 0 : k.weight_rows() % 2;
        Strips<scalar_t, scalar_t>(k, images, weight, sum_bias, data).run();
        return;
      }
    }
    Strips<scalar_t, sum_t>(k, images, weight, sum_bias, data).run();
  });
}

// The same of float32 in parts. `parts`: of the weight.
bool correlate_parts(Correlation k, const at::Tensor& source, const at::Tensor& parts,
                     const at::Tensor& bias, const at::Tensor& result, at::MemoryFormat format) {
  k.in_channels *= kParts;
  return Strips<float, at::BFloat16>(k, view<float>(source, format), parts,
                                     bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                                     result.mutable_data_ptr<float>())
      .run();
}

}  // namespace

bool takes_strips(const Conv2dGeometry& g, at::ScalarType dtype, at::MemoryFormat format) {
  const bool floating =
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
  constexpr int64_t kLargePlane = 64;
  // Strides far past the image would make strips of padding.
  const auto compact = [](int64_t outputs, int64_t size, int64_t stride) {
    return outputs <= 1 || stride / 4 <= (size + 64) / (outputs - 1);
  };
  // Contiguous planes that are read as they are need not be turned round.
  const bool planes = format == at::MemoryFormat::Contiguous && g.R == 1 && g.S == 1 &&
                      g.stride_h == 1 && g.stride_w == 1 && g.pad_top == 0 && g.pad_left == 0 &&
                      g.OH == g.H && g.OW == g.W && g.output_pixels() >= kLargePlane &&
                      !(dtype == at::kBFloat16 && multiplies_bfloat16());
  return floating && !has_thin_groups(g) && !planes && compact(g.OH, g.H, g.stride_h) &&
         compact(g.OW, g.W, g.stride_w);
}

void strips_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                    const at::Tensor& bias, const at::Tensor& output, at::MemoryFormat format) {
  const bool in_place = format == at::MemoryFormat::ChannelsLast &&
                        at::toOpMathType(input.scalar_type()) == input.scalar_type();
  correlate(forward_correlation(g, !in_place), input, weight, bias, output, format);
}

bool strips_forward_by_parts(const Conv2dGeometry& g, const at::Tensor& input,
                             const at::Tensor& weight, const at::Tensor& bias,
                             const at::Tensor& output, at::MemoryFormat format) {
  const at::Tensor parts = weight_parts(weight, 1, 1);
  return parts.defined() && correlate_parts(forward_correlation(g, /*copied=*/false), input, parts,
                                            bias, output, format);
}

bool strips_grad_input_by_parts(const Conv2dGeometry& g, const at::Tensor& grad_output,
                                const at::Tensor& weight, const at::Tensor& grad_input,
                                at::MemoryFormat format) {
  const at::Tensor parts = weight_parts(weight, 0, g.groups);
  return parts.defined() &&
         correlate_parts(backward_correlation(g), grad_output, parts, {}, grad_input, format);
}

void strips_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& weight, const at::Tensor& grad_input,
                       at::MemoryFormat format) {
  correlate(backward_correlation(g), grad_output, weight, {}, grad_input, format);
}

}  // namespace dlops::cpu
