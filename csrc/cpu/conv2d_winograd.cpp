#include "cpu/conv2d_winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <string_view>

#include "cpu/capability.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d_winograd.h"

namespace dlops::cpu {
namespace {

// Outputs at a time, whose sums stay in the second-level cache beside the transformed input.
constexpr int64_t kBlock = 64;

// The step from position to position for `count` numbers of each: one line of the cache more, so
// that the positions of a tile do not all stand in the same places of the cache.
inline int64_t position_step(int64_t count) { return ceil_div(count, 16) * 16 + 16; }

// A correlation by 3x3 weights: result[y, x] sees the source from row y - pad_top and column x -
// pad_left on.
struct Problem {
  int64_t images, groups, in, out;  // channels of a group
  int64_t H, W, pad_top, pad_left;  // of the source
  int64_t height, width;            // of the result
  int64_t tiles_h() const { return ceil_div(height, 2); }
  int64_t tiles_w() const { return ceil_div(width, 2); }
};

// How the tiles are shared out: rows of them, of one image or of several. It depends on the shapes
// alone.
struct Cut {
  int64_t images = 1, rows;
  explicit Cut(const Problem& p) {
    // Transformed pixels that fit half a second-level cache of 1 MiB, as float32.
    const int64_t most = std::clamp<int64_t>(8 * 1024 / p.in, 16, 96);
    const int64_t image = p.tiles_h() * p.tiles_w();
    rows = std::clamp<int64_t>(most / p.tiles_w(), 1, p.tiles_h());
    if (image > most) {
      rows = ceil_div(p.tiles_h(), ceil_div(p.tiles_h(), rows));  // evenly
    } else {
      rows = p.tiles_h();
      images = std::clamp<int64_t>(most / image, 1, p.images);
    }
  }
};

class Winograd {
 public:
  Winograd(const Problem& p, const ImageView<float>& source, const at::Tensor& weight, bool turned,
           const float* bias, float* result)
      : p_(p), cut_(p), source_(source), bias_(bias), result_(result) {
    const int64_t blocks = ceil_div(p.out, kBlock);
    weights_ = at::empty({p.groups * blocks * kPositions * position_step(p.in * kBlock)},
                         weight.options());
    const bool last =
        !weight.is_contiguous() && weight.is_contiguous(at::MemoryFormat::ChannelsLast);
    const at::Tensor dense = last ? weight : weight.contiguous();
    fill_weights(dense.const_data_ptr<float>(), last, turned, weights_.mutable_data_ptr<float>());
  }

  bool run() {
    const int64_t strips = ceil_div(p_.tiles_h(), cut_.rows),
                  parts = ceil_div(p_.images, cut_.images);
    const int64_t work = tiles() * kPositions * p_.in * p_.out;
    at::parallel_for(0, p_.groups * parts * strips, grain(work), [&](int64_t begin, int64_t end) {
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
      for (int64_t i = begin; i < end && finite_; ++i) {
        const int64_t n = i / strips % parts * cut_.images, row = i % strips * cut_.rows;
        compute({i / strips / parts,
                 {n, std::min(p_.images, n + cut_.images)},
                 {row, std::min(p_.tiles_h(), row + cut_.rows)}},
                space);
      }
    });
    return finite_;
  }

 private:
  struct Task {
    int64_t group;
    Interval images, rows;  // of tiles
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
    constexpr int64_t kChunk = 8;  // of `in`
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
        for (int64_t i = 0; i < count; ++i)
          for (int64_t o = 0; o < p_.out; o += kBlock)
            transform(cells + i * next + o, cell, std::min(kBlock, p_.out - o), turned,
                      to + block_of_weights(group, o) + (first + i) * kBlock,
                      position_step(p_.in * kBlock));
      }
    });
  }

  int64_t tiles() const { return cut_.images * cut_.rows * p_.tiles_w(); }
  int64_t block() const { return std::min(kBlock, p_.out); }
  int64_t strip_rows() const { return std::min(p_.H, 2 * cut_.rows + 2); }
  int64_t strip_size() const {
    return source_.last ? 0 : cut_.images * strip_rows() * p_.W * p_.in;
  }
  int64_t result_size() const {
    return source_.last ? 0 : cut_.images * 2 * cut_.rows * p_.width * p_.out;
  }
  // The source rows that rows of tiles see.
  Interval source_rows(Interval rows) const {
    const int64_t begin = std::clamp<int64_t>(2 * rows.begin - p_.pad_top, 0, p_.H);
    return {begin, std::clamp<int64_t>(2 * rows.end + 2 - p_.pad_top, begin, p_.H)};
  }
  // The result's rows that they make.
  Interval result_rows(Interval rows) const {
    return {2 * rows.begin, std::min(p_.height, 2 * rows.end)};
  }

  void compute(const Task& task, const Space& space) {
    const int64_t count = length(task.images) * length(task.rows) * p_.tiles_w();
    read_pixels(task, space, count);
    for (int64_t o = 0; o < p_.out; o += kBlock) {
      const int64_t width = std::min(kBlock, p_.out - o);
      for (int64_t position = 0; position < kPositions; ++position) {
        const Factors<float> factors{space.pixels + position * position_step(count * p_.in),
                                     weights_.const_data_ptr<float>() +
                                         block_of_weights(task.group, o) +
                                         position * position_step(p_.in * kBlock)};
        matmul_of_factors(count, width, p_.in, &factors, 1, {.lda = p_.in, .ldb = kBlock},
                          space.sums + position * position_step(count * width), width,
                          Addend<float>{});
      }
      if (!write_block(task, {o, o + width}, count, space)) finite_ = false;
    }
    if (!source_.last) turn_result(task, space.result);
  }

  void read_pixels(const Task& task, const Space& space, int64_t count) const {
    const auto transform = DLOPS_SIMD(transform_input, float);
    const Interval rows = source_rows(task.rows);
    const int64_t c0 = task.group * p_.in;
    const int64_t step = source_.last ? source_.channels : p_.in;
    const float* strip = space.strip;
    float* to = space.pixels;
    for (int64_t n = task.images.begin; n < task.images.end; ++n) {
      const float* first = source_.last ? source_.at(n, c0, rows.begin, 0) : strip;
      if (!source_.last) fill_strip(source_, n, {c0, c0 + p_.in}, rows, {0, p_.W}, space.strip);
      for (int64_t y = task.rows.begin; y < task.rows.end; ++y) {
        for (int64_t x = 0; x < p_.tiles_w(); ++x, to += p_.in) {
          std::array<const float*, kPositions> pixels;
          for (int64_t i = 0; i < 4; ++i) {
            const int64_t h = 2 * y + i - p_.pad_top;
            for (int64_t j = 0; j < 4; ++j) {
              const int64_t w = 2 * x + j - p_.pad_left;
              const bool inside = h >= 0 && h < p_.H && w >= 0 && w < p_.W;
              pixels[static_cast<size_t>(4 * i + j)] =
                  inside ? first + ((h - rows.begin) * p_.W + w) * step : space.zeros;
            }
          }
          transform(pixels.data(), p_.in, to, position_step(count * p_.in));
        }
      }
    }
  }

  // False where one of them is not finite.
  bool write_block(const Task& task, Interval block, int64_t count, const Space& space) const {
    const auto transform = DLOPS_SIMD(transform_output, float);
    const int64_t width = length(block), o0 = task.group * p_.out + block.begin;
    const Interval rows = result_rows(task.rows);
    const int64_t step = source_.last ? p_.groups * p_.out : p_.out;
    const float* const bias = bias_ == nullptr ? nullptr : bias_ + o0;
    const float* from = space.sums;
    bool finite = true;
    for (int64_t n = task.images.begin; n < task.images.end; ++n) {
      float* const first =
          source_.last ? result_ + (n * p_.height + rows.begin) * p_.width * step + o0
                       : space.result + (n - task.images.begin) * length(rows) * p_.width * step +
                             block.begin;
      for (int64_t y = 0; y < length(task.rows); ++y) {
        for (int64_t x = 0; x < p_.tiles_w(); ++x, from += width) {
          std::array<float*, 4> outputs;
          for (int64_t i = 0; i < 4; ++i) {
            const int64_t row = 2 * y + i / 2, col = 2 * x + i % 2;
            const bool inside = row < length(rows) && col < p_.width;
            outputs[static_cast<size_t>(i)] =
                inside ? first + (row * p_.width + col) * step : nullptr;
          }
          finite &= transform(from, position_step(count * width), width, bias, outputs.data());
        }
      }
    }
    return finite;
  }

  void turn_result(const Task& task, const float* from) const {
    const auto flip = DLOPS_SIMD(transpose, float, float);
    const Interval rows = result_rows(task.rows);
    const int64_t pixels = length(rows) * p_.width, plane = p_.height * p_.width;
    for (int64_t n = task.images.begin; n < task.images.end; ++n, from += pixels * p_.out)
      flip(from, p_.out, pixels, p_.out,
           result_ + (n * p_.groups + task.group) * p_.out * plane + rows.begin * p_.width, plane);
  }

  const Problem p_;
  const Cut cut_;
  const ImageView<float> source_;
  at::Tensor weights_;
  const float* bias_;
  float* result_;
  std::atomic<bool> finite_ = true;
};

bool correlate(const Problem& p, const at::Tensor& source, const at::Tensor& weight, bool turned,
               const at::Tensor& bias, const at::Tensor& result, at::MemoryFormat format) {
  const ImageView<float> images{source.const_data_ptr<float>(), source.size(1), source.size(2),
                                source.size(3), format == at::MemoryFormat::ChannelsLast};
  return Winograd(p, images, weight, turned,
                  bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                  result.mutable_data_ptr<float>())
      .run();
}

bool allows_winograd() {
  const char* const asked = std::getenv("DLOPS_CPU_CONV2D");
  const std::string_view value = asked == nullptr ? "winograd" : asked;
  TORCH_CHECK_VALUE(value == "winograd" || value == "direct",
                    "DLOPS_CPU_CONV2D must be winograd (the default) or direct, got ", value);
  return value == "winograd";
}

}  // namespace

bool takes_winograd(const Conv2dGeometry& g, at::ScalarType dtype) {
  // Few channels make thin products, many long sums beside native's and weights that take more to
  // transform than the tiles of an image save. Of one image: what is done to it must not depend on
  // how many there are.
  constexpr int64_t kLeastChannels = 48, kMostChannels = 128, kLeastTiles = 16;
  const auto serve = [&](int64_t channels) {
    return channels >= kLeastChannels && channels <= kMostChannels;
  };
  return dtype == at::kFloat && g.R == 3 && g.S == 3 && g.stride_h == 1 && g.stride_w == 1 &&
         g.dilation_h == 1 && g.dilation_w == 1 && serve(g.channels_per_group()) &&
         serve(g.outputs_per_group()) && ceil_div(g.OH, 2) * ceil_div(g.OW, 2) >= kLeastTiles &&
         allows_winograd();
}

bool winograd_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                      const at::Tensor& bias, const at::Tensor& output, at::MemoryFormat format) {
  return correlate({g.N, g.groups, g.channels_per_group(), g.outputs_per_group(), g.H, g.W,
                    g.pad_top, g.pad_left, g.OH, g.OW},
                   input, weight, false, bias, output, format);
}

bool winograd_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                         const at::Tensor& weight, const at::Tensor& grad_input,
                         at::MemoryFormat format) {
  return correlate({g.N, g.groups, g.outputs_per_group(), g.channels_per_group(), g.OH, g.OW,
                    2 - g.pad_top, 2 - g.pad_left, g.H, g.W},
                   grad_output, weight, true, {}, grad_input, format);
}

}  // namespace dlops::cpu
