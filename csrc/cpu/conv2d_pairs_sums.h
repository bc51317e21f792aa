// The sums that products of pairs make of a weight's gradient, and their way into the gradient.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>

#include <algorithm>

#include "conv2d_math.h"
#include "cpu/capability.h"
#include "cpu/grain.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d.h"

namespace dlops::cpu {

// Matrices [channel][output] of a group, for each kernel cell, in several chunks that tasks fill
// side by side. How many there are depends on the shapes alone.
class PairSums {
 public:
  static constexpr int64_t kBlock = 64;  // channels and outputs of a product

  // `units`: of work, that chunks may share.
  PairSums(const Conv2dGeometry& g, int64_t units) : g_(g), units_(units) {
    const int64_t most = std::max<int64_t>(1, kElements / (g.O * g.column_rows()));
    chunks_ = std::min({units, most, ceil_div(kTasks, g.groups)});
    splits_ = std::min(blocks(), ceil_div(kTasks, chunks_ * g.groups));
    sums_ = at::zeros({chunks_, g.O * g.column_rows()}, at::kFloat);
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
  int64_t most_blocks() const { return ceil_div(blocks(), splits_); }  // of a task
  float* at(int64_t chunk, int64_t group, int64_t cell, int64_t channel, int64_t block) const {
    const int64_t cells = g_.R * g_.S, row = (group * cells + cell) * g_.channels_per_group();
    return data_ + (chunk * g_.groups * cells * g_.channels_per_group() + row + channel) * ld() +
           block * kBlock;
  }
  int64_t ld() const { return g_.outputs_per_group(); }

  // Runs begin() on each thread, and what it returns as (chunk, group, unit, blocks) on each of its
  // units.
  template <class Begin>
  void fill(const Begin& begin_thread) const {
    const int64_t work = g_.N * g_.output_pixels() * g_.column_rows() * g_.outputs_per_group() /
                         std::max<int64_t>(1, chunks_ * splits_);
    at::parallel_for(
        0, chunks_ * g_.groups * splits_, grain(work), [&](int64_t begin, int64_t end) {
          begin_thread([&](const auto& add) {
            for (int64_t task = begin; task < end; ++task) {
              const int64_t split = task % splits_, group = task / splits_ % g_.groups;
              const int64_t chunk = task / splits_ / g_.groups;
              const Interval some{split * blocks() / splits_, (split + 1) * blocks() / splits_};
              for (int64_t unit = chunk * units_ / chunks_; unit < (chunk + 1) * units_ / chunks_;
                   ++unit)
                add(chunk, group, unit, some);
            }
          });
        });
  }

  // Adds up the chunks in their order and turns the sums round to [output][channel][cell], or
  // channels_last [output][cell][channel].
  void finish(c10::BFloat16* result, bool last) const {
    constexpr int64_t kTile = 16;
    const auto add = DLOPS_SIMD(add_row, float, float);
    const auto flip = DLOPS_SIMD(transpose, float, c10::BFloat16);
    const int64_t cells = g_.R * g_.S, channels = g_.channels_per_group(), size = cells * channels;
    const int64_t tiles = ceil_div(ld(), kTile);
    at::parallel_for(0, g_.groups * tiles, grain(chunks_ * size * kTile),
                     [&](int64_t begin, int64_t end) {
                       Scratch scratch(Scratch::size<float>(size * kTile));
                       float* tile = scratch.take<float>(size * kTile);
                       for (int64_t i = begin; i < end; ++i) {
                         const int64_t group = i / tiles, o = i % tiles * kTile;
                         const int64_t width = std::min(kTile, ld() - o);
                         for (int64_t row = 0; row < size; ++row) {
                           const int64_t cell = row / channels, c = row % channels;
                           float* to = tile + (last ? row : c * cells + cell) * width;
                           std::copy_n(at(0, group, cell, c, 0) + o, width, to);
                           for (int64_t chunk = 1; chunk < chunks_; ++chunk)
                             add(at(chunk, group, cell, c, 0) + o, to, width);
                         }
                         flip(tile, width, size, width, result + (group * ld() + o) * size, size);
                       }
                     });
  }

 private:
  static constexpr int64_t kTasks = 8;  // that keep a few threads evenly busy
  // What the sums of all chunks may take, where that is more than the gradient itself.
  static constexpr int64_t kElements = 512 * 1024;
  const Conv2dGeometry& g_;
  int64_t units_, chunks_, splits_;
  at::Tensor sums_;
  float* data_;
};

}  // namespace dlops::cpu
