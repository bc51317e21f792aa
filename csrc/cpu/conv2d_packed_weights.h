// The weights of a correlation in the order in which its products read them.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

#include <algorithm>

#include "cpu/capability.h"
#include "cpu/conv2d_correlation.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/grain.h"
#include "cpu/scratch.h"

namespace dlops::cpu {

// The weights as [group][block][tap][in channel][out channel of the block], in the type of the
// sums.
template <class scalar_t>
class PackedWeights {
  using sum_t = at::opmath_type<scalar_t>;

 public:
  PackedWeights(const Correlation& k, const at::Tensor& weight)
      : k_(k), C_(weight.size(1)), cells_(weight.size(2) * weight.size(3)) {
    at::Tensor dense = weight;
    if (!dense.is_contiguous() && !dense.is_contiguous(at::MemoryFormat::ChannelsLast))
      dense = dense.contiguous();
    last_ = !dense.is_contiguous();
    from_ = dense.const_data_ptr<scalar_t>();
    tensor_ = at::empty({k.groups * k.blocks() * block_size()},
                        at::TensorOptions(c10::CppTypeToScalarType<sum_t>::value));
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
    const auto flip = DLOPS_SIMD(transpose, scalar_t, sum_t);
    const int64_t width = length(out), count = length(in), ld = C_ * cells();
    const scalar_t* outputs = from_ + (group * k_.out_channels + out.begin) * ld;
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
    const auto flip = DLOPS_SIMD(transpose, scalar_t, sum_t);
    const auto convert = DLOPS_SIMD(convert_row, scalar_t, sum_t);
    const int64_t width = length(out);
    for (int64_t o = in.begin; o < in.end; ++o) {
      const scalar_t* output = from_ + (group * k_.in_channels + o) * C_ * cells();
      const bool as_is = last_ || cells() == 1;
      if (!as_is) flip(output + out.begin * cells(), cells(), width, cells(), space, width);
      for (int64_t cell = 0; cell < cells(); ++cell) {
        if (place(cell) < 0) continue;
        sum_t* to = destination(group, block, cell, o);
        if (as_is) {
          convert(output + cell * C_ + out.begin, to, width);
        } else {
          std::copy_n(space + cell * width, width, to);
        }
      }
    }
  }

  const Correlation& k_;
  int64_t C_, cells_;
  bool last_;
  const scalar_t* from_;
  at::Tensor tensor_;
  sum_t* to_;
};

}  // namespace dlops::cpu
