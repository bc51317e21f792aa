#include "cpu/conv2d_pairs_weight.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>

#include <atomic>
#include <vector>

#include "cpu/capability.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d_planes.h"

namespace dlops::cpu {
namespace {

using c10::BFloat16;

// Of a unit, in elements: half of a second-level cache of 1 MiB.
constexpr int64_t kUnitElements = 256 * 1024;
constexpr int64_t kBlock = 64;  // channels and outputs of a product
constexpr int64_t kTasks = 8;
// What the sums of all chunks may take, where that is more than the gradient itself.
constexpr int64_t kPartialElements = 512 * 1024;

class PairedWeightGradient {
 public:
  PairedWeightGradient(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& input, bool last)
      : g_(g),
        layout_(g),
        grad_{grad_output.const_data_ptr<BFloat16>(), g.O, g.OH, g.OW, last},
        input_{input.const_data_ptr<BFloat16>(), g.C, g.H, g.W, last} {
    const int64_t channel = layout_.phases_h * layout_.phases_w * channels();  // planes
    const auto size = [&](int64_t rows) {
      return (channel * (rows + layout_.reach_h) + outputs() * rows) * layout_.pitch;
    };
    if (size(g.OH) <= kUnitElements) {
      // Enough units for all tasks.
      const int64_t units = ceil_div(kTasks, g.groups * blocks());
      const int64_t fitting = std::min(kUnitElements / size(g.OH), ceil_div(g.N, units));
      rows_ = g.OH;
      images_ = ceil_div(g.N, ceil_div(g.N, fitting));
    } else {
      const int64_t fitting =
          (kUnitElements / layout_.pitch - channel * layout_.reach_h) / (channel + outputs());
      rows_ = ceil_div(g.OH, ceil_div(g.OH, std::clamp<int64_t>(fitting, 1, g.OH)));
      images_ = 1;
    }
    strips_ = ceil_div(g.OH, rows_);
    units_ = ceil_div(g.N, images_) * strips_;
    const int64_t most = std::max<int64_t>(1, kPartialElements / (g.O * g.column_rows()));
    chunks_ = std::min({units_, most, ceil_div(kTasks, g.groups)});
    splits_ = std::min(blocks(), ceil_div(kTasks, chunks_ * g.groups));
  }

  bool run(const at::Tensor& result, bool last) {
    sums_ = at::zeros({chunks_, g_.groups, cells(), channels(), outputs()}, at::kFloat);
    sum_data_ = sums_.mutable_data_ptr<float>();
    std::atomic<bool> finite = true;
    const int64_t work = g_.N * g_.output_pixels() * g_.column_rows() * outputs() /
                         std::max<int64_t>(1, chunks_ * splits_);
    at::parallel_for(
        0, chunks_ * g_.groups * splits_, grain(work), [&](int64_t begin, int64_t end) {
          Scratch scratch(Scratch::size<BFloat16>(planes_size()) +
                          Scratch::size<BFloat16>(pairs_size()) +
                          Scratch::size<BFloat16>(space_size()));
          const Space space{scratch.take<BFloat16>(planes_size()),
                            scratch.take<BFloat16>(pairs_size()),
                            scratch.take<BFloat16>(space_size())};
          for (int64_t task = begin; task < end; ++task) {
            const int64_t split = task % splits_, group = task / splits_ % g_.groups;
            const int64_t chunk = task / splits_ / g_.groups;
            const Interval some{split * blocks() / splits_, (split + 1) * blocks() / splits_};
            for (int64_t unit = chunk * units_ / chunks_; unit < (chunk + 1) * units_ / chunks_;
                 ++unit)
              if (finite && !add_unit(chunk, group, unit, some, space)) finite = false;
          }
        });
    if (finite) finish(result.mutable_data_ptr<BFloat16>(), last);
    return finite;
  }

 private:
  struct Space {
    BFloat16 *planes, *pairs, *rows;
  };
  // Images and output rows whose planes and gradients are in cache together.
  struct Unit {
    int64_t image, images, row, rows;
    int64_t plane;  // elements of a channel's planes
    int64_t pairs;  // of pixels of an image
  };

  int64_t channels() const { return g_.channels_per_group(); }
  int64_t outputs() const { return g_.outputs_per_group(); }
  int64_t cells() const { return g_.R * g_.S; }
  int64_t blocks() const { return ceil_div(outputs(), kBlock); }
  int64_t most_blocks() const { return ceil_div(blocks(), splits_); }
  int64_t pairs(int64_t rows) const {
    return ceil_div((rows - 1) * layout_.pitch + g_.OW, int64_t{2});
  }
  // The rows of the input that output rows meet.
  Interval input_rows(int64_t row, int64_t rows) const {
    const int64_t first = row * g_.stride_h - g_.pad_top;
    const int64_t end = (row + rows + layout_.reach_h) * g_.stride_h - g_.pad_top;
    return intersect({first, std::max(first, end)}, {0, g_.H});
  }

  int64_t planes_size() const {
    return images_ * channels() * layout_.channel_size(rows_) + kPlaneSlack;
  }
  int64_t pairs_size() const {
    return images_ * pairs(rows_) * 2 * most_blocks() * kBlock + kPadding;
  }
  int64_t space_size() const {
    const int64_t input = (rows_ + layout_.reach_h) * g_.stride_h * g_.W * channels();
    const int64_t grad = kBlock * pairs(rows_) * 2 + layout_.pitch;
    return (input_.last ? std::max(input, kBlock) : grad) + kPlaneSlack;
  }

  // False if one of its numbers is not finite.
  bool add_unit(int64_t chunk, int64_t group, int64_t index, Interval some, Space space) const {
    Unit unit;
    unit.image = index / strips_ * images_;
    unit.images = std::min(g_.N - unit.image, images_);
    unit.row = index % strips_ * rows_;
    unit.rows = std::min(g_.OH - unit.row, rows_);
    unit.plane = layout_.channel_size(unit.rows);
    unit.pairs = pairs(unit.rows);
    fill_planes(unit, group * channels(), space);
    BFloat16* to = space.pairs;
    for (int64_t block = some.begin; block < some.end; ++block)
      to = fill_pairs(unit, group * outputs() + block * kBlock, width(block), to, space.rows);
    const auto finite = DLOPS_SIMD(all_finite, BFloat16);
    if (!finite(space.planes, unit.images * channels() * unit.plane) ||
        !finite(space.pairs, to - space.pairs))
      return false;
    multiply(chunk, group, unit, some, space);
    return true;
  }
  int64_t width(int64_t block) const { return std::min(kBlock, outputs() - block * kBlock); }

  // The phase planes as [image][channel].
  void fill_planes(const Unit& unit, int64_t c0, Space space) const {
    const auto flip = DLOPS_SIMD(transpose, BFloat16, BFloat16);
    const auto fill = DLOPS_SIMD(fill_phases, BFloat16, BFloat16);
    const Interval rows = input_rows(unit.row, unit.rows);
    const int64_t pixels = length(rows) * g_.W;
    BFloat16* to = space.planes;
    for (int64_t n = unit.image; n < unit.image + unit.images; ++n) {
      if (input_.last)
        flip(input_.at(n, c0, rows.begin, 0), g_.C, pixels, channels(), space.rows, pixels);
      for (int64_t c = 0; c < channels(); ++c, to += unit.plane) {
        const BFloat16* plane =
            input_.last ? space.rows + c * pixels - rows.begin * g_.W : input_.at(n, c0 + c, 0, 0);
        fill(g_, plane, unit.row, unit.rows, to);
      }
    }
    std::fill_n(to, kPlaneSlack, BFloat16(0));  // Met by the odd pixel at the end of a plane.
  }

  // A block of the gradient as [image][pair of pixels][output][2], with zeros between its rows.
  BFloat16* fill_pairs(const Unit& unit, int64_t o0, int64_t width, BFloat16* to,
                       BFloat16* space) const {
    for (int64_t n = unit.image; n < unit.image + unit.images; ++n, to += unit.pairs * 2 * width) {
      if (grad_.last) {
        pair_pixels(unit, grad_.at(n, o0, unit.row, 0), width, to, space);
      } else {
        turn_pairs(unit, n, o0, width, to, space);
      }
    }
    return to;
  }
  void pair_pixels(const Unit& unit, const BFloat16* grad, int64_t width, BFloat16* to,
                   BFloat16* zeros) const {
    const auto join = DLOPS_SIMD(pair_rows, BFloat16);
    std::fill_n(zeros, width, BFloat16(0));
    int64_t row = 0, col = 0;
    const auto next = [&] {
      const BFloat16* pixel =
          row < unit.rows && col < g_.OW ? grad + (row * g_.OW + col) * g_.O : zeros;
      if (++col == layout_.pitch) {
        col = 0;
        ++row;
      }
      return pixel;
    };
    for (int64_t i = 0; i < unit.pairs; ++i, to += 2 * width) {
      const BFloat16 *even = next(), *odd = next();
      join(even, odd, to, width);
    }
  }
  void turn_pairs(const Unit& unit, int64_t n, int64_t o0, int64_t width, BFloat16* to,
                  BFloat16* space) const {
    const auto fill = DLOPS_SIMD(fill_gradient, BFloat16, BFloat16);
    const auto turn = DLOPS_SIMD(transpose_pairs, BFloat16);
    // Whole vectors are written, beyond a plane's end: they are filled front to back.
    const int64_t pixels = unit.pairs * 2, met = (unit.rows - 1) * layout_.pitch + g_.OW;
    for (int64_t o = 0; o < width; ++o) {
      fill(g_, grad_.at(n, o0 + o, 0, 0), unit.row, unit.rows, space + o * pixels);
      std::fill(space + o * pixels + met, space + (o + 1) * pixels, BFloat16(0));
    }
    turn(space, unit.pairs, width, unit.pairs, to, width);
  }

  void multiply(int64_t chunk, int64_t group, const Unit& unit, Interval some, Space space) const {
    float* sums = sum_data_ + (chunk * g_.groups + group) * cells() * channels() * outputs();
    for (int64_t cell = 0; cell < cells(); ++cell) {
      const int64_t offset = layout_.offset(g_, unit.rows, cell / g_.S, cell % g_.S);
      for (int64_t c = 0; c < channels(); c += kBlock) {
        const BFloat16* b = space.pairs;
        for (int64_t block = some.begin; block < some.end; ++block) {
          for (int64_t n = 0; n < unit.images; ++n, b += unit.pairs * 2 * width(block)) {
            const BFloat16* a = space.planes + (n * channels() + c) * unit.plane + offset;
            matmul(std::min(kBlock, channels() - c), width(block), unit.pairs * 2, a, unit.plane, b,
                   width(block), sums + (cell * channels() + c) * outputs() + block * kBlock,
                   outputs(), true);
          }
        }
      }
    }
  }

  // Adds up the chunks in their order and turns the sums round to [output][channel][cell], or
  // channels_last [output][cell][channel].
  void finish(BFloat16* result, bool last) const {
    constexpr int64_t kTile = 32;
    const auto add = DLOPS_SIMD(add_row, float, float);
    const auto flip = DLOPS_SIMD(transpose, float, BFloat16);
    const int64_t size = cells() * channels(), tiles = ceil_div(outputs(), kTile);
    at::parallel_for(
        0, g_.groups * tiles, grain(chunks_ * size * kTile), [&](int64_t begin, int64_t end) {
          Scratch scratch(Scratch::size<float>(size * kTile));
          float* tile = scratch.take<float>(size * kTile);
          for (int64_t i = begin; i < end; ++i) {
            const int64_t group = i / tiles, o = i % tiles * kTile;
            const int64_t width = std::min(kTile, outputs() - o);
            for (int64_t row = 0; row < size; ++row) {
              const int64_t cell = row / channels(), c = row % channels();
              float* to = tile + (last ? row : c * cells() + cell) * width;
              const float* from = sum_data_ + (group * size + row) * outputs() + o;
              std::copy_n(from, width, to);
              for (int64_t chunk = 1; chunk < chunks_; ++chunk)
                add(from + chunk * g_.O * size, to, width);
            }
            flip(tile, width, size, width, result + (group * outputs() + o) * size, size);
          }
        });
  }

  const Conv2dGeometry& g_;
  const PlaneLayout layout_;
  const ImageView<BFloat16> grad_, input_;
  int64_t rows_, images_;  // of a unit
  int64_t strips_, units_, chunks_, splits_;
  at::Tensor sums_;
  float* sum_data_ = nullptr;
};

}  // namespace

bool takes_pairs(const Conv2dGeometry& g, at::ScalarType dtype) {
  constexpr int64_t kThin = 8;
  const bool thin = g.groups > 1 && std::min(g.channels_per_group(), g.outputs_per_group()) < kThin;
  return dtype == at::kBFloat16 && multiplies_bfloat16() && !thin && PlaneLayout(g).compact(g);
}

bool pairs_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& input, const at::Tensor& grad_weight,
                       at::MemoryFormat format) {
  const bool last = format == at::MemoryFormat::ChannelsLast;
  return PairedWeightGradient(g, grad_output, input, last).run(grad_weight, last);
}

}  // namespace dlops::cpu
