#include "cpu/conv2d_depthwise.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "cpu/capability.h"
#include "cpu/grain.h"
#include "cpu/simd/conv2d_depthwise.h"
#include "cpu/sums.h"

namespace dlops::cpu {
namespace {

// One axis of a convolution.
struct Axis {
  int64_t input, output, kernel, stride, pad, dilation;
};

// The taps of every destination along an axis, and the runs that share them.
class Taps {
 public:
  // Seen from the output: taps are input positions.
  static Taps of_outputs(const Axis& a) {
    Taps taps(a.output);
    for (int64_t o = 0; o < a.output; ++o) {
      for (int64_t k = 0; k < a.kernel; ++k) {
        const int64_t i = o * a.stride - a.pad + k * a.dilation;
        if (0 <= i && i < a.input) taps.add({i, k});
      }
      taps.close();
    }
    return taps;
  }
  // Seen from the input: taps are output positions. Those ascend, too, so that memory is read on.
  static Taps of_inputs(const Axis& a) {
    Taps taps(a.input);
    for (int64_t i = 0; i < a.input; ++i) {
      for (int64_t k = a.kernel - 1; k >= 0; --k) {
        const int64_t scaled = i + a.pad - k * a.dilation;
        if (scaled >= 0 && scaled % a.stride == 0 && scaled / a.stride < a.output)
          taps.add({scaled / a.stride, k});
      }
      taps.close();
    }
    return taps;
  }
  std::vector<TapRun> each() const {
    std::vector<TapRun> runs;
    for (size_t i = 0; i + 1 < ends_.size(); ++i)
      runs.push_back(run(static_cast<int64_t>(i), 1, 0));
    return runs;
  }
  // Runs of destinations `step` apart, whose sources are `source_step` apart.
  std::vector<TapRun> runs(int64_t step, int64_t source_step) const {
    const int64_t count = static_cast<int64_t>(ends_.size()) - 1;
    std::vector<TapRun> result;
    for (int64_t phase = 0; phase < std::min(step, count); ++phase) {
      result.push_back(run(phase, step, source_step));
      for (int64_t i = phase + step; i < count; i += step) {
        if (follows(i, i - step, source_step)) {
          ++result.back().count;
        } else {
          result.push_back(run(i, step, source_step));
        }
      }
    }
    return result;
  }

 private:
  explicit Taps(int64_t destinations) { ends_.reserve(static_cast<size_t>(destinations + 1)); }
  void add(Tap tap) { taps_.push_back(tap); }
  void close() { ends_.push_back(static_cast<int64_t>(taps_.size())); }
  TapRun run(int64_t i, int64_t step, int64_t source_step) const {
    const size_t at = static_cast<size_t>(i);
    return {i, step, 1, source_step, taps_.data() + ends_[at], ends_[at + 1] - ends_[at]};
  }
  bool follows(int64_t i, int64_t before, int64_t source_step) const {
    const TapRun a = run(before, 0, 0), b = run(i, 0, 0);
    if (a.tap_count != b.tap_count) return false;
    for (int64_t t = 0; t < a.tap_count; ++t) {
      if (a.taps[t].cell != b.taps[t].cell || a.taps[t].source + source_step != b.taps[t].source)
        return false;
    }
    return true;
  }
  std::vector<Tap> taps_;
  std::vector<int64_t> ends_{0};
};

Axis vertical(const Conv2dGeometry& g) {
  return {g.H, g.OH, g.R, g.stride_h, g.pad_top, g.dilation_h};
}
Axis horizontal(const Conv2dGeometry& g) {
  return {g.W, g.OW, g.S, g.stride_w, g.pad_left, g.dilation_w};
}

// The weight as (R, S, C), in the type of the sums.
at::Tensor cells_by_channels(const at::Tensor& weight) {
  const at::Tensor cells = weight.squeeze(1).permute({1, 2, 0});
  return cells.to(at::toOpMathType(weight.scalar_type())).contiguous();
}

void sum_images(const Conv2dGeometry& g, const std::vector<TapRun>& rows,
                const std::vector<TapRun>& cols, int64_t from_height, int64_t from_width,
                const at::Tensor& from, const at::Tensor& weight, const at::Tensor& bias,
                const at::Tensor& to) {
  const int64_t height = to.size(2), width = to.size(3);
  const DepthwiseSum d{
      rows.data(), cols.data(), static_cast<int64_t>(cols.size()), from_width, width, g.S, g.C};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "conv2d", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    const auto compute = DLOPS_SIMD(sum_taps, scalar_t, sum_t);
    const scalar_t* from_data = from.const_data_ptr<scalar_t>();
    const sum_t* weight_data = weight.const_data_ptr<sum_t>();
    const sum_t* bias_data = bias.defined() ? bias.const_data_ptr<sum_t>() : nullptr;
    scalar_t* to_data = to.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, g.N * height, grain(width * g.C * g.R * g.S), [&](int64_t a, int64_t b) {
      while (a < b) {
        const int64_t n = a / height, row = a % height;
        const int64_t end = std::min(height, row + b - a);
        compute(d, row, end, from_data + n * from_height * from_width * g.C, weight_data, bias_data,
                to_data + n * height * width * g.C);
        a += end - row;
      }
    });
  });
}

}  // namespace

bool takes_depthwise(const Conv2dGeometry& g, at::ScalarType dtype) {
  const bool floating =
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  return floating && g.groups > 1 && g.channels_per_group() == 1 && g.outputs_per_group() == 1;
}

void depthwise_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                       const at::Tensor& bias, const at::Tensor& output) {
  const Taps rows = Taps::of_outputs(vertical(g)), cols = Taps::of_outputs(horizontal(g));
  sum_images(g, rows.each(), cols.runs(1, g.stride_w), g.H, g.W, input, cells_by_channels(weight),
             bias, output);
}

void depthwise_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& weight, const at::Tensor& grad_input) {
  const Taps rows = Taps::of_inputs(vertical(g)), cols = Taps::of_inputs(horizontal(g));
  sum_images(g, rows.each(), cols.runs(g.stride_w, 1), g.OH, g.OW, grad_output,
             cells_by_channels(weight), {}, grad_input);
}

void depthwise_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                           const at::Tensor& input, const at::Tensor& grad_weight) {
  // Tasks are blocks of channels of parts of the batch; the cut depends on the shapes alone.
  constexpr int64_t kChannels = 64, kTasks = 32;
  const int64_t blocks = ceil_div(g.C, kChannels);
  const int64_t chunks = std::min(g.N, ceil_div(kTasks, blocks));
  const at::Tensor sums = at::zeros({chunks, g.R, g.S, g.C}, at::kDouble);
  double* sum_data = sums.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "conv2d_grad_weight", [&] {
        const auto compute = DLOPS_SIMD(correlate_channels, scalar_t);
        const scalar_t* grad_data = grad_output.const_data_ptr<scalar_t>();
        const scalar_t* image_data = input.const_data_ptr<scalar_t>();
        const int64_t work = g.N * g.OH * g.OW * g.R * g.S * kChannels / chunks;
        at::parallel_for(0, chunks * blocks, grain(work), [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            const int64_t chunk = task / blocks, c0 = task % blocks * kChannels;
            for (int64_t n = chunk * g.N / chunks; n < (chunk + 1) * g.N / chunks; ++n) {
              compute(g, grad_data + n * g.OH * g.OW * g.C, image_data + n * g.H * g.W * g.C, c0,
                      std::min(g.C, c0 + kChannels), sum_data + chunk * g.R * g.S * g.C);
            }
          }
        });
      });
  add_chunks<double>(sums);
  grad_weight.copy_(sums.select(0, 0).permute({2, 0, 1}).unsqueeze(1));
}

}  // namespace dlops::cpu
