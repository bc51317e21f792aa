// Softmax focal loss on the CPU: splits the rows among threads; the loops are in
// simd/focal_loss.cpp.
#include "cpu/simd/focal_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

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
    if (!shape.has_probabilities) check_targets(op);
  }
  void check_targets(const char* op) const {
    const int64_t* t = target.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < shape.rows(); ++i)
      TORCH_CHECK_INDEX(t[i] == ignore_index || (0 <= t[i] && t[i] < shape.classes), op,
                        ": target ", t[i], " is out of bounds for ", shape.classes, " classes");
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
    return shape.inner == 1 || format == at::MemoryFormat::ChannelsLast;
  }
  // Rows that one task works on: about 16 K elements, whole vectors of rows.
  int64_t chunk() const {
    return std::clamp<int64_t>(16384 / std::max<int64_t>(1, shape.classes) / 16 * 16, 16, 4096);
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
  // What 'mean' divides by.
  double normalizer() const {
    if (shape.has_probabilities) return static_cast<double>(shape.rows());
    const int64_t* t = target.const_data_ptr<int64_t>();
    double sum = 0;
    const at::Tensor weights = weight.defined() ? weight.to(at::kDouble) : weight;
    const double* w = weights.defined() ? weights.const_data_ptr<double>() : nullptr;
    for (int64_t i = 0; i < shape.rows(); ++i)
      if (t[i] != ignore_index) sum += w == nullptr ? 1 : w[t[i]];
    return sum;
  }
  // A mean over nothing is NaN, though label smoothing has left something to sum.
  at::Tensor reduced_to(double sum, double normalizer) const {
    const double mean =
        normalizer == 0 ? std::numeric_limits<double>::quiet_NaN() : sum / normalizer;
    return at::scalar_tensor(reduction == at::Reduction::Mean ? mean : sum, input.options());
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
    if (!reduced()) return {grad_output.const_data_ptr<scalar_t>(), 0};
    const double grad = grad_output.item<double>();
    return {nullptr, reduction == at::Reduction::Mean ? grad / normalizer.item<double>() : grad};
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

// Calls f(begin, end, scratch) for chunks of rows and returns the sum of the results.
template <class scalar_t, class F>
double for_each_chunk(const Call& call, const F& f) {
  const int64_t bytes = DLOPS_SIMD(focal_loss_scratch, scalar_t)(call.shape.classes);
  return chunked_sum(call.shape.rows(), call.chunk(), [&](int64_t begin, int64_t end) -> double {
    Scratch scratch(bytes);
    return f(begin, end, scratch.take<char>(bytes));
  });
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
    const auto kernel = DLOPS_SIMD(focal_loss_rows, scalar_t);
    const auto args = call.args<scalar_t>();
    scalar_t* to = mutable_data_or_null<scalar_t>(loss);
    sum = for_each_chunk<scalar_t>(call, [&](int64_t begin, int64_t end, void* scratch) {
      return kernel(args, begin, end, to, scratch);
    });
  });
  const double normalizer = call.normalizer();
  at::Tensor divisor =
      at::scalar_tensor(normalizer, input.options().dtype(at::toOpMathType(input.scalar_type())));
  return {call.reduced() ? call.reduced_to(sum, normalizer) : loss, divisor};
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
    const auto kernel = DLOPS_SIMD(focal_loss_vjp_rows, scalar_t);
    const auto args = call.args<scalar_t>();
    const auto upstream = call.upstream<scalar_t>(grad, normalizer);
    for_each_chunk<scalar_t>(call, [&](int64_t begin, int64_t end, void* scratch) {
      kernel(args, begin, end, upstream, mutable_data_or_null<scalar_t>(grad_input),
             mutable_data_or_null<scalar_t>(grad_target), scratch);
      return 0;
    });
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
  m.impl("focal_loss_vjp", &dlops::cpu::focal_loss_vjp);
  m.impl("focal_loss_jvp", &dlops::cpu::focal_loss_jvp);
  m.impl("focal_loss_hvp", &dlops::cpu::focal_loss_hvp);
}
