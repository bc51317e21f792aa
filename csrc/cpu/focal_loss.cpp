// Softmax focal loss on the CPU: splits the rows among threads; the loops are in
// simd/focal_loss.cpp and, for value and gradient of rows with many classes side by side, in
// simd/focal_loss_wide.cpp.
#include "cpu/simd/focal_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "common/focal_checks.h"
#include "cpu/capability.h"
#include "cpu/scratch.h"
#include "cpu/sums.h"

namespace dlops::cpu {
namespace {

// The op's arguments, checked and laid out alike. A channels_last input is a batch of N * H * W
// rows whose classes are neighbours in memory.
struct Call {
  FocalShape shape;
  at::MemoryFormat format;
  at::Tensor input, target, weight;
  double gamma, label_smoothing;
  int64_t ignore_index, reduction;
  double normalizer;  // what 'mean' divides by

  Call(const at::Tensor& input_, const at::Tensor& target_,
       const std::optional<at::Tensor>& weight_, double gamma, int64_t ignore_index,
       int64_t reduction, double label_smoothing, const char* op)
      : shape(check_focal_loss(input_, target_, weight_, ignore_index, reduction, label_smoothing,
                               op)),
        format(input_.suggest_memory_format()),
        input(input_.contiguous(format)),
        target(shape.has_probabilities ? target_.contiguous(format) : target_.contiguous()),
        gamma(gamma),
        label_smoothing(label_smoothing),
        ignore_index(ignore_index),
        reduction(reduction) {
    if (weight_.has_value())
      weight = weight_->to(at::toOpMathType(weight_->scalar_type())).contiguous();
    normalizer = shape.has_probabilities ? static_cast<double>(shape.rows()) : add_up_targets(op);
  }
  // Checks the classes, and adds up the weights of those that count.
  double add_up_targets(const char* op) const {
    const int64_t* t = target.const_data_ptr<int64_t>();
    const at::Tensor weights = weight.defined() ? weight.to(at::kDouble) : weight;
    const double* w = weights.defined() ? weights.const_data_ptr<double>() : nullptr;
    return chunked_sum(shape.rows(), 16384, [&](int64_t begin, int64_t end) {
      int64_t valid = 0, bad = 0;
      for (int64_t i = begin; i < end; ++i) {
        const bool counts = t[i] != ignore_index;
        valid += counts;
        bad += counts && (t[i] < 0 || t[i] >= shape.classes);
      }
      for (int64_t i = begin; bad > 0 && i < end; ++i)
        TORCH_CHECK_INDEX(t[i] == ignore_index || (0 <= t[i] && t[i] < shape.classes), op,
                          ": target ", t[i], " is out of bounds for ", shape.classes, " classes");
      if (w == nullptr) return static_cast<double>(valid);
      double sum = 0;
      for (int64_t i = begin; i < end; ++i)
        if (t[i] != ignore_index) sum += w[t[i]];
      return sum;
    });
  }
  at::Tensor dense(const std::optional<at::Tensor>& tensor, const char* name,
                   const char* op) const {
    if (!tensor.has_value()) return {};
    check_like(*tensor, name, input, "input", op);
    check_sizes(*tensor, name, input.sizes(), op);
    return tensor->contiguous(format);
  }
  bool reduced() const { return reduction != at::Reduction::None; }
  bool class_is_innermost() const {
    return shape.inner == 1 || format != at::MemoryFormat::Contiguous;
  }
  bool wide() const {
    const bool of16 = capability() == kAvx512 && input.scalar_type() != at::kDouble;
    return class_is_innermost() && shape.classes >= (of16 ? kWideClassesOf16 : kWideClasses);
  }
  // Rows that one task works on: about 16 K elements, whole vectors of rows where there are more.
  int64_t chunk(int64_t least) const {
    constexpr int64_t kVector = 16;
    const int64_t rows = 16384 / std::max<int64_t>(1, shape.classes);
    return std::clamp<int64_t>(rows < kVector ? rows : rows / kVector * kVector, least, 4096);
  }
  // An empty tensor stands in place of a gradient that was not asked for.
  at::Tensor empty_grad(bool asked) const {
    return asked ? at::empty_like(input) : at::empty({0}, input.options());
  }
  // Without classes there is nothing to sum.
  at::Tensor empty_loss() const {
    const at::Tensor loss = at::empty(shape.loss, input.options());
    return shape.classes == 0 ? loss.zero_() : loss;
  }
  // A mean over nothing is NaN, though label smoothing has left something to sum.
  at::Tensor reduced_to(double sum, double normalizer) const {
    const double mean =
        normalizer == 0 ? std::numeric_limits<double>::quiet_NaN() : sum / normalizer;
    return at::scalar_tensor(reduction == at::Reduction::Mean ? mean : sum, input.options());
  }
  // The normalizer as a tensor.
  at::Tensor divisor() const {
    return at::scalar_tensor(normalizer,
                             input.options().dtype(at::toOpMathType(input.scalar_type())));
  }
  template <class scalar_t>
  FocalArgs<scalar_t> args() const {
    using T = at::opmath_type<scalar_t>;
    FocalArgs<scalar_t> args{};
    args.input = input.const_data_ptr<scalar_t>();
    if (shape.has_probabilities) {
      args.probabilities = target.const_data_ptr<scalar_t>();
    } else {
      args.target = target.const_data_ptr<int64_t>();
    }
    args.weight = weight.defined() ? weight.const_data_ptr<T>() : nullptr;
    args.classes = shape.classes;
    args.inner = class_is_innermost() ? 1 : shape.inner;
    args.ignore_index = ignore_index;
    args.gamma = gamma;
    args.label_smoothing = label_smoothing;
    return args;
  }
  // The upstream gradient, with the reduction's own factor.
  template <class scalar_t>
  RowFactor<scalar_t> upstream(const at::Tensor& grad_output, const at::Tensor& normalizer) const {
    if (!reduced()) return {1, grad_output.const_data_ptr<scalar_t>(), 0};
    return {share(normalizer.item<double>()), nullptr, grad_output.item<double>()};
  }
  // A row's part in the loss.
  double share(double normalizer) const {
    return reduction == at::Reduction::Mean ? 1 / normalizer : 1;
  }
};

template <class scalar_t>
const scalar_t* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<scalar_t>() : nullptr;
}
template <class scalar_t>
scalar_t* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.mutable_data_ptr<scalar_t>() : nullptr;
}

// Calls f(begin, end, scratch) for chunks of rows and returns the sum of the results: for the
// kernels of simd/focal_loss.cpp, whose vectors are up to 16 rows.
template <class scalar_t, class F>
double for_each_chunk(const Call& call, const F& f) {
  const int64_t bytes = DLOPS_SIMD(focal_loss_scratch, scalar_t)(call.shape.classes);
  return chunked_sum(call.shape.rows(), call.chunk(16), [&](int64_t begin, int64_t end) -> double {
    Scratch scratch(bytes);
    return f(begin, end, scratch.take<char>(bytes));
  });
}
// Calls f(begin, end): for those of simd/focal_loss_wide.cpp.
template <class F>
double for_each_wide_chunk(const Call& call, const F& f) {
  return chunked_sum(call.shape.rows(), call.chunk(1), f);
}

std::tuple<at::Tensor, at::Tensor> focal_loss(const at::Tensor& input, const at::Tensor& target,
                                              const std::optional<at::Tensor>& weight, double gamma,
                                              int64_t ignore_index, int64_t reduction,
                                              double label_smoothing) {
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing,
                  "focal_loss");
  const at::Tensor loss = call.reduced() ? at::Tensor() : call.empty_loss();
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "focal_loss", [&] {
    if (call.shape.classes == 0) return;
    const auto args = call.args<scalar_t>();
    scalar_t* to = mutable_data_or_null<scalar_t>(loss);
    if (call.wide()) {
      const auto kernel = DLOPS_SIMD(focal_loss_wide_rows, scalar_t);
      sum = for_each_wide_chunk(
          call, [&](int64_t begin, int64_t end) { return kernel(args, begin, end, to); });
    } else {
      const auto kernel = DLOPS_SIMD(focal_loss_rows, scalar_t);
      sum = for_each_chunk<scalar_t>(call, [&](int64_t begin, int64_t end, void* scratch) {
        return kernel(args, begin, end, to, scratch);
      });
    }
  });
  return {call.reduced() ? call.reduced_to(sum, call.normalizer) : loss, call.divisor()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> focal_loss_and_grad(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    double gamma, int64_t ignore_index, int64_t reduction, double label_smoothing) {
  constexpr const char* op = "focal_loss_and_grad";
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing, op);
  const at::Tensor loss = call.reduced() ? at::Tensor() : call.empty_loss();
  at::Tensor grad_input = call.empty_grad(true);
  const at::Tensor divisor = call.divisor();
  const double share = call.share(divisor.item<double>());
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    if (input.numel() == 0) return;
    const auto args = call.args<scalar_t>();
    scalar_t* to = mutable_data_or_null<scalar_t>(loss);
    scalar_t* to_input = mutable_data_or_null<scalar_t>(grad_input);
    if (call.wide()) {
      const auto kernel = DLOPS_SIMD(focal_loss_and_grad_wide_rows, scalar_t);
      sum = for_each_wide_chunk(call, [&](int64_t begin, int64_t end) {
        return kernel(args, begin, end, share, to, to_input);
      });
    } else {
      const auto kernel = DLOPS_SIMD(focal_loss_and_grad_rows, scalar_t);
      sum = for_each_chunk<scalar_t>(call, [&](int64_t begin, int64_t end, void* scratch) {
        return kernel(args, begin, end, share, to, to_input, scratch);
      });
    }
  });
  return {call.reduced() ? call.reduced_to(sum, call.normalizer) : loss, divisor, grad_input};
}

void focal_loss_scale_grad(const at::Tensor& grad_input, const at::Tensor& grad_output,
                           const at::Tensor&, const at::Tensor& input, const at::Tensor& target,
                           const std::optional<at::Tensor>& weight, double, int64_t ignore_index,
                           int64_t reduction, double label_smoothing) {
  constexpr const char* op = "focal_loss_scale_grad";
  const FocalShape shape =
      check_focal_loss(input, target, weight, ignore_index, reduction, label_smoothing, op);
  check_grad_output(grad_output, shape.loss, reduction, op);
  if (reduction != at::Reduction::None) {
    const double factor = grad_output.item<double>();
    if (factor == 1) return;
    if (std::isfinite(factor)) {
      grad_input.mul_(grad_output);
      return;
    }
  }
  // A factor that is not finite would leave NaN in ignored rows.
  at::Tensor factors = grad_output;
  if (!shape.has_probabilities)
    factors = grad_output.expand(shape.loss).masked_fill(target.eq(ignore_index), 0);
  const bool for_rows = factors.dim() > 0 && input.dim() > 1;
  grad_input.mul_(for_rows ? factors.unsqueeze(1) : factors);
}

std::tuple<at::Tensor, at::Tensor> focal_loss_vjp(const at::Tensor& grad_output,
                                                  const at::Tensor& normalizer,
                                                  const at::Tensor& input, const at::Tensor& target,
                                                  const std::optional<at::Tensor>& weight,
                                                  double gamma, int64_t ignore_index,
                                                  int64_t reduction, double label_smoothing,
                                                  std::array<bool, 2> output_mask) {
  constexpr const char* op = "focal_loss_vjp";
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing, op);
  check_grad_output(grad_output, call.shape.loss, reduction, op);
  check_like(grad_output, "grad_output", input, "input", op);
  const at::Tensor grad = grad_output.contiguous();
  at::Tensor grad_input = call.empty_grad(output_mask[0]);
  at::Tensor grad_target = call.empty_grad(output_mask[1] && call.shape.has_probabilities);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    if (input.numel() == 0) return;
    const auto args = call.args<scalar_t>();
    const auto upstream = call.upstream<scalar_t>(grad, normalizer);
    scalar_t* to = mutable_data_or_null<scalar_t>(grad_input);
    scalar_t* to_target = mutable_data_or_null<scalar_t>(grad_target);
    if (call.wide()) {
      const auto kernel = DLOPS_SIMD(focal_loss_vjp_wide_rows, scalar_t);
      for_each_wide_chunk(call, [&](int64_t begin, int64_t end) {
        kernel(args, begin, end, upstream, to, to_target);
        return 0;
      });
    } else {
      const auto kernel = DLOPS_SIMD(focal_loss_vjp_rows, scalar_t);
      for_each_chunk<scalar_t>(call, [&](int64_t begin, int64_t end, void* scratch) {
        kernel(args, begin, end, upstream, to, to_target, scratch);
        return 0;
      });
    }
  });
  return {grad_input, grad_target};
}

at::Tensor focal_loss_jvp(const at::Tensor& normalizer,
                          const std::optional<at::Tensor>& tangent_input,
                          const std::optional<at::Tensor>& tangent_target, const at::Tensor& input,
                          const at::Tensor& target, const std::optional<at::Tensor>& weight,
                          double gamma, int64_t ignore_index, int64_t reduction,
                          double label_smoothing) {
  constexpr const char* op = "focal_loss_jvp";
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing, op);
  const at::Tensor along_input = call.dense(tangent_input, "tangent_input", op);
  const at::Tensor along_target = call.dense(tangent_target, "tangent_target", op);
  const at::Tensor tangent = call.reduced() ? at::Tensor() : call.empty_loss();
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    if (call.shape.classes == 0) return;
    const auto kernel = DLOPS_SIMD(focal_loss_jvp_rows, scalar_t);
    const auto args = call.args<scalar_t>();
    sum = for_each_chunk<scalar_t>(call, [&](int64_t begin, int64_t end, void* scratch) {
      return kernel(args, begin, end, data_or_null<scalar_t>(along_input),
                    data_or_null<scalar_t>(along_target), mutable_data_or_null<scalar_t>(tangent),
                    scratch);
    });
  });
  return call.reduced() ? call.reduced_to(sum, normalizer.item<double>()) : tangent;
}

std::tuple<at::Tensor, at::Tensor> focal_loss_hvp(
    const at::Tensor& grad_output, const at::Tensor& normalizer,
    const std::optional<at::Tensor>& tangent_input, const std::optional<at::Tensor>& tangent_target,
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    double gamma, int64_t ignore_index, int64_t reduction, double label_smoothing,
    std::array<bool, 2> output_mask) {
  constexpr const char* op = "focal_loss_hvp";
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing, op);
  check_grad_output(grad_output, call.shape.loss, reduction, op);
  check_like(grad_output, "grad_output", input, "input", op);
  const at::Tensor grad = grad_output.contiguous();
  const at::Tensor along_input = call.dense(tangent_input, "tangent_input", op);
  const at::Tensor along_target = call.dense(tangent_target, "tangent_target", op);
  at::Tensor grad_input = call.empty_grad(output_mask[0]);
  at::Tensor grad_target = call.empty_grad(output_mask[1] && call.shape.has_probabilities);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    if (input.numel() == 0) return;
    const auto kernel = DLOPS_SIMD(focal_loss_hvp_rows, scalar_t);
    const auto args = call.args<scalar_t>();
    const auto upstream = call.upstream<scalar_t>(grad, normalizer);
    for_each_chunk<scalar_t>(call, [&](int64_t begin, int64_t end, void* scratch) {
      kernel(args, begin, end, upstream, data_or_null<scalar_t>(along_input),
             data_or_null<scalar_t>(along_target), mutable_data_or_null<scalar_t>(grad_input),
             mutable_data_or_null<scalar_t>(grad_target), scratch);
      return 0;
    });
  });
  return {grad_input, grad_target};
}

}  // namespace
}  // namespace dlops::cpu

TORCH_LIBRARY_IMPL(dlops, CPU, m) {
  m.impl("focal_loss", &dlops::cpu::focal_loss);
  m.impl("focal_loss_and_grad", &dlops::cpu::focal_loss_and_grad);
  m.impl("focal_loss_scale_grad", &dlops::cpu::focal_loss_scale_grad);
  m.impl("focal_loss_vjp", &dlops::cpu::focal_loss_vjp);
  m.impl("focal_loss_jvp", &dlops::cpu::focal_loss_jvp);
  m.impl("focal_loss_hvp", &dlops::cpu::focal_loss_hvp);
}
