#include "cpu/conv2d_strips.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <utility>

#include "cpu/conv2d_strip_copies.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"

namespace dlops::cpu {
namespace {

// What a strip of images may take beside the weights in a second-level cache, in elements.
constexpr int64_t kStripElements = 64 * 1024;
// Outputs whose weights stand together: four vectors of AVX-512, eight of AVX2.
constexpr int64_t kBlock = 64;
// Tasks that keep a few threads evenly busy.
constexpr int64_t kTasks = 8;

// The output pixels (row0 + y * row_step, col0 + x * col_step) of a correlation.
struct Phase {
  TapAxis rows, cols;
  std::vector<Segment> segments;
  int64_t row0, col0;
  int64_t first_tap;  // among the taps of all phases
};

// output[n, row, col, o] = sum over taps and c of source[n, row', col', c] * weight[tap, c, o], for
// each group. The forward pass is one; the gradient of the input is one with a phase for each
// position within the stride.
struct Correlation {
  int64_t images, groups;
  int64_t in_channels, out_channels;  // of a group
  int64_t H_in, W_in, H_out, W_out;
  int64_t row_step, col_step;
  bool from_outputs;  // the source is in the place of the convolution's output
  int64_t kernel_cols;
  std::vector<Phase> phases = {};
  int64_t taps = 0;
  // For each kernel cell the place of its weights, in taps; -1 where it never meets the image.
  std::vector<int64_t> places = {};
  // Few channels go through im2col: then phases[0] is a 1x1 correlation of the columns.
  std::vector<TapAxis> unfolded = {};

  int64_t block() const {
    const int64_t blocks = ceil_div(out_channels, kBlock);
    return std::min(out_channels, ceil_div(ceil_div(out_channels, blocks), 16) * 16);
  }
  int64_t blocks() const { return ceil_div(out_channels, block()); }
  // Channels of a pixel of the source that products read.
  int64_t depth() const { return unfolded.empty() ? in_channels : taps * in_channels; }

  void add(const TapAxis& rows, const TapAxis& cols, int64_t row0, int64_t col0) {
    Phase phase{live(rows), live(cols), {}, row0, col0, taps};
    for (int64_t i = 0; i < phase.rows.taps(); ++i)
      for (int64_t j = 0; j < phase.cols.taps(); ++j)
        places[static_cast<size_t>(phase.rows.cell(i) * kernel_cols + phase.cols.cell(j))] = taps++;
    phases.push_back(std::move(phase));
  }
  // Of a single phase.
  void unfold() {
    Phase& phase = phases[0];
    const auto same = [](const TapAxis& axis) {
      return TapAxis{axis.outputs, axis.outputs, 1, {0}, {0}};
    };
    TapAxis rows = same(phase.rows), cols = same(phase.cols);
    unfolded = {std::exchange(phase.rows, rows), std::exchange(phase.cols, cols)};
    H_in = H_out;
    W_in = W_out;
  }
  // `adjacent`: a pixel's channels follow those of the pixel before it.
  void finish(bool adjacent) {
    for (Phase& phase : phases) phase.segments = segments(phase.cols, adjacent);
  }
};

constexpr int64_t kFewChannels = 8;

Correlation forward_correlation(const Conv2dGeometry& g) {
  Correlation result{g.N,
                     g.groups,
                     g.channels_per_group(),
                     g.outputs_per_group(),
                     g.H,
                     g.W,
                     g.OH,
                     g.OW,
                     1,
                     1,
                     /*from_outputs=*/false,
                     g.S};
  result.places.assign(static_cast<size_t>(g.R * g.S), -1);
  result.add(forward_axis(g.OH, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h),
             forward_axis(g.OW, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w), 0, 0);
  if (result.taps > 1 && g.channels_per_group() <= kFewChannels) result.unfold();
  return result;
}

// Never through im2col: its zeros beside the gradient, times a weight that is not finite, would
// give NaN where there is no product.
Correlation backward_correlation(const Conv2dGeometry& g) {
  Correlation result{g.N,
                     g.groups,
                     g.outputs_per_group(),
                     g.channels_per_group(),
                     g.OH,
                     g.OW,
                     g.H,
                     g.W,
                     g.stride_h,
                     g.stride_w,
                     /*from_outputs=*/true,
                     g.S};
  result.places.assign(static_cast<size_t>(g.R * g.S), -1);
  for (int64_t a = 0; a < std::min(g.stride_h, g.H); ++a)
    for (int64_t b = 0; b < std::min(g.stride_w, g.W); ++b)
      result.add(backward_axis(g.OH, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h, a),
                 backward_axis(g.OW, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w, b), a, b);
  return result;
}

// ------------------------------------------------------------------------------------- weights

// The weights as [group][block][tap][in channel][out channel of the block].
template <class sum_t>
class PackedWeights {
 public:
  PackedWeights(const Correlation& k, const at::Tensor& weight)
      : k_(k), C_(weight.size(1)), cells_(weight.size(2) * weight.size(3)) {
    at::Tensor dense = weight.to(c10::CppTypeToScalarType<sum_t>::value);
    if (!dense.is_contiguous() && !dense.is_contiguous(at::MemoryFormat::ChannelsLast))
      dense = dense.contiguous();
    last_ = !dense.is_contiguous();
    from_ = dense.const_data_ptr<sum_t>();
    tensor_ = at::empty({k.groups * k.blocks() * block_size()}, dense.options());
    to_ = tensor_.mutable_data_ptr<sum_t>();
    pack();
  }
  const sum_t* block(int64_t group, int64_t block) const {
    return to_ + (group * k_.blocks() + block) * block_size();
  }

 private:
  static constexpr int64_t kChunk = 16;  // input channels at a time
  int64_t cells() const { return cells_; }
  int64_t block_size() const { return k_.taps * k_.in_channels * k_.block(); }
  int64_t place(int64_t cell) const { return k_.places[static_cast<size_t>(cell)]; }
  sum_t* destination(int64_t group, int64_t block, int64_t cell, int64_t in) const {
    return to_ + (group * k_.blocks() + block) * block_size() +
           (place(cell) * k_.in_channels + in) * k_.block();
  }

  void pack() {
    const int64_t chunks = ceil_div(k_.in_channels, kChunk);
    const int64_t tasks = k_.groups * k_.blocks() * chunks;
    at::parallel_for(
        0, tasks, grain(kChunk * cells() * k_.block()), [&](int64_t begin, int64_t end) {
          Scratch scratch(Scratch::size<sum_t>(kChunk * cells() * k_.block()));
          sum_t* space = scratch.take<sum_t>(kChunk * cells() * k_.block());
          for (int64_t task = begin; task < end; ++task) {
            const int64_t block = task / chunks % k_.blocks(), group = task / chunks / k_.blocks();
            const int64_t in = task % chunks * kChunk, out = block * k_.block();
            const Interval ins{in, std::min(k_.in_channels, in + kChunk)};
            const int64_t width = std::min(k_.block(), k_.out_channels - out);
            if (k_.from_outputs) {
              pack_by_inputs(group, block, ins, {out, out + width}, space);
            } else {
              pack_by_outputs(group, block, ins, {out, out + width}, space);
            }
          }
        });
  }

  // `out` are the weight's outputs, `in` its channels.
  void pack_by_outputs(int64_t group, int64_t block, Interval in, Interval out, sum_t* space) {
    const auto flip = DLOPS_SIMD(transpose, sum_t, sum_t);
    const int64_t width = length(out), count = length(in), ld = C_ * cells();
    const sum_t* outputs = from_ + (group * k_.out_channels + out.begin) * ld;
    if (last_ || cells() == 1) {
      for (int64_t cell = 0; cell < cells(); ++cell)
        if (place(cell) >= 0)
          flip(outputs + cell * C_ + in.begin, ld, width, count,
               destination(group, block, cell, in.begin), k_.block());
      return;
    }
    flip(outputs + in.begin * cells(), ld, width, count * cells(), space, width);
    for (int64_t c = 0; c < count; ++c)
      for (int64_t cell = 0; cell < cells(); ++cell)
        if (place(cell) >= 0)
          std::copy_n(space + (c * cells() + cell) * width, width,
                      destination(group, block, cell, in.begin + c));
  }

  // `out` are the weight's channels, `in` its outputs.
  void pack_by_inputs(int64_t group, int64_t block, Interval in, Interval out, sum_t* space) {
    const auto flip = DLOPS_SIMD(transpose, sum_t, sum_t);
    const int64_t width = length(out);
    for (int64_t o = in.begin; o < in.end; ++o) {
      const sum_t* output = from_ + (group * k_.in_channels + o) * C_ * cells();
      const bool as_is = last_ || cells() == 1;
      if (!as_is) flip(output + out.begin * cells(), cells(), width, cells(), space, width);
      for (int64_t cell = 0; cell < cells(); ++cell)
        if (place(cell) >= 0)
          std::copy_n(as_is ? output + cell * C_ + out.begin : space + cell * width, width,
                      destination(group, block, cell, o));
    }
  }

  const Correlation& k_;
  int64_t C_, cells_;
  bool last_;
  const sum_t* from_;
  at::Tensor tensor_;
  sum_t* to_;
};

// ------------------------------------------------------------------------------------ products

struct Strides {
  int64_t image, row, pixel;
};

// c[n, y, x, :] += a[n, y, x, :] b for a block of pixels, one product along a side of it.
template <class sum_t>
void multiply(int64_t images, int64_t rows, int64_t cols, int64_t depth, int64_t width,
              const sum_t* a, Strides sa, const sum_t* b, int64_t ldb, sum_t* c, Strides sc) {
  constexpr int64_t kLong = 12;  // as good as any longer side, and its pixels are neighbours
  if (sa.row == cols * sa.pixel && sc.row == cols * sc.pixel) cols *= std::exchange(rows, 1);
  if (rows == 1 && sa.image == cols * sa.pixel && sc.image == cols * sc.pixel)
    cols *= std::exchange(images, 1);
  if (cols >= kLong || cols >= std::max(rows, images)) {
    for (int64_t n = 0; n < images; ++n)
      for (int64_t y = 0; y < rows; ++y)
        matmul(cols, width, depth, a + n * sa.image + y * sa.row, sa.pixel, b, ldb,
               c + n * sc.image + y * sc.row, sc.pixel, true);
  } else if (rows >= std::min(kLong, images)) {
    for (int64_t n = 0; n < images; ++n)
      for (int64_t x = 0; x < cols; ++x)
        matmul(rows, width, depth, a + n * sa.image + x * sa.pixel, sa.row, b, ldb,
               c + n * sc.image + x * sc.pixel, sc.row, true);
  } else {
    for (int64_t y = 0; y < rows; ++y)
      for (int64_t x = 0; x < cols; ++x)
        matmul(images, width, depth, a + y * sa.row + x * sa.pixel, sa.image, b, ldb,
               c + y * sc.row + x * sc.pixel, sc.image, true);
  }
}

// --------------------------------------------------------------------------------------- tasks

// How a correlation is cut: by images, rows of the result, and blocks of output channels. It
// depends on the shapes alone.
struct Cut {
  int64_t images, rows, blocks;  // of a task
  Cut(const Correlation& k) {
    const int64_t source_row = k.W_in * k.depth() * k.phases[0].rows.step / k.row_step;
    const int64_t row = std::max<int64_t>({1, source_row, k.W_out * k.block()});
    const int64_t weights = k.taps * k.in_channels * k.block();
    const int64_t fitting = std::max(k.row_step, kStripElements / row);
    blocks = k.blocks();
    images = 1;
    if (fitting >= k.H_out) {
      // Several images share what a block of many weights costs to read.
      const int64_t least = weights > kStripElements / 2 ? 16 : 1;
      images = std::clamp(fitting / k.H_out, std::min(least, k.images), k.images);
      // As many tasks as a multiple of kTasks, for an even load.
      const int64_t rounds = ceil_div(ceil_div(k.images, images), kTasks);
      images = std::max<int64_t>(1, ceil_div(k.images, rounds * kTasks));
      if (least > 1) images = std::max(images, std::min<int64_t>(least, k.images / 2));
    }
    const int64_t parts = ceil_div(kTasks, k.groups * ceil_div(k.images, images));
    int64_t strips = ceil_div(k.H_out, fitting);
    if (weights * blocks > k.W_in * k.H_in * k.in_channels) {
      blocks = ceil_div(blocks, std::min(blocks, ceil_div(parts, strips)));
    } else {
      strips = std::max(strips, std::min(parts, ceil_div(k.H_out, 4)));
    }
    rows = std::min(k.H_out, ceil_div(ceil_div(k.H_out, strips), k.row_step) * k.row_step);
  }
};

template <class scalar_t>
class Strips {
  using sum_t = at::opmath_type<scalar_t>;
  static constexpr bool kSameType = std::is_same_v<scalar_t, sum_t>;

 public:
  Strips(Correlation& k, const ImageView<scalar_t>& source, const at::Tensor& weight,
         const sum_t* bias, scalar_t* result)
      : k_(prepared(k, source)),
        source_(source),
        weights_(k_, weight),
        bias_(bias),
        result_(result),
        cut_(k_) {
    if (!k_.unfolded.empty())
      unfolder_.emplace(source_, k_.in_channels, k_.unfolded[0], k_.unfolded[1]);
  }

  void run() {
    const int64_t images = ceil_div(k_.images, cut_.images), strips = ceil_div(k_.H_out, cut_.rows);
    const int64_t splits = ceil_div(k_.blocks(), cut_.blocks);
    const int64_t work = cut_.images * cut_.rows * k_.W_out * k_.taps * k_.in_channels;
    at::parallel_for(
        0, k_.groups * images * strips * splits, grain(work), [&](int64_t begin, int64_t end) {
          Scratch scratch(Scratch::size<sum_t>(source_size()) + Scratch::size<sum_t>(space_size()) +
                          Scratch::size<sum_t>(result_size()));
          sum_t* source = scratch.take<sum_t>(source_size());
          sum_t* space = scratch.take<sum_t>(space_size());
          sum_t* result = scratch.take<sum_t>(result_size());
          for (int64_t task = begin; task < end; ++task) {
            const int64_t split = task % splits, strip = task / splits % strips;
            const int64_t image = task / splits / strips % images;
            const int64_t first = image * cut_.images, row = strip * cut_.rows;
            Task t{task / splits / strips / images,
                   {first, std::min(k_.images, first + cut_.images)},
                   {row, std::min(k_.H_out, row + cut_.rows)}};
            load(t, source, space);
            for (int64_t block = split * cut_.blocks;
                 block < std::min(k_.blocks(), (split + 1) * cut_.blocks); ++block)
              compute(t, block, result);
          }
        });
  }

 private:
  struct Task {
    int64_t group;
    Interval images, rows;
    // The source: its first row, and where that stands.
    int64_t source_row = 0;
    const sum_t* source = nullptr;
    Strides strides = {};
  };

  static const Correlation& prepared(Correlation& k, const ImageView<scalar_t>& source) {
    k.finish(!reads_in_place(k, source) || k.groups == 1);
    return k;
  }
  static bool reads_in_place(const Correlation& k, const ImageView<scalar_t>& source) {
    return kSameType && source.last && k.unfolded.empty();
  }
  bool reads_in_place() const { return reads_in_place(k_, source_); }
  bool writes_in_place() const { return kSameType && source_.last; }
  int64_t source_size() const {
    if (reads_in_place()) return 0;
    if (unfolder_) return cut_.images * unfolder_->size(cut_.rows);
    int64_t rows = 0;
    for (int64_t row = 0; row < k_.H_out; row += cut_.rows)
      rows = std::max(rows, length(source_interval({row, std::min(k_.H_out, row + cut_.rows)})));
    return cut_.images * rows * k_.W_in * k_.depth();
  }
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

  // Reads the images where they are, or makes a channels_last copy of the strip.
  void load(Task& task, sum_t* to, sum_t* space) const {
    const Interval rows = source_interval(task.rows);
    const int64_t c0 = task.group * k_.in_channels;
    task.source_row = rows.begin;
    if constexpr (kSameType) {
      if (reads_in_place()) {
        const int64_t row = source_.W * source_.channels;
        task.source = source_.at(task.images.begin, c0, rows.begin, 0);
        task.strides = {source_.H * row, row, source_.channels};
        return;
      }
    }
    const int64_t row = k_.W_in * k_.depth();
    task.source = to;
    task.strides = {length(rows) * row, row, k_.depth()};
    for (int64_t n = task.images.begin; n < task.images.end; ++n, to += task.strides.image) {
      if (unfolder_) {
        unfolder_->fill(n, c0, rows, space, to);
      } else {
        fill_strip(source_, n, {c0, c0 + k_.in_channels}, rows, {0, k_.W_in}, to);
      }
    }
  }

  void compute(const Task& task, int64_t block, sum_t* space) const {
    const int64_t first = block * k_.block();
    const int64_t width = std::min(k_.block(), k_.out_channels - first);
    const int64_t o0 = task.group * k_.out_channels + first;
    const int64_t channels = k_.groups * k_.out_channels;
    sum_t* to = space;
    Strides strides{length(task.rows) * k_.W_out * width, k_.W_out * width, width};
    if constexpr (kSameType) {
      if (writes_in_place()) {
        const int64_t row = k_.W_out * channels;
        to = result_ + (task.images.begin * k_.H_out + task.rows.begin) * row + o0;
        strides = {k_.H_out * row, row, channels};
      }
    }
    begin(task, bias_ == nullptr ? nullptr : bias_ + o0, width, to, strides);
    const sum_t* weights = weights_.block(task.group, block);
    for (const Phase& phase : k_.phases) {
      const Interval y = phase_rows(phase, task.rows);
      sum_t* corner =
          to + (phase.row0 - task.rows.begin) * strides.row + phase.col0 * strides.pixel;
      const Strides steps{strides.image, strides.row * k_.row_step, strides.pixel * k_.col_step};
      for (int64_t i = 0; i < phase.rows.taps(); ++i)
        add_row_tap(task, phase, i, y, weights, width, corner, steps);
    }
    if (!writes_in_place()) store(task, o0, width, to);
  }

  // Adds what the kernel row of a tap gives to a phase's outputs.
  void add_row_tap(const Task& task, const Phase& phase, int64_t i, Interval rows,
                   const sum_t* weights, int64_t width, sum_t* to, Strides strides) const {
    const int64_t step = phase.rows.step, offset = phase.rows.offset(i);
    const Interval y = intersect(rows, phase.rows.inside(i));
    if (length(y) == 0) return;
    const Strides& from = task.strides;
    for (const Segment& segment : phase.segments) {
      const int64_t x = segment.outputs.begin, j = segment.taps.begin;
      const int64_t col = x * phase.cols.step + phase.cols.offset(j);
      multiply(
          length(task.images), length(y), length(segment.outputs),
          length(segment.taps) * k_.depth(), width,
          task.source + (y.begin * step + offset - task.source_row) * from.row + col * from.pixel,
          {from.image, from.row * step, from.pixel * phase.cols.step},
          weights + (phase.first_tap + i * phase.cols.taps() + j) * k_.in_channels * k_.block(),
          k_.block(), to + y.begin * strides.row + x * strides.pixel, strides);
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
        for (int64_t p = 0; p < pixels; ++p) convert(from + p * width, to + p * channels, width);
      } else {
        flip(from, width, pixels, width, result_ + (n * channels + o0) * plane + first, plane);
      }
    }
  }

  const Correlation& k_;
  const ImageView<scalar_t> source_;
  const PackedWeights<sum_t> weights_;
  const sum_t* bias_;
  scalar_t* result_;
  const Cut cut_;
  std::optional<Unfolder<scalar_t, sum_t>> unfolder_;
};

void correlate(Correlation k, const at::Tensor& source, const at::Tensor& weight,
               const at::Tensor& bias, const at::Tensor& result, at::MemoryFormat format) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, source.scalar_type(), "conv2d", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const ImageView<scalar_t> images{source.const_data_ptr<scalar_t>(), source.size(1),
                                     source.size(2), source.size(3),
                                     format == at::MemoryFormat::ChannelsLast};
    Strips<scalar_t>(k, images, weight, bias.defined() ? bias.const_data_ptr<sum_t>() : nullptr,
                     result.mutable_data_ptr<scalar_t>())
        .run();
  });
}

}  // namespace

bool takes_strips(const Conv2dGeometry& g, at::ScalarType dtype, at::MemoryFormat format) {
  const bool floating =
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf;
  constexpr int64_t kThin = 8, kLargePlane = 64;
  const bool thin = g.groups > 1 && std::min(g.channels_per_group(), g.outputs_per_group()) < kThin;
  // Contiguous planes that are read as they are need not be turned round.
  const bool planes = format == at::MemoryFormat::Contiguous && g.R == 1 && g.S == 1 &&
                      g.stride_h == 1 && g.stride_w == 1 && g.pad_top == 0 && g.pad_left == 0 &&
                      g.OH == g.H && g.OW == g.W && g.output_pixels() >= kLargePlane;
  return floating && !thin && !planes;
}

void strips_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                    const at::Tensor& bias, const at::Tensor& output, at::MemoryFormat format) {
  correlate(forward_correlation(g), input, weight, bias, output, format);
}

void strips_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& weight, const at::Tensor& grad_input,
                       at::MemoryFormat format) {
  correlate(backward_correlation(g), grad_output, weight, {}, grad_input, format);
}

}  // namespace dlops::cpu
