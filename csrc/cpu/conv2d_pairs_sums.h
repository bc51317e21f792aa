// The sums that products of pairs make of a weight's gradient, and their way into the gradient.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <vector>

#include "conv2d_math.h"
#include "cpu/capability.h"
#include "cpu/conv2d_taps.h"
#include "cpu/grain.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d.h"

namespace dlops::cpu {

// Matrices [channel][output] of a group, for each kernel cell that meets the image, in several
// chunks that tasks fill side by side. How many there are depends on the shapes alone.
class PairSums {
 public:
  static constexpr int64_t kBlock = 64;  // channels and outputs of a product

  // `units`: of work, that chunks may share.
  PairSums(const Conv2dGeometry& g, int64_t units) : g_(g), cells_(live_cells(g)), units_(units) {
    const int64_t size = g.O * g.channels_per_group() * cells();
    const int64_t most = std::max<int64_t>(1, kElements / std::max<int64_t>(1, size));
    chunks_ = std::min({units, most, ceil_div(kTasks, g.groups)});
    splits_ = std::min(blocks(), ceil_div(kTasks, chunks_ * g.groups));
    sums_ = at::empty({chunks_, size}, at::kFloat);
    data_ = sums_.mutable_data_ptr<float>();
  }
  PairSums(const PairSums&) = delete;
  PairSums& operator=(const PairSums&) = delete;

  // As many parts of the batch as give every thread some, where all blocks of outputs do not.
  static int64_t tasks_per_block(const Conv2dGeometry& g) {
    return ceil_div(kTasks, g.groups * ceil_div(g.outputs_per_group(), kBlock));
  }
  int64_t blocks() const { return ceil_div(g_.outputs_per_group(), kBlock); }
  int64_t width(int64_t block) const {
    return std::min(kBlock, g_.outputs_per_group() - block * kBlock);
  }
  int64_t cells() const { return static_cast<int64_t>(cells_.size()); }
  int64_t cell(int64_t i) const { return cells_[static_cast<size_t>(i)]; }  // ascending
  // Of cell(i) and the outputs of a block, from a channel on.
  float* at(int64_t chunk, int64_t group, int64_t i, int64_t channel, int64_t block) const {
    const int64_t matrix = (chunk * g_.groups + group) * cells() + i;
    return data_ + (matrix * g_.channels_per_group() + channel) * ld() + block * kBlock;
  }
  int64_t ld() const { return g_.outputs_per_group(); }

  // Runs begin() on each thread, and what it returns on each of its units as
  // (chunk, group, unit, blocks, first), where the first unit of a chunk writes all sums of it.
  template <class Begin>
  void fill(const Begin& begin_thread) const {
    const int64_t work = g_.N * g_.output_pixels() * g_.column_rows() * g_.outputs_per_group() /
                         std::max<int64_t>(1, chunks_ * splits_);
    at::parallel_for(0, chunks_ * g_.groups * splits_, grain(work),
                     [&](int64_t begin, int64_t end) {
                       begin_thread([&](const auto& add) {
                         // Neighbouring splits share what a unit is brought into.
                         for (int64_t task = begin, next; task < end; task = next) {
                           const int64_t part = task / splits_, group = part % g_.groups;
                           const int64_t chunk = part / g_.groups;
                           next = std::min(end, (part + 1) * splits_);
                           const Interval some{(task - part * splits_) * blocks() / splits_,
                                               (next - part * splits_) * blocks() / splits_};
                           const int64_t first = chunk * units_ / chunks_;
                           for (int64_t unit = first; unit < (chunk + 1) * units_ / chunks_; ++unit)
                             add(chunk, group, unit, some, unit == first);
                         }
                       });
                     });
  }

  // Adds up the chunks in their order and turns the sums round to [output][channel][cell], or
  // channels_last [output][cell][channel].
  void finish(c10::BFloat16* result, bool last) const {
    const auto flip = DLOPS_SIMD(transpose, float, c10::BFloat16);
    constexpr int64_t kOutputs = 32, kRows = 288;  // of a tile that stays in the first-level cache
    const int64_t all = g_.R * g_.S, channels = g_.channels_per_group(), size = all * channels;
    const int64_t height = std::min(channels, std::max<int64_t>(1, kRows / all));
    const int64_t across = ceil_div(ld(), kOutputs), down = ceil_div(channels, height);
    at::parallel_for(0, g_.groups * across * down, grain(chunks_ * all * height * kOutputs),
                     [&](int64_t begin, int64_t end) {
                       Scratch scratch(Scratch::size<float>(all * height * kOutputs));
                       float* tile = scratch.take<float>(all * height * kOutputs);
                       for (int64_t i = begin; i < end; ++i) {
                         const int64_t group = i / down / across, o = i / down % across * kOutputs;
                         const int64_t c = i % down * height;
                         const int64_t width = std::min(kOutputs, ld() - o);
                         const int64_t count = std::min(height, channels - c);
                         add_chunks(group, {c, c + count}, {o, o + width}, last, tile);
                         c10::BFloat16* to = result + (group * ld() + o) * size;
                         if (last) {
                           for (int64_t cell = 0; cell < all; ++cell)
                             flip(tile + cell * count * width, width, count, width,
                                  to + cell * channels + c, size);
                         } else {
                           flip(tile, width, count * all, width, to + c * all, size);
                         }
                       }
                     });
  }

 private:
  static std::vector<int64_t> live_cells(const Conv2dGeometry& g) {
    const TapAxis rows = live(forward_axis(g.OH, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h));
    const TapAxis cols = live(forward_axis(g.OW, g.W, g.S, g.stride_w, g.pad_left, g.dilation_w));
    std::vector<int64_t> cells;
    for (const int64_t r : rows.cells)
      for (const int64_t s : cols.cells) cells.push_back(r * g.S + s);
    return cells;
  }

  // The sums of some channels and outputs as [channel][cell][output], or [cell][channel][output].
  void add_chunks(int64_t group, Interval channels, Interval outputs, bool last, float* to) const {
    const auto add = DLOPS_SIMD(add_row, float, float);
    const int64_t all = g_.R * g_.S, width = length(outputs);
    if (cells() < all) std::fill_n(to, all * length(channels) * width, 0.0F);
    for (int64_t i = 0; i < cells(); ++i) {
      for (int64_t c = channels.begin; c < channels.end; ++c) {
        const int64_t place = c - channels.begin;
        float* row =
            to + (last ? cell(i) * length(channels) + place : place * all + cell(i)) * width;
        std::copy_n(at(0, group, i, c, 0) + outputs.begin, width, row);
        for (int64_t chunk = 1; chunk < chunks_; ++chunk)
          add(at(chunk, group, i, c, 0) + outputs.begin, row, width);
      }
    }
  }

  static constexpr int64_t kTasks = 8;  // that keep a few threads evenly busy
  // What the sums of all chunks may take, where that is more than the gradient itself.
  static constexpr int64_t kElements = 512 * 1024;
  const Conv2dGeometry& g_;
  const std::vector<int64_t> cells_;
  int64_t units_, chunks_, splits_;
  at::Tensor sums_;
  float* data_;
};

}  // namespace dlops::cpu
