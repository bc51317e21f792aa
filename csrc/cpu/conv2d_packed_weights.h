// The weights of a correlation in the order in which its products read them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/conv2d_correlation.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {

// The weights as [group][block][tap][in channel][out channel of the block], in the type of the
// products' operands. Those of bfloat16 want the rows [tap][in channel] in pairs: [row / 2][out
// channel][2].
template <class scalar_t, class operand_t>
class PackedWeights {
  static constexpr bool kPairs = std::is_same_v<operand_t, c10::BFloat16>;

 public:
  PackedWeights(const Correlation& k, const at::Tensor& weight)
      : k_(k), C_(weight.size(1)), cells_(weight.size(2) * weight.size(3)) {
    at::Tensor dense = weight;
    if (!dense.is_contiguous() && !dense.is_contiguous(at::MemoryFormat::ChannelsLast))
      dense = dense.contiguous();
    last_ = !dense.is_contiguous();
    from_ = dense.const_data_ptr<scalar_t>();
    tensor_ = at::empty({k.groups * k.blocks() * block_size() + kPadding},
                        at::TensorOptions(c10::CppTypeToScalarType<operand_t>::value));
    to_ = tensor_.mutable_data_ptr<operand_t>();
    pack();
  }
  const operand_t* block(int64_t group, int64_t block) const {
    return to_ + (group * k_.blocks() + block) * block_size();
  }

 private:
  static constexpr int64_t kChunk = 16;  // input channels at a time
  int64_t cells() const { return cells_; }
  int64_t block_size() const { return k_.weight_rows() * k_.block(); }
  int64_t place(int64_t cell) const { return k_.places[static_cast<size_t>(cell)]; }
  operand_t* destination(int64_t group, int64_t block, int64_t cell, int64_t in) const {
    return to_ + (group * k_.blocks() + block) * block_size() +
           (place(cell) * k_.in_channels + in) * k_.block();
  }

  // Whether no pair is of two cells.
  bool even() const { return k_.in_channels % 2 == 0; }
  // Whether a cell's channels are neighbours in memory.
  bool dense_cells() const { return last_ || cells() == 1; }
  // Whether rows of outputs go where they belong as they are read.
  bool at_once() const { return !kPairs && dense_cells(); }

  void pack() {
    const int64_t chunks = ceil_div(k_.in_channels, kChunk);
    const int64_t tasks = k_.groups * k_.blocks() * chunks, size = kChunk * cells() * k_.block();
    at::parallel_for(0, tasks, grain(size), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<operand_t>(size));
      operand_t* space = scratch.take<operand_t>(size);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task / chunks % k_.blocks(), group = task / chunks / k_.blocks();
        const int64_t in = task % chunks * kChunk, out = block * k_.block();
        const Interval ins{in, std::min(k_.in_channels, in + kChunk)};
        const int64_t width = std::min(k_.block(), k_.out_channels - out);
        if constexpr (kPairs) {
          if (even()) {
            k_.from_outputs ? pair_by_inputs(group, block, ins, {out, out + width}, space)
                            : pair_by_outputs(group, block, ins, {out, out + width}, space);
            continue;
          }
        }
        if (k_.from_outputs) {
          pack_by_inputs(group, block, ins, {out, out + width}, space);
        } else {
          pack_by_outputs(group, block, ins, {out, out + width}, space);
        }
        if (!at_once()) place_rows(group, block, ins, width, space);
      }
    });
  }

  // These two leave rows of outputs as [in][cell] in `space`, unless they place them at once. Here
  // `out` are the weight's outputs, `in` its channels:
  void pack_by_outputs(int64_t group, int64_t block, Interval in, Interval out, operand_t* space) {
    const auto flip = DLOPS_SIMD(transpose, scalar_t, operand_t);
    const int64_t width = length(out), count = length(in), ld = C_ * cells();
    const scalar_t* outputs = from_ + (group * k_.out_channels + out.begin) * ld;
    if (!last_ && cells() > 1) {
      flip(outputs + in.begin * cells(), ld, width, count * cells(), space, width);
      return;
    }
    for (int64_t cell = 0; cell < cells(); ++cell) {
      const scalar_t* from = outputs + cell * C_ + in.begin;
      if (place(cell) < 0) continue;
      if (at_once()) {
        flip(from, ld, width, count, destination(group, block, cell, in.begin), k_.block());
      } else {
        flip(from, ld, width, count, space + cell * width, cells() * width);
      }
    }
  }
  // `out` are the weight's channels, `in` its outputs.
  void pack_by_inputs(int64_t group, int64_t block, Interval in, Interval out, operand_t* space) {
    const auto flip = DLOPS_SIMD(transpose, scalar_t, operand_t);
    const auto convert = DLOPS_SIMD(convert_row, scalar_t, operand_t);
    const int64_t width = length(out);
    for (int64_t o = in.begin; o < in.end; ++o, space += cells() * width) {
      const scalar_t* output = from_ + (group * k_.in_channels + o) * C_ * cells();
      if (!last_ && cells() > 1) {
        flip(output + out.begin * cells(), cells(), width, cells(), space, width);
        continue;
      }
      for (int64_t cell = 0; cell < cells(); ++cell) {
        if (place(cell) < 0) continue;
        convert(output + cell * C_ + out.begin,
                at_once() ? destination(group, block, cell, o) : space + cell * width, width);
      }
    }
  }

  void place_rows(int64_t group, int64_t block, Interval in, int64_t width,
                  const operand_t* space) const {
    for (int64_t i = in.begin; i < in.end; ++i) {
      for (int64_t cell = 0; cell < cells(); ++cell) {
        if (place(cell) < 0) continue;
        const operand_t* row = space + ((i - in.begin) * cells() + cell) * width;
        operand_t* to = destination(group, block, cell, i);
        if constexpr (!kPairs) {
          std::copy_n(row, width, to);
        } else {
          const int64_t odd = (place(cell) * k_.in_channels + i) % 2;  // the second of its pair
          to += odd - odd * k_.block();
          for (int64_t j = 0; j < width; ++j) to[2 * j] = row[j];
        }
      }
    }
    if constexpr (kPairs) {
      operand_t* last = to_ + (group * k_.blocks() + block + 1) * block_size() - 2 * k_.block();
      for (int64_t j = 0; j < k_.pad * width; ++j) last[2 * j + 1] = operand_t(0);
    }
  }

  // The same two for pairs of channels, which they place. What is turned round are whole pairs, as
  // numbers of twice the size, where the two are neighbours or can be made so first.
  void pair_by_outputs(int64_t group, int64_t block, Interval in, Interval out, operand_t* space) {
    const auto turn = DLOPS_SIMD(transpose_pairs, operand_t);
    const auto join = DLOPS_SIMD(pair_rows, operand_t);
    const int64_t width = length(out), count = length(in), ld = C_ * cells();
    const operand_t* outputs = from_ + (group * k_.out_channels + out.begin) * ld;
    if (!dense_cells()) DLOPS_SIMD(transpose, operand_t, operand_t)
    (outputs + in.begin * cells(), ld, width, count * cells(), space, width);
    for (int64_t cell = 0; cell < cells(); ++cell) {
      if (place(cell) < 0) continue;
      operand_t* to = destination(group, block, cell, in.begin);
      if (dense_cells()) {
        turn(outputs + cell * C_ + in.begin, ld / 2, width, count / 2, to, k_.block());
        continue;
      }
      for (int64_t i = 0; i < count; i += 2, to += 2 * k_.block()) {
        const operand_t* row = space + (i * cells() + cell) * width;
        join(row, row + cells() * width, 0, 1, to, width);
      }
    }
  }
  void pair_by_inputs(int64_t group, int64_t block, Interval in, Interval out, operand_t* space) {
    const auto turn = DLOPS_SIMD(transpose_pairs, operand_t);
    const auto join = DLOPS_SIMD(pair_rows, operand_t);
    const int64_t width = length(out), ld = C_ * cells();
    operand_t* const turned = space + 2 * width * cells();
    for (int64_t o = in.begin; o < in.end; o += 2) {
      const operand_t* output = from_ + (group * k_.in_channels + o) * ld;
      if (!dense_cells()) {
        const operand_t* run = output + out.begin * cells();
        join(run, run + ld, 0, 1, space, width * cells());
        turn(space, cells(), width, cells(), turned, width);
      }
      for (int64_t cell = 0; cell < cells(); ++cell) {
        if (place(cell) < 0) continue;
        operand_t* const to = destination(group, block, cell, o);
        const operand_t* row = output + cell * C_ + out.begin;
        if (dense_cells()) {
          join(row, row + ld, 0, 1, to, width);
        } else {
          std::copy_n(turned + cell * 2 * width, 2 * width, to);
        }
      }
    }
  }

  const Correlation& k_;
  int64_t C_, cells_;
  bool last_;
  const scalar_t* from_;
  at::Tensor tensor_;
  operand_t* to_;
};

}  // namespace dlops::cpu
