// The sums that products of pairs make of a weight's gradient, and their way into the gradient.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "conv2d_math.h"
#include "cpu/capability.h"
#include "cpu/conv2d_taps.h"
#include "cpu/conv2d_weight_tasks.h"
#include "cpu/grain.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {

// Matrices [channel][output] of a group, for each kernel cell that meets the image, for each chunk.
class PairSums : public WeightTasks {
 public:
  PairSums(const Conv2dGeometry& g, int64_t units) : PairSums(g, units, live_cells(g)) {}

  int64_t cells() const { return static_cast<int64_t>(cells_.size()); }
  int64_t cell(int64_t i) const { return cells_[static_cast<size_t>(i)]; }  // ascending
  // Of cell(i) and the outputs of a block, from a channel on; the next cell's follow the last.
  float* at(int64_t chunk, int64_t group, int64_t i, int64_t channel, int64_t block) const {
    const int64_t matrix = (chunk * g_.groups + group) * cells() + i;
    return data_ + (matrix * g_.channels_per_group() + channel) * ld() + block * kBlock;
  }
  int64_t ld() const { return g_.outputs_per_group(); }

  // Adds up the chunks in their order and turns the sums round to [output][channel][cell], or
  // channels_last [output][cell][channel].
  template <class result_t>
  void finish(result_t* result, bool last) const {
    const auto flip = DLOPS_SIMD(transpose, float, result_t);
    constexpr int64_t kOutputs = 32, kRows = 288;  // of a tile that stays in the first-level cache
    const int64_t all = g_.R * g_.S, channels = g_.channels_per_group(), size = all * channels;
    const int64_t height = std::min(channels, std::max<int64_t>(1, kRows / all));
    const int64_t across = ceil_div(ld(), kOutputs), down = ceil_div(channels, height);
    at::parallel_for(0, g_.groups * across * down, grain(chunks() * all * height * kOutputs),
                     [&](int64_t begin, int64_t end) {
                       Scratch scratch(Scratch::size<float>(all * height * kOutputs));
                       float* tile = scratch.take<float>(all * height * kOutputs);
                       for (int64_t i = begin; i < end; ++i) {
                         const int64_t group = i / down / across, o = i / down % across * kOutputs;
                         const int64_t c = i % down * height;
                         const int64_t width = std::min(kOutputs, ld() - o);
                         const int64_t count = std::min(height, channels - c);
                         add_chunks(group, {c, c + count}, {o, o + width}, last, tile);
                         result_t* to = result + (group * ld() + o) * size;
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
  PairSums(const Conv2dGeometry& g, int64_t units, std::vector<int64_t> cells)
      : WeightTasks(g, units, size(g, cells)),
        g_(g),
        cells_(std::move(cells)),
        sums_(at::empty({chunks(), size(g, cells_)}, at::kFloat)),
        data_(sums_.mutable_data_ptr<float>()) {}
  static int64_t size(const Conv2dGeometry& g, const std::vector<int64_t>& cells) {
    return g.O * g.channels_per_group() * static_cast<int64_t>(cells.size());
  }
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
        for (int64_t chunk = 1; chunk < chunks(); ++chunk)
          add(at(chunk, group, i, c, 0) + outputs.begin, row, width);
      }
    }
  }

  const Conv2dGeometry& g_;
  const std::vector<int64_t> cells_;
  const at::Tensor sums_;
  float* data_;
};

}  // namespace dlops::cpu
