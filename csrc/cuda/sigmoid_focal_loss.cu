// Sigmoid focal loss on CUDA: one pass over the elements each way. The arithmetic is
// focal_loss_math.h's.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>
#include <torch/library.h>

#include <tuple>

#include "common/cuda_utils.cuh"
#include "common/focal_checks.h"
#include "cuda/sum.cuh"
#include "focal_loss_math.h"

namespace dlops::cuda {
namespace {

// The elements that a kernel works on, as the index of each gives them.
template <class scalar_t>
struct Elements {
  using T = at::opmath_type<scalar_t>;
  const scalar_t* inputs;
  const scalar_t* targets;
  const T* class_alpha;  // one for each of `classes`, or null: then alpha serves all
  int64_t classes;       // the size of the last dimension
  T all_alpha;           // negative: no weighting
  double gamma;

  DLOPS_HOST_DEVICE T target(int64_t i) const { return static_cast<T>(targets[i]); }
  DLOPS_HOST_DEVICE bool is_hard(int64_t i) const { return target(i) == 0 || target(i) == 1; }
  DLOPS_HOST_DEVICE T alpha(int64_t i) const {
    return class_alpha == nullptr ? all_alpha : class_alpha[i % classes];
  }
  // For a hard target the loss is weight * FL(z), z = sign * x.
  DLOPS_HOST_DEVICE T sign(int64_t i) const { return target(i) == 1 ? T(-1) : T(1); }
  DLOPS_HOST_DEVICE T weight(int64_t i) const {
    const T a = alpha(i);
    return a < 0 ? T(1) : target(i) == 1 ? a : 1 - a;
  }
  DLOPS_HOST_DEVICE SigmoidFocal<ScalarMath<T>> hard(int64_t i) const {
    return {sign(i) * static_cast<T>(inputs[i]), static_cast<T>(gamma)};
  }
  // The general formula, in double: its intermediate powers overflow float.
  DLOPS_HOST_DEVICE SoftSigmoidFocal<double> general(int64_t i) const {
    return {static_cast<double>(inputs[i]), static_cast<double>(targets[i]),
            static_cast<double>(alpha(i)), gamma};
  }

  DLOPS_HOST_DEVICE T loss(int64_t i) const {
    return is_hard(i) ? weight(i) * hard(i).loss() : static_cast<T>(general(i).loss);
  }
  // The derivatives with respect to the logit.
  DLOPS_HOST_DEVICE T first(int64_t i) const {
    return is_hard(i) ? weight(i) * sign(i) * hard(i).first() : static_cast<T>(general(i).x);
  }
  DLOPS_HOST_DEVICE T second(int64_t i) const {
    return is_hard(i) ? weight(i) * hard(i).second() : static_cast<T>(general(i).xx);
  }
};

// What multiplies the derivatives: one factor per element, or one for all.
template <class scalar_t>
struct Upstream {
  const scalar_t* grad_output;
  bool each;
  double scale;  // the reduction's own factor

  DLOPS_HOST_DEVICE double operator()(int64_t i) const {
    return each ? static_cast<double>(grad_output[i]) : static_cast<double>(grad_output[0]) * scale;
  }
};

template <class scalar_t>
struct Loss {
  Elements<scalar_t> elements;
  DLOPS_HOST_DEVICE auto operator()(int64_t i) const { return elements.loss(i); }
};

// The loss's tangent. Either tangent may be null, which stands for zero.
template <class scalar_t>
struct Tangent {
  using T = at::opmath_type<scalar_t>;
  Elements<scalar_t> elements;
  const scalar_t* tangent_inputs;
  const scalar_t* tangent_targets;

  DLOPS_HOST_DEVICE T operator()(int64_t i) const {
    T result(0);
    if (tangent_inputs != nullptr) result += elements.first(i) * static_cast<T>(tangent_inputs[i]);
    if (tangent_targets != nullptr)
      result += static_cast<T>(elements.general(i).t * static_cast<double>(tangent_targets[i]));
    return result;
  }
};

// Either result may be null, here and below.
template <class scalar_t>
struct Gradient {
  using T = at::opmath_type<scalar_t>;
  Elements<scalar_t> elements;
  Upstream<scalar_t> upstream;
  scalar_t* grad_inputs;
  scalar_t* grad_targets;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const double factor = upstream(i);
    if (grad_inputs != nullptr)
      grad_inputs[i] = static_cast<scalar_t>(static_cast<T>(factor) * elements.first(i));
    if (grad_targets != nullptr)
      grad_targets[i] = static_cast<scalar_t>(factor * elements.general(i).t);
  }
};

// The derivative of the gradients along the tangents.
template <class scalar_t>
struct GradientTangent {
  using T = at::opmath_type<scalar_t>;
  Elements<scalar_t> elements;
  Upstream<scalar_t> upstream;
  const scalar_t* tangent_inputs;
  const scalar_t* tangent_targets;
  scalar_t* grad_inputs;
  scalar_t* grad_targets;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const double factor = upstream(i);
    const double along_input =
        tangent_inputs == nullptr ? 0 : static_cast<double>(tangent_inputs[i]);
    const double along_target =
        tangent_targets == nullptr ? 0 : static_cast<double>(tangent_targets[i]);
    if (grad_inputs != nullptr) {
      double change = 0;
      if (tangent_inputs != nullptr)
        change += static_cast<double>(elements.second(i)) * along_input;
      if (tangent_targets != nullptr) change += elements.general(i).xt * along_target;
      grad_inputs[i] = static_cast<scalar_t>(factor * change);
    }
    if (grad_targets != nullptr) {
      const SoftSigmoidFocal<double> focal = elements.general(i);
      grad_targets[i] =
          static_cast<scalar_t>(factor * (focal.xt * along_input + focal.tt * along_target));
    }
  }
};

template <class F, class scalar_t>
struct StoreEach {
  F f;
  scalar_t* to;
  DLOPS_HOST_DEVICE void operator()(int64_t i) const { to[i] = static_cast<scalar_t>(f(i)); }
};

template <class scalar_t>
struct StoreSum {
  scalar_t* to;
  double divisor;
  DLOPS_HOST_DEVICE void operator()(double sum) const {
    *to = static_cast<scalar_t>(sum / divisor);
  }
};

// The op's arguments, checked and laid out alike: dense, in the memory format of `inputs`.
struct Call {
  const char* op;
  at::MemoryFormat format;
  at::Tensor inputs, targets, class_alpha;
  double alpha, gamma;
  int64_t reduction;

  Call(const at::Tensor& inputs_, const at::Tensor& targets_,
       const std::optional<at::Tensor>& class_alpha_, double alpha, double gamma, int64_t reduction,
       const char* op)
      : op(op), alpha(alpha), gamma(gamma), reduction(reduction) {
    check_sigmoid_focal_loss(inputs_, targets_, class_alpha_, reduction, op);
    // A class is a position in the last dimension, which must then be the innermost in memory too.
    format =
        class_alpha_.has_value() ? at::MemoryFormat::Contiguous : inputs_.suggest_memory_format();
    const c10::DeviceGuard guard(inputs_.device());
    inputs = inputs_.contiguous(format);
    targets = targets_.contiguous(format);
    if (class_alpha_.has_value())
      class_alpha = class_alpha_->to(at::toOpMathType(inputs.scalar_type())).contiguous();
  }
  at::Tensor dense(const at::Tensor& tensor, const char* name) const {
    check_like(tensor, name, inputs, "inputs", op);
    check_sizes(tensor, name, inputs.sizes(), op);
    return tensor.contiguous(format);
  }
  at::Tensor dense(const std::optional<at::Tensor>& tensor, const char* name) const {
    return tensor.has_value() ? dense(*tensor, name) : at::Tensor();
  }
  at::Tensor dense_grad(const at::Tensor& grad_output) const {
    check_grad_output(grad_output, inputs.sizes(), reduction, op);
    check_like(grad_output, "grad_output", inputs, "inputs", op);
    return reduced() ? grad_output : grad_output.contiguous(format);
  }
  // A gradient, or an empty tensor in place of one that was not asked for.
  at::Tensor empty_grad(bool asked) const {
    return asked ? at::empty_like(inputs) : at::empty({0}, inputs.options());
  }
  bool reduced() const { return reduction != at::Reduction::None; }
  int64_t count() const { return inputs.numel(); }
  double divisor() const {
    return reduction == at::Reduction::Mean ? static_cast<double>(count()) : 1.0;
  }

  template <class scalar_t>
  Elements<scalar_t> elements() const {
    using T = at::opmath_type<scalar_t>;
    return {inputs.const_data_ptr<scalar_t>(),
            targets.const_data_ptr<scalar_t>(),
            class_alpha.defined() ? class_alpha.const_data_ptr<T>() : nullptr,
            inputs.dim() > 0 ? inputs.size(-1) : 1,
            static_cast<T>(alpha),
            gamma};
  }
  template <class scalar_t>
  Upstream<scalar_t> upstream(const at::Tensor& grad_output) const {
    return {grad_output.const_data_ptr<scalar_t>(), !reduced(), 1 / divisor()};
  }
  // f(i) for every element, or their reduction.
  template <class scalar_t, class F>
  at::Tensor reduce(const F& f) const {
    at::Tensor result = reduced() ? at::empty({}, inputs.options()) : at::empty_like(inputs);
    scalar_t* to = result.mutable_data_ptr<scalar_t>();
    if (reduced()) {
      sum(count(), f, StoreSum<scalar_t>{to, divisor()}, inputs.options());
    } else {
      for_each(count(), StoreEach<F, scalar_t>{f, to});
    }
    return result;
  }
};

at::Tensor sigmoid_focal_loss(const at::Tensor& inputs, const at::Tensor& targets,
                              const std::optional<at::Tensor>& class_alpha, double alpha,
                              double gamma, int64_t reduction) {
  constexpr const char* op = "sigmoid_focal_loss";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  const c10::DeviceGuard guard(inputs.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    return call.reduce<scalar_t>(Loss<scalar_t>{call.elements<scalar_t>()});
  });
}

std::tuple<at::Tensor, at::Tensor> sigmoid_focal_loss_vjp(
    const at::Tensor& grad_output, const at::Tensor& inputs, const at::Tensor& targets,
    const std::optional<at::Tensor>& class_alpha, double alpha, double gamma, int64_t reduction,
    std::array<bool, 2> output_mask) {
  constexpr const char* op = "sigmoid_focal_loss_vjp";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  const c10::DeviceGuard guard(inputs.device());
  const at::Tensor grad = call.dense_grad(grad_output);
  at::Tensor grad_inputs = call.empty_grad(output_mask[0]);
  at::Tensor grad_targets = call.empty_grad(output_mask[1]);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    for_each(call.count(),
             Gradient<scalar_t>{call.elements<scalar_t>(), call.upstream<scalar_t>(grad),
                                mutable_data_or_null<scalar_t>(grad_inputs),
                                mutable_data_or_null<scalar_t>(grad_targets)});
  });
  return {grad_inputs, grad_targets};
}

std::tuple<at::Tensor, at::Tensor> sigmoid_focal_loss_and_grad(
    const at::Tensor& inputs, const at::Tensor& targets,
    const std::optional<at::Tensor>& class_alpha, double alpha, double gamma, int64_t reduction) {
  at::Tensor loss = sigmoid_focal_loss(inputs, targets, class_alpha, alpha, gamma, reduction);
  auto grads = sigmoid_focal_loss_vjp(at::ones_like(loss), inputs, targets, class_alpha, alpha,
                                      gamma, reduction, {true, false});
  return {loss, std::get<0>(grads)};
}

at::Tensor sigmoid_focal_loss_jvp(const std::optional<at::Tensor>& tangent_inputs,
                                  const std::optional<at::Tensor>& tangent_targets,
                                  const at::Tensor& inputs, const at::Tensor& targets,
                                  const std::optional<at::Tensor>& class_alpha, double alpha,
                                  double gamma, int64_t reduction) {
  constexpr const char* op = "sigmoid_focal_loss_jvp";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  const c10::DeviceGuard guard(inputs.device());
  const at::Tensor along_inputs = call.dense(tangent_inputs, "tangent_inputs");
  const at::Tensor along_targets = call.dense(tangent_targets, "tangent_targets");
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    return call.reduce<scalar_t>(Tangent<scalar_t>{call.elements<scalar_t>(),
                                                   data_or_null<scalar_t>(along_inputs),
                                                   data_or_null<scalar_t>(along_targets)});
  });
}

std::tuple<at::Tensor, at::Tensor> sigmoid_focal_loss_hvp(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& tangent_inputs,
    const std::optional<at::Tensor>& tangent_targets, const at::Tensor& inputs,
    const at::Tensor& targets, const std::optional<at::Tensor>& class_alpha, double alpha,
    double gamma, int64_t reduction, std::array<bool, 2> output_mask) {
  constexpr const char* op = "sigmoid_focal_loss_hvp";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  const c10::DeviceGuard guard(inputs.device());
  const at::Tensor grad = call.dense_grad(grad_output);
  const at::Tensor along_inputs = call.dense(tangent_inputs, "tangent_inputs");
  const at::Tensor along_targets = call.dense(tangent_targets, "tangent_targets");
  at::Tensor grad_inputs = call.empty_grad(output_mask[0]);
  at::Tensor grad_targets = call.empty_grad(output_mask[1]);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    for_each(call.count(),
             GradientTangent<scalar_t>{call.elements<scalar_t>(), call.upstream<scalar_t>(grad),
                                       data_or_null<scalar_t>(along_inputs),
                                       data_or_null<scalar_t>(along_targets),
                                       mutable_data_or_null<scalar_t>(grad_inputs),
                                       mutable_data_or_null<scalar_t>(grad_targets)});
  });
  return {grad_inputs, grad_targets};
}

}  // namespace
}  // namespace dlops::cuda

TORCH_LIBRARY_IMPL(dlops, DLOPS_CUDA_KEY, m) {
  m.impl("sigmoid_focal_loss", &dlops::cuda::sigmoid_focal_loss);
  m.impl("sigmoid_focal_loss_and_grad", &dlops::cuda::sigmoid_focal_loss_and_grad);
  m.impl("sigmoid_focal_loss_vjp", &dlops::cuda::sigmoid_focal_loss_vjp);
  m.impl("sigmoid_focal_loss_jvp", &dlops::cuda::sigmoid_focal_loss_jvp);
  m.impl("sigmoid_focal_loss_hvp", &dlops::cuda::sigmoid_focal_loss_hvp);
}
