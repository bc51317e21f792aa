#include "cpu/conv2d_winograd.h"

#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <string_view>
#include <type_traits>
#include <vector>

#include "cpu/capability.h"
#include "cpu/conv2d_winograd_tiles.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d_winograd.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {
namespace {

// Outputs at a time, whose sums stay in the second-level cache beside the transformed input.
constexpr int64_t kBlock = 64;

// A correlation by 3x3 weights: result[y, x] sees the source from row y - pad_top and column x -
// pad_left on.
struct Problem {
  int64_t images, groups, in, out;  // channels of a group
  int64_t H, W, pad_top, pad_left;  // of the source
  int64_t height, width;            // of the result
  int64_t tiles_h() const { return ceil_div(height, 2); }
  int64_t tiles_w() const { return ceil_div(width, 2); }
};

// Enough tasks to keep a few threads busy: strips of tiles, and blocks of outputs where these are
// too few. An output is the same sum in whichever task.
constexpr int64_t kTasks = 4;

// Tiles whose pixels, transformed, fit half a second-level cache of 1 MiB, but enough of them to be
// worth reading the weights.
inline TileCut cut_of(const Problem& p) {
  const int64_t all = p.images * p.groups * p.tiles_h() * p.tiles_w();
  const int64_t each = ceil_div(all * ceil_div(p.out, kBlock), kTasks);
  const int64_t fitting = std::clamp<int64_t>(8 * 1024 / p.in, 64, 96);
  return {p.images, p.tiles_h(), p.tiles_w(), std::min(fitting, std::max<int64_t>(16, each))};
}

template <class scalar_t>
class Winograd {
 public:
  // The weight and the bias are float32.
  Winograd(const Problem& p, const ImageView<scalar_t>& source, const at::Tensor& weight,
           bool turned, const float* bias, scalar_t* result)
      : p_(p),
        cut_(cut_of(p)),
        source_(source, p.pad_top, p.pad_left, p.tiles_w()),
        last_(source.last),
        bias_(bias),
        result_(result),
        failed_(static_cast<size_t>(p.images)) {
    const int64_t blocks = ceil_div(p.out, kBlock);
    weights_ = at::empty({p.groups * blocks * kPositions * position_step(p.in * kBlock)},
                         weight.options());
    const bool last =
        !weight.is_contiguous() && weight.is_contiguous(at::MemoryFormat::ChannelsLast);
    const at::Tensor dense = last ? weight : weight.contiguous();
    fill_weights(dense.const_data_ptr<float>(), last, turned, weights_.mutable_data_ptr<float>());
  }

  // The images that have a result which is not finite.
  std::vector<int64_t> run() {
    const int64_t strips = ceil_div(p_.tiles_h(), cut_.rows),
                  parts = ceil_div(p_.images, cut_.images), blocks = ceil_div(p_.out, kBlock);
    const int64_t splits = std::min(blocks, ceil_div(kTasks, p_.groups * parts * strips));
    const int64_t work = tiles() * kPositions * p_.in * p_.out / splits;
    const int64_t tasks = p_.groups * parts * strips * splits;
    at::parallel_for(0, tasks, grain(work), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<float>(strip_size()) + Scratch::size<float>(p_.in) +
                      Scratch::size<float>(kPositions * position_step(tiles() * p_.in)) +
                      Scratch::size<float>(kPositions * position_step(tiles() * block())) +
                      Scratch::size<float>(result_size()));
      Space space;
      space.strip = scratch.take<float>(strip_size());
      space.zeros = scratch.take<float>(p_.in);
      space.pixels = scratch.take<float>(kPositions * position_step(tiles() * p_.in));
      space.sums = scratch.take<float>(kPositions * position_step(tiles() * block()));
      space.result = scratch.take<float>(result_size());
      std::fill_n(space.zeros, p_.in, float(0));
      // Neighbouring splits share the transformed pixels.
      for (int64_t task = begin, next; task < end; task = next) {
        const int64_t i = task / splits, first = i * splits;
        next = std::min(end, first + splits);
        const int64_t n = i / strips % parts * cut_.images, row = i % strips * cut_.rows;
        compute({i / strips / parts,
                 {n, std::min(p_.images, n + cut_.images)},
                 {row, std::min(p_.tiles_h(), row + cut_.rows)},
                 {(task - first) * blocks / splits * kBlock,
                  std::min(p_.out, (next - first) * blocks / splits * kBlock)}},
                space);
      }
    });
    std::vector<int64_t> result;
    for (int64_t n = 0; n < p_.images; ++n)
      if (failed_[static_cast<size_t>(n)]) result.push_back(n);
    return result;
  }

 private:
  struct Task {
    int64_t group;
    Interval images, rows;  // of tiles
    Interval outputs;       // of the group
  };
  struct Space {
    float *strip, *zeros, *pixels, *sums, *result;
  };

  // The weights of (group, block of outputs) as [position][in][output of the block].
  int64_t block_of_weights(int64_t group, int64_t o) const {
    return (group * ceil_div(p_.out, kBlock) + o / kBlock) * kPositions *
           position_step(p_.in * kBlock);
  }
  // `from` is (outputs, channels, 3, 3), dense; the outputs are `in` where it is turned round.
  void fill_weights(const float* from, bool last, bool turned, float* to) const {
    constexpr int64_t kChunk = 32;  // of `in`
    const auto flip = DLOPS_SIMD(transpose, float, float);
    const auto transform = DLOPS_SIMD(transform_weights, float);
    const int64_t chunks = ceil_div(p_.in, kChunk), size = 9 * kChunk * p_.out;
    at::parallel_for(0, p_.groups * chunks, grain(size * 4), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<float>(size));
      float* const space = scratch.take<float>(size);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / chunks, first = task % chunks * kChunk;
        const int64_t count = std::min(kChunk, p_.in - first);
        // All outputs of a cell and one of `in`: the first ones, and the steps to the next.
        const float* cells = space;
        int64_t next = p_.out, cell = p_.out;
        if (turned) {
          const float* const rows = from + (group * p_.in + first) * p_.out * 9;
          if (last) {
            cells = rows;
            next = 9 * p_.out;
          } else {
            next = 9 * p_.out;
            for (int64_t i = 0; i < count; ++i)
              flip(rows + i * next, 9, p_.out, 9, space + i * next, p_.out);
          }
        } else {
          const float* const rows = from + group * p_.out * p_.in * 9;
          if (last) {
            cell = count * p_.out;
            for (int64_t k = 0; k < 9; ++k)
              flip(rows + k * p_.in + first, 9 * p_.in, p_.out, count, space + k * cell, p_.out);
          } else {
            next = 9 * p_.out;
            flip(rows + first * 9, 9 * p_.in, p_.out, count * 9, space, p_.out);
          }
        }
        for (int64_t o = 0; o < p_.out; o += kBlock)
          for (int64_t i = 0; i < count; ++i)
            transform(cells + i * next + o, cell, std::min(kBlock, p_.out - o), turned,
                      to + block_of_weights(group, o) + (first + i) * kBlock,
                      position_step(p_.in * kBlock));
      }
    });
  }

  int64_t tiles() const { return cut_.images * cut_.rows * p_.tiles_w(); }
  int64_t block() const { return std::min(kBlock, p_.out); }
  // Summed in registers before they join what was there: native's sums are shorter than many
  // channels, too, and rounding errors grow with them.
  int64_t terms() const { return p_.in <= 128 ? p_.in : 64; }
  int64_t strip_size() const { return source_.strip_size(cut_.rows, p_.in); }
  int64_t result_size() const {
    return in_place() ? 0 : cut_.images * 2 * cut_.rows * p_.width * p_.out;
  }
  // Whether results are written where they are to be, not by way of `space.result`.
  bool in_place() const { return last_ && std::is_same_v<scalar_t, float>; }
  // The result's rows that they make.
  Interval result_rows(Interval rows) const {
    return {2 * rows.begin, std::min(p_.height, 2 * rows.end)};
  }

  void compute(const Task& task, const Space& space) {
    const int64_t count = length(task.images) * length(task.rows) * p_.tiles_w();
    read_pixels(task, space, count);
    for (int64_t o = task.outputs.begin; o < task.outputs.end; o += kBlock) {
      const int64_t width = std::min(kBlock, task.outputs.end - o);
      for (int64_t position = 0; position < kPositions; ++position) {
        const float* const pixels = space.pixels + position * position_step(count * p_.in);
        const float* const weights = weights_.const_data_ptr<float>() +
                                     block_of_weights(task.group, o) +
                                     position * position_step(p_.in * kBlock);
        float* const sums = space.sums + position * position_step(count * width);
        for (int64_t i = 0; i < p_.in; i += terms()) {
          const Factors<float> factors{pixels + i, weights + i * kBlock};
          matmul_of_factors(count, width, std::min(terms(), p_.in - i), &factors, 1,
                            {.lda = p_.in, .ldb = kBlock}, sums, width,
                            i == 0 ? Addend<float>{} : Addend<float>{sums, width});
        }
      }
      write_block(task, {o, o + width}, count, space);
    }
    if (!in_place()) store_result(task, space.result);
  }

  void read_pixels(const Task& task, const Space& space, int64_t count) const {
    const auto transform = DLOPS_SIMD(transform_input, float);
    const int64_t c0 = task.group * p_.in;
    float* to = space.pixels;
    for (int64_t n = task.images.begin; n < task.images.end; ++n) {
      source_.read(n, {c0, c0 + p_.in}, task.rows, space.strip, space.zeros,
                   [&](const float* const* pixels) {
                     transform(pixels, p_.in, to, position_step(count * p_.in));
                     to += p_.in;
                   });
    }
  }

  void write_block(const Task& task, Interval block, int64_t count, const Space& space) {
    const auto transform = DLOPS_SIMD(transform_output, float);
    const int64_t width = length(block), o0 = task.group * p_.out + block.begin;
    const Interval rows = result_rows(task.rows);
    const int64_t step = in_place() ? p_.groups * p_.out : p_.out;
    const float* const bias = bias_ == nullptr ? nullptr : bias_ + o0;
    const float* from = space.sums;
    for (int64_t n = task.images.begin; n < task.images.end; ++n) {
      float* first =
          space.result + (n - task.images.begin) * length(rows) * p_.width * step + block.begin;
      if constexpr (std::is_same_v<scalar_t, float>)
        if (last_) first = result_ + (n * p_.height + rows.begin) * p_.width * step + o0;
      for (int64_t y = 0; y < length(task.rows); ++y) {
        for (int64_t x = 0; x < p_.tiles_w(); ++x, from += width) {
          std::array<float*, 4> outputs;
          for (int64_t i = 0; i < 4; ++i) {
            const int64_t row = 2 * y + i / 2, col = 2 * x + i % 2;
            const bool inside = row < length(rows) && col < p_.width;
            outputs[static_cast<size_t>(i)] =
                inside ? first + (row * p_.width + col) * step : nullptr;
          }
          if (!transform(from, position_step(count * width), width, bias, outputs.data()))
            failed_[static_cast<size_t>(n)] = true;
        }
      }
    }
  }

  void store_result(const Task& task, const float* from) const {
    const auto flip = DLOPS_SIMD(transpose, float, scalar_t);
    const auto convert = DLOPS_SIMD(convert_row, float, scalar_t);
    const Interval rows = result_rows(task.rows);
    const int64_t pixels = length(rows) * p_.width, plane = p_.height * p_.width;
    const int64_t o0 = task.outputs.begin, outputs = length(task.outputs);
    const int64_t all = p_.groups * p_.out;
    for (int64_t n = task.images.begin; n < task.images.end; ++n, from += pixels * p_.out) {
      const int64_t channel = task.group * p_.out + o0, pixel = rows.begin * p_.width;
      if (!last_) {
        flip(from + o0, p_.out, pixels, outputs, result_ + (n * all + channel) * plane + pixel,
             plane);
        continue;
      }
      scalar_t* const to = result_ + (n * plane + pixel) * all + channel;
      if (outputs == all) {
        convert(from, to, pixels * all);
      } else {
        for (int64_t i = 0; i < pixels; ++i) convert(from + i * p_.out + o0, to + i * all, outputs);
      }
    }
  }

  const Problem p_;
  const TileCut cut_;
  const Tiles<4, scalar_t> source_;
  const bool last_;  // channels_last
  at::Tensor weights_;
  const float* bias_;
  scalar_t* result_;
  std::vector<std::atomic<bool>> failed_;
};

std::vector<int64_t> correlate(const Problem& p, const at::Tensor& source, const at::Tensor& weight,
                               bool turned, const at::Tensor& bias, const at::Tensor& result,
                               at::MemoryFormat format) {
  const bool last = format == at::MemoryFormat::ChannelsLast;
  const at::Tensor in_float = weight.to(at::kFloat);
  const float* const addends = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  return AT_DISPATCH_V2(source.scalar_type(), "conv2d_winograd", AT_WRAP([&] {
                          const ImageView<scalar_t> images{source.const_data_ptr<scalar_t>(),
                                                           source.size(1), source.size(2),
                                                           source.size(3), last};
                          return Winograd<scalar_t>(p, images, in_float, turned, addends,
                                                    result.mutable_data_ptr<scalar_t>())
                              .run();
                        }),
                        at::kFloat, at::kHalf, at::kBFloat16);
}

bool allows_winograd() {
  const char* const asked = std::getenv("DLOPS_CPU_CONV2D");
  const std::string_view value = asked == nullptr ? "winograd" : asked;
  TORCH_CHECK_VALUE(value == "winograd" || value == "direct",
                    "DLOPS_CPU_CONV2D must be winograd (the default) or direct, got ", value);
  return value == "winograd";
}

// Whether it is a convolution by 3x3 kernels of stride 1, with so many channels and outputs.
bool takes(const Conv2dGeometry& g, at::ScalarType dtype, int64_t least, int64_t most) {
  const auto serve = [&](int64_t channels) { return channels >= least && channels <= most; };
  // A row of tiles is transformed at once: 16 positions of its pixels and of a block of sums, which
  // may take 2 MiB.
  constexpr int64_t kRow = 32 * 1024;
  const int64_t pixel = std::max(g.channels_per_group(), g.outputs_per_group()) + kBlock;
  if (ceil_div(std::max(g.W, g.OW), 2) * pixel > kRow) return false;
  // Products of bfloat16 as it is take half as long, which is what there is to gain.
  const bool by_float32 = dtype == at::kFloat || dtype == at::kHalf ||
                          (dtype == at::kBFloat16 && !multiplies_bfloat16());
  return by_float32 && g.R == 3 && g.S == 3 && g.stride_h == 1 && g.stride_w == 1 &&
         g.dilation_h == 1 && g.dilation_w == 1 && serve(g.channels_per_group()) &&
         serve(g.outputs_per_group()) && allows_winograd();
}

int64_t tiles_of_image(const Conv2dGeometry& g) { return ceil_div(g.OH, 2) * ceil_div(g.OW, 2); }

}  // namespace

bool takes_winograd(const Conv2dGeometry& g, at::ScalarType dtype) {
  // Few channels make thin products, and many weights take more to transform than the tiles of an
  // image save. Of one image: what is done to it must not depend on how many there are.
  const int64_t weights = g.channels_per_group() * g.outputs_per_group();
  return takes(g, dtype, 32, 256) && tiles_of_image(g) >= std::max<int64_t>(16, weights / 1536);
}

bool takes_winograd_weight(const Conv2dGeometry& g, at::ScalarType dtype) {
  // Few channels or tiles make thin products.
  return takes(g, dtype, 32, 256) && g.N * tiles_of_image(g) >= 32;
}

std::vector<int64_t> winograd_forward(const Conv2dGeometry& g, const at::Tensor& input,
                                      const at::Tensor& weight, const at::Tensor& bias,
                                      const at::Tensor& output, at::MemoryFormat format) {
  return correlate({g.N, g.groups, g.channels_per_group(), g.outputs_per_group(), g.H, g.W,
                    g.pad_top, g.pad_left, g.OH, g.OW},
                   input, weight, false, bias, output, format);
}

std::vector<int64_t> winograd_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                                         const at::Tensor& weight, const at::Tensor& grad_input,
                                         at::MemoryFormat format) {
  return correlate({g.N, g.groups, g.outputs_per_group(), g.channels_per_group(), g.OH, g.OW,
                    2 - g.pad_top, 2 - g.pad_left, g.H, g.W},
                   grad_output, weight, true, {}, grad_input, format);
}

}  // namespace dlops::cpu
