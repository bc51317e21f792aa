#include "cpu/conv2d_parts.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>

#include "cpu/capability.h"
#include "cpu/conv2d_pairs_weight.h"
#include "cpu/grain.h"
#include "cpu/matmul_tiles.h"
#include "cpu/simd/conv2d.h"

namespace dlops::cpu {
namespace {

using c10::BFloat16;

struct Parts {
  at::Tensor high, low;
};

// Undefined where a number has none.
Parts split(const at::Tensor& tensor) {
  Parts parts{at::empty_like(tensor, tensor.options().dtype(at::kBFloat16)),
              at::empty_like(tensor, tensor.options().dtype(at::kBFloat16))};
  const float* from = tensor.const_data_ptr<float>();
  BFloat16 *high = parts.high.mutable_data_ptr<BFloat16>(),
           *low = parts.low.mutable_data_ptr<BFloat16>();
  std::atomic<bool> can_split = true;
  const auto split = DLOPS_SIMD(split_row);
  at::parallel_for(0, tensor.numel(), grain(1), [&](int64_t begin, int64_t end) {
    if (!split(from + begin, high + begin, low + begin, end - begin)) can_split = false;
  });
  return can_split ? parts : Parts{};
}

}  // namespace

bool takes_parts(at::ScalarType dtype, int64_t depth_channels) {
  constexpr int64_t kLeastChannels = 16;
  if (dtype != at::kFloat || depth_channels < kLeastChannels || depth_channels % 2 != 0)
    return false;
  // What 'high' and 'medium' stand for since torch has precisions for each backend.
  const auto precision = [](at::Float32Op op) {
    return at::globalContext().float32Precision(at::Float32Backend::MKLDNN, op);
  };
  const at::Float32Precision products = precision(at::Float32Op::MATMUL);
  return (products == at::Float32Precision::TF32 || products == at::Float32Precision::BF16) &&
         precision(at::Float32Op::CONV) != at::Float32Precision::IEEE && splits_float32();
}

bool split_pixels(const float* from, int64_t pixels, int64_t channels, BFloat16* to) {
  const auto split = DLOPS_SIMD(split_row);
  bool can_split = true;
  for (int64_t p = 0; p < pixels; ++p, from += channels, to += kParts * channels) {
    can_split &= split(from, to, to + 2 * channels, channels);
    std::copy_n(to, channels, to + channels);
  }
  return can_split;
}

at::Tensor weight_parts(const at::Tensor& weight, int64_t axis, int64_t groups) {
  const Parts parts = split(weight.contiguous());
  if (!parts.high.defined()) return {};
  if (axis == 1) return at::cat({parts.high, parts.low, parts.high}, 1);
  const int64_t outputs = weight.size(0) / groups;
  const auto grouped = [&](const at::Tensor& part) { return part.unflatten(0, {groups, outputs}); };
  return at::cat({grouped(parts.high), grouped(parts.low), grouped(parts.high)}, 1).flatten(0, 1);
}

bool parts_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& input, const at::Tensor& grad_weight,
                       at::MemoryFormat format) {
  // What the parts of some images may take at a time.
  constexpr int64_t kBytes = 4 << 20;
  const int64_t image = 4 * (g.C * g.H * g.W + g.O * g.output_pixels());
  const int64_t at_a_time = std::clamp<int64_t>(kBytes / std::max<int64_t>(1, image), 1, g.N);
  const at::Tensor term = at::empty_like(grad_weight);
  for (int64_t n = 0; n < g.N; n += at_a_time) {
    Conv2dGeometry some = g;
    some.N = std::min(at_a_time, g.N - n);
    if (!takes_pairs(some, at::kBFloat16)) return false;
    const Parts x = split(input.narrow(0, n, some.N));
    const Parts grad = split(grad_output.narrow(0, n, some.N));
    if (!x.high.defined() || !grad.high.defined()) return false;
    const auto add = [&](const at::Tensor& grad_part, const at::Tensor& input_part, bool first) {
      const at::Tensor& to = first ? grad_weight : term;
      if (!pairs_grad_weight(some, grad_part, input_part, to, format)) return false;
      if (!first) grad_weight.add_(term);
      return true;
    };
    if (!add(grad.high, x.high, n == 0) || !add(grad.high, x.low, false) ||
        !add(grad.low, x.high, false))
      return false;
  }
  return true;
}

}  // namespace dlops::cpu
