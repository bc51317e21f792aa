// Sigmoid focal loss on the CPU: splits the elements among threads; the loops are in
// simd/sigmoid_focal_loss.cpp.
#include "cpu/simd/sigmoid_focal_loss.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <tuple>

#include "common/focal_checks.h"
#include "cpu/capability.h"
#include "cpu/sums.h"

namespace dlops::cpu {
namespace {

constexpr int64_t kChunk = 8192;

// The op's arguments, checked and laid out alike: dense, in the memory format of `inputs`.
struct Call {
  at::MemoryFormat format;
  at::Tensor inputs, targets, class_alpha;
  double alpha, gamma;
  int64_t reduction;

  Call(const at::Tensor& inputs_, const at::Tensor& targets_,
       const std::optional<at::Tensor>& class_alpha_, double alpha, double gamma, int64_t reduction,
       const char* op)
      : alpha(alpha), gamma(gamma), reduction(reduction) {
    check_sigmoid_focal_loss(inputs_, targets_, class_alpha_, reduction, op);
    // A class is a position in the last dimension, which must then be the innermost in memory too.
    format =
        class_alpha_.has_value() ? at::MemoryFormat::Contiguous : inputs_.suggest_memory_format();
    inputs = dense(inputs_);
    targets = dense(targets_);
    if (class_alpha_.has_value()) class_alpha = class_alpha_->to(at::kDouble).contiguous();
  }
  at::Tensor dense(const at::Tensor& tensor) const { return tensor.contiguous(format); }
  at::Tensor dense(const std::optional<at::Tensor>& tensor, const char* name,
                   const char* op) const {
    if (!tensor.has_value()) return {};
    check_like(*tensor, name, inputs, "inputs", op);
    check_sizes(*tensor, name, inputs.sizes(), op);
    return dense(*tensor);
  }
  bool reduced() const { return reduction != at::Reduction::None; }
  int64_t count() const { return inputs.numel(); }
  at::Tensor empty() const { return at::empty_like(inputs); }
  // In place of a gradient that was not asked for.
  at::Tensor none() const { return at::empty({0}, inputs.options()); }
  at::Tensor reduced_to(double sum) const {
    const double value =
        reduction == at::Reduction::Mean ? sum / static_cast<double>(count()) : sum;
    return at::scalar_tensor(value, inputs.options());
  }
  template <class scalar_t>
  SigmoidFocalArgs<scalar_t> args() const {
    return {inputs.const_data_ptr<scalar_t>(),
            targets.const_data_ptr<scalar_t>(),
            class_alpha.defined() ? class_alpha.const_data_ptr<double>() : nullptr,
            inputs.dim() > 0 ? inputs.size(-1) : 1,
            alpha,
            gamma};
  }
  // The upstream gradient, with the reduction's own factor.
  template <class scalar_t>
  Upstream<scalar_t> upstream(const at::Tensor& grad_output) const {
    if (!reduced()) return {1, grad_output.const_data_ptr<scalar_t>(), 0};
    return {share(), nullptr, grad_output.item<double>()};
  }
  // An element's part in the loss.
  double share() const {
    return reduction == at::Reduction::Mean ? 1 / static_cast<double>(count()) : 1;
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

at::Tensor sigmoid_focal_loss(const at::Tensor& inputs, const at::Tensor& targets,
                              const std::optional<at::Tensor>& class_alpha, double alpha,
                              double gamma, int64_t reduction) {
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, "sigmoid_focal_loss");
  const at::Tensor loss = call.reduced() ? at::Tensor() : call.empty();
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, inputs.scalar_type(), "sigmoid_focal_loss", [&] {
        const auto kernel = DLOPS_SIMD(sigmoid_focal_loss_range, scalar_t);
        const auto args = call.args<scalar_t>();
        scalar_t* to = mutable_data_or_null<scalar_t>(loss);
        sum = chunked_sum(call.count(), kChunk,
                          [&](int64_t begin, int64_t end) { return kernel(args, begin, end, to); });
      });
  return call.reduced() ? call.reduced_to(sum) : loss;
}

std::tuple<at::Tensor, at::Tensor> sigmoid_focal_loss_and_grad(
    const at::Tensor& inputs, const at::Tensor& targets,
    const std::optional<at::Tensor>& class_alpha, double alpha, double gamma, int64_t reduction) {
  constexpr const char* op = "sigmoid_focal_loss_and_grad";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  const at::Tensor loss = call.reduced() ? at::Tensor() : call.empty();
  at::Tensor grad_inputs = call.empty();
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    const auto kernel = DLOPS_SIMD(sigmoid_focal_loss_and_grad_range, scalar_t);
    const auto args = call.args<scalar_t>();
    scalar_t* to = mutable_data_or_null<scalar_t>(loss);
    scalar_t* to_inputs = mutable_data_or_null<scalar_t>(grad_inputs);
    sum = chunked_sum(call.count(), kChunk, [&](int64_t begin, int64_t end) {
      return kernel(args, begin, end, call.share(), to, to_inputs);
    });
  });
  return {call.reduced() ? call.reduced_to(sum) : loss, grad_inputs};
}

void sigmoid_focal_loss_scale_grad(const at::Tensor& grad_inputs, const at::Tensor& grad_output,
                                   const at::Tensor& inputs, const at::Tensor& targets,
                                   const std::optional<at::Tensor>& class_alpha, double, double,
                                   int64_t reduction) {
  constexpr const char* op = "sigmoid_focal_loss_scale_grad";
  check_sigmoid_focal_loss(inputs, targets, class_alpha, reduction, op);
  check_grad_output(grad_output, inputs.sizes(), reduction, op);
  if (reduction != at::Reduction::None && grad_output.item<double>() == 1) return;
  grad_inputs.mul_(grad_output);
}

std::tuple<at::Tensor, at::Tensor> sigmoid_focal_loss_vjp(
    const at::Tensor& grad_output, const at::Tensor& inputs, const at::Tensor& targets,
    const std::optional<at::Tensor>& class_alpha, double alpha, double gamma, int64_t reduction,
    std::array<bool, 2> output_mask) {
  constexpr const char* op = "sigmoid_focal_loss_vjp";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  check_grad_output(grad_output, inputs.sizes(), reduction, op);
  check_like(grad_output, "grad_output", inputs, "inputs", op);
  const at::Tensor grad = call.reduced() ? grad_output : call.dense(grad_output);
  at::Tensor grad_inputs = output_mask[0] ? call.empty() : call.none();
  at::Tensor grad_targets = output_mask[1] ? call.empty() : call.none();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    const auto kernel = DLOPS_SIMD(sigmoid_focal_loss_vjp_range, scalar_t);
    const auto args = call.args<scalar_t>();
    const auto upstream = call.upstream<scalar_t>(grad);
    scalar_t* to_inputs = mutable_data_or_null<scalar_t>(grad_inputs);
    scalar_t* to_targets = mutable_data_or_null<scalar_t>(grad_targets);
    at::parallel_for(0, call.count(), kChunk, [&](int64_t begin, int64_t end) {
      kernel(args, begin, end, upstream, to_inputs, to_targets);
    });
  });
  return {grad_inputs, grad_targets};
}

at::Tensor sigmoid_focal_loss_jvp(const std::optional<at::Tensor>& tangent_inputs,
                                  const std::optional<at::Tensor>& tangent_targets,
                                  const at::Tensor& inputs, const at::Tensor& targets,
                                  const std::optional<at::Tensor>& class_alpha, double alpha,
                                  double gamma, int64_t reduction) {
  constexpr const char* op = "sigmoid_focal_loss_jvp";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  const at::Tensor along_inputs = call.dense(tangent_inputs, "tangent_inputs", op);
  const at::Tensor along_targets = call.dense(tangent_targets, "tangent_targets", op);
  const at::Tensor tangent = call.reduced() ? at::Tensor() : call.empty();
  double sum = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    const auto kernel = DLOPS_SIMD(sigmoid_focal_loss_jvp_range, scalar_t);
    const auto args = call.args<scalar_t>();
    scalar_t* to = mutable_data_or_null<scalar_t>(tangent);
    sum = chunked_sum(call.count(), kChunk, [&](int64_t begin, int64_t end) {
      return kernel(args, begin, end, data_or_null<scalar_t>(along_inputs),
                    data_or_null<scalar_t>(along_targets), to);
    });
  });
  return call.reduced() ? call.reduced_to(sum) : tangent;
}

std::tuple<at::Tensor, at::Tensor> sigmoid_focal_loss_hvp(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& tangent_inputs,
    const std::optional<at::Tensor>& tangent_targets, const at::Tensor& inputs,
    const at::Tensor& targets, const std::optional<at::Tensor>& class_alpha, double alpha,
    double gamma, int64_t reduction, std::array<bool, 2> output_mask) {
  constexpr const char* op = "sigmoid_focal_loss_hvp";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  check_grad_output(grad_output, inputs.sizes(), reduction, op);
  check_like(grad_output, "grad_output", inputs, "inputs", op);
  const at::Tensor grad = call.reduced() ? grad_output : call.dense(grad_output);
  const at::Tensor along_inputs = call.dense(tangent_inputs, "tangent_inputs", op);
  const at::Tensor along_targets = call.dense(tangent_targets, "tangent_targets", op);
  at::Tensor grad_inputs = output_mask[0] ? call.empty() : call.none();
  at::Tensor grad_targets = output_mask[1] ? call.empty() : call.none();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    const auto kernel = DLOPS_SIMD(sigmoid_focal_loss_hvp_range, scalar_t);
    const auto args = call.args<scalar_t>();
    const auto upstream = call.upstream<scalar_t>(grad);
    scalar_t* to_inputs = mutable_data_or_null<scalar_t>(grad_inputs);
    scalar_t* to_targets = mutable_data_or_null<scalar_t>(grad_targets);
    at::parallel_for(0, call.count(), kChunk, [&](int64_t begin, int64_t end) {
      kernel(args, begin, end, upstream, data_or_null<scalar_t>(along_inputs),
             data_or_null<scalar_t>(along_targets), to_inputs, to_targets);
    });
  });
  return {grad_inputs, grad_targets};
}

}  // namespace
}  // namespace dlops::cpu

TORCH_LIBRARY_IMPL(dlops, CPU, m) {
  m.impl("sigmoid_focal_loss", &dlops::cpu::sigmoid_focal_loss);
  m.impl("sigmoid_focal_loss_and_grad", &dlops::cpu::sigmoid_focal_loss_and_grad);
  m.impl("sigmoid_focal_loss_scale_grad", &dlops::cpu::sigmoid_focal_loss_scale_grad);
  m.impl("sigmoid_focal_loss_vjp", &dlops::cpu::sigmoid_focal_loss_vjp);
  m.impl("sigmoid_focal_loss_jvp", &dlops::cpu::sigmoid_focal_loss_jvp);
  m.impl("sigmoid_focal_loss_hvp", &dlops::cpu::sigmoid_focal_loss_hvp);
}
