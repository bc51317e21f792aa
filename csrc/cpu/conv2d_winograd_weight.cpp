// The gradient of a 3x3 weight as Winograd's F(3x3, 2x2): tiles of 2x2 gradients meet 4x4 pixels in
// 16 products, each a matrix product whose depth is the tiles; their sums over the whole batch are
// transformed once.
#include <ATen/Dispatch_v2.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/conv2d_weight_tasks.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/conv2d_winograd_tiles.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d_winograd.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {
namespace {

constexpr int64_t kBlock = WeightTasks::kBlock, kLeastTasks = 4;

template <class scalar_t>
class WeightGradient {
 public:
  WeightGradient(const Conv2dGeometry& g, const at::Tensor& grad_output, const at::Tensor& input,
                 bool last)
      : g_(g),
        cut_(g.N, tiles_h(), tiles_w(), most_tiles(g)),
        strips_(ceil_div(tiles_h(), cut_.rows)),
        input_({input.const_data_ptr<scalar_t>(), g.C, g.H, g.W, last}, g.pad_top, g.pad_left,
               tiles_w()),
        last_(last),
        grads_{grad_output.const_data_ptr<scalar_t>(), g.O, g.OH, g.OW, last},
        grad_(grads_, 0, 0, tiles_w()),
        tasks_(g, ceil_div(g.N, cut_.images) * strips_, kPositions * g.O * channels()),
        sums_(at::empty({tasks_.chunks(), g.groups, kPositions * outputs() * channels()},
                        grad_output.options().dtype(at::kFloat))),
        sum_data_(sums_.mutable_data_ptr<float>()) {}

  bool run(float* result, bool last) const {
    const int64_t most = cut_.images * cut_.rows * tiles_w();
    const int64_t width = std::min(kBlock, outputs());
    const int64_t grads = last_ ? grad_.strip_size(cut_.rows, width) : 2 * g_.OW;
    const int64_t strip = std::max(input_.strip_size(cut_.rows, channels()), grads);
    tasks_.fill([&](const auto& each) {
      Scratch scratch(Scratch::size<float>(strip) +
                      Scratch::size<float>(std::max(channels(), width)) +
                      Scratch::size<float>(kPositions * position_step(most * channels())) +
                      Scratch::size<float>(kPositions * position_step(most * width)));
      Space space;
      space.strip = scratch.take<float>(strip);
      space.zeros = scratch.take<float>(std::max(channels(), width));
      space.pixels = scratch.take<float>(kPositions * position_step(most * channels()));
      space.grads = scratch.take<float>(kPositions * position_step(most * width));
      std::fill_n(space.zeros, std::max(channels(), width), float(0));
      each([&](int64_t chunk, int64_t group, int64_t unit, Interval blocks, bool first) {
        add_unit(chunk, group, unit, blocks, first, space);
      });
    });
    return finish(result, last);
  }

 private:
  struct Space {
    float *strip, *zeros, *pixels, *grads;
  };

  static int64_t most_tiles(const Conv2dGeometry& g) {
    const int64_t pixel = g.channels_per_group() + std::min(kBlock, g.outputs_per_group());
    const int64_t blocks = g.groups * ceil_div(g.outputs_per_group(), kBlock);
    const int64_t all = g.N * ceil_div(g.OH, 2) * ceil_div(g.OW, 2);
    // Their positions fit three quarters of a second-level cache of 1 MiB; no fewer than 64, as the
    // sums are read and written once for all of them.
    const int64_t fitting = std::clamp<int64_t>(12 * 1024 / pixel, 64, 128);
    return std::min(fitting, std::max<int64_t>(32, ceil_div(all * blocks, kLeastTasks)));
  }

  int64_t channels() const { return g_.channels_per_group(); }
  int64_t outputs() const { return g_.outputs_per_group(); }
  int64_t tiles_h() const { return ceil_div(g_.OH, 2); }
  int64_t tiles_w() const { return ceil_div(g_.OW, 2); }
  // The sums of a block of outputs, [position][output of the block][channel].
  float* sums(int64_t chunk, int64_t group, int64_t block) const {
    return sum_data_ +
           ((chunk * g_.groups + group) * outputs() + block * kBlock) * kPositions * channels();
  }

  void add_unit(int64_t chunk, int64_t group, int64_t unit, Interval blocks, bool first,
                const Space& space) const {
    const int64_t n = unit / strips_ * cut_.images, row = unit % strips_ * cut_.rows;
    const Interval images{n, std::min(g_.N, n + cut_.images)};
    const Interval rows{row, std::min(tiles_h(), row + cut_.rows)};
    const int64_t count = length(images) * length(rows) * tiles_w();
    const int64_t c0 = group * channels();
    read(input_, DLOPS_SIMD(transform_input, float), images, rows, {c0, c0 + channels()}, count,
         space, space.pixels);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t o0 = group * outputs() + block * kBlock, width = tasks_.width(block);
      if (last_) {
        read(grad_, DLOPS_SIMD(transform_grad, float), images, rows, {o0, o0 + width}, count, space,
             space.grads);
      } else {
        read_rows(images, rows, {o0, o0 + width}, count, space);
      }
      for (int64_t position = 0; position < kPositions; ++position) {
        const Factors<float> factors{space.grads + position * position_step(count * width),
                                     space.pixels + position * position_step(count * channels())};
        float* const sum = sums(chunk, group, block) + position * width * channels();
        matmul_of_factors(width, channels(), count, &factors, 1,
                          {.lda = last_ ? 1 : count, .ldb = channels(), .step = last_ ? width : 1},
                          sum, channels(),
                          first ? Addend<float>{} : Addend<float>{sum, channels()});
      }
    }
  }

  template <int64_t size, class Transform>
  static void read(const Tiles<size, scalar_t>& tiles, const Transform& transform, Interval images,
                   Interval rows, Interval channels, int64_t count, const Space& space, float* to) {
    const int64_t step = position_step(count * length(channels));
    for (int64_t n = images.begin; n < images.end; ++n) {
      tiles.read(n, channels, rows, space.strip, space.zeros, [&](const float* const* pixels) {
        transform(pixels, length(channels), to, step);
        to += length(channels);
      });
    }
  }

  // The gradients of planes, a channel after the other: a product may have them as its rows.
  void read_rows(Interval images, Interval rows, Interval outputs, int64_t count,
                 const Space& space) const {
    const auto transform = DLOPS_SIMD(transform_grad_rows, float);
    const int64_t step = position_step(count * length(outputs));
    float* to = space.grads;
    for (int64_t n = images.begin; n < images.end; ++n, to += length(rows) * tiles_w()) {
      for (int64_t o = outputs.begin; o < outputs.end; ++o) {
        float* tiles = to + (o - outputs.begin) * count;
        for (int64_t y = rows.begin; y < rows.end; ++y, tiles += tiles_w()) {
          const int64_t some = std::min<int64_t>(2, g_.OH - 2 * y);
          const float* const row = row_pair(grads_.at(n, o, 2 * y, 0), some, space.strip);
          transform(row, some == 2 ? row + g_.OW : nullptr, g_.OW, tiles, step);
        }
      }
    }
  }
  const float* row_pair(const scalar_t* rows, int64_t count, float* space) const {
    if constexpr (std::is_same_v<scalar_t, float>) {
      return rows;
    } else {
      DLOPS_SIMD(convert_row, scalar_t, float)(rows, space, count * g_.OW);
      return space;
    }
  }

  // Adds up the chunks in their order and writes each output's weights as the result has them.
  // False where one is not finite.
  bool finish(float* result, bool last) const {
    const auto add = DLOPS_SIMD(add_row, float, float);
    const auto flip = DLOPS_SIMD(transpose, float, float);
    const auto transform = DLOPS_SIMD(transform_grad_weight, float);
    const int64_t size = 9 * channels(), work = kPositions * channels() * tasks_.chunks();
    std::atomic<bool> finite = true;
    at::parallel_for(0, g_.O, grain(work), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<float>(size));
      float* const cells = scratch.take<float>(size);
      for (int64_t o = begin; o < end; ++o) {
        const int64_t group = o / outputs(), block = o % outputs() / kBlock;
        const int64_t row = o % outputs() % kBlock * channels();
        const int64_t position = tasks_.width(block) * channels();
        float* const sum = sums(0, group, block) + row;
        for (int64_t chunk = 1; chunk < tasks_.chunks(); ++chunk)
          for (int64_t i = 0; i < kPositions; ++i)
            add(sums(chunk, group, block) + row + i * position, sum + i * position, channels());
        float* const to = last ? result + o * size : cells;
        if (!transform(sum, position, channels(), to)) finite = false;
        if (!last) flip(cells, channels(), 9, channels(), result + o * size, 9);
      }
    });
    return finite;
  }

  const Conv2dGeometry& g_;
  const TileCut cut_;
  const int64_t strips_;
  const Tiles<4, scalar_t> input_;
  const bool last_;  // channels_last
  const ImageView<scalar_t> grads_;
  const Tiles<2, scalar_t> grad_;
  const WeightTasks tasks_;
  const at::Tensor sums_;
  float* const sum_data_;
};

}  // namespace

bool winograd_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& input, const at::Tensor& grad_weight,
                          at::MemoryFormat format) {
  const bool last = format == at::MemoryFormat::ChannelsLast;
  const bool rounds = grad_weight.scalar_type() != at::kFloat;
  const at::Tensor result =
      rounds ? at::empty_like(grad_weight, grad_weight.options().dtype(at::kFloat)) : grad_weight;
  const bool finite =
      AT_DISPATCH_V2(input.scalar_type(), "conv2d_grad_weight_winograd", AT_WRAP([&] {
                       return WeightGradient<scalar_t>(g, grad_output, input, last)
                           .run(result.mutable_data_ptr<float>(), last);
                     }),
                     at::kFloat, at::kHalf, at::kBFloat16);
  if (finite && rounds) grad_weight.copy_(result);
  return finite;
}

}  // namespace dlops::cpu
