// Sigmoid focal loss on CUDA: one pass over the elements each way, 16 bytes at a time. The
// arithmetic is focal_loss_math.h's.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <type_traits>

#include "common/cuda_utils.cuh"
#include "common/focal_checks.h"
#include "cuda/device_math.cuh"
#include "cuda/divider.h"
#include "cuda/sum.cuh"
#include "cuda/write_at_once.cuh"
#include "focal_loss_math.h"

namespace dlops::cuda {
namespace {

#if defined(__CUDACC__)
#define DLOPS_CALL __host__ __device__ __noinline__
#else
#define DLOPS_CALL inline
#endif

// The formula for soft targets, in double: its intermediate powers overflow float. It is called:
// copies of it in line would fill the kernels, for targets that are rare.
DLOPS_CALL SoftSigmoidFocal<double> soft_sigmoid_focal(double x, double t, double alpha,
                                                       double gamma) {
  return {x, t, alpha, gamma};
}

template <class T>
DLOPS_HOST_DEVICE bool is_hard_target(T t) {
  return t == 0 || t == 1;
}

// What is known of elements when they are worked out: then they come without branches.
enum class Known {
  nothing,
  hard,    // their targets are 0 or 1
  squared  // and gamma is 2, the paper's
};

// One element: its logit, its target, and the alpha of its class (negative: no weighting).
template <class T, Known known>
struct Element {
  T x, t, alpha;
  double gamma;

  DLOPS_HOST_DEVICE bool is_hard() const { return known != Known::nothing || is_hard_target(t); }
  // For a hard target the loss is weight * FL(z), z = sign * x.
  DLOPS_HOST_DEVICE T sign() const { return t == 1 ? T(-1) : T(1); }
  DLOPS_HOST_DEVICE T weight() const { return alpha < 0 ? T(1) : t == 1 ? alpha : 1 - alpha; }
  DLOPS_HOST_DEVICE SigmoidFocal<DeviceMath<T>> hard() const {
    return {sign() * x, known == Known::squared ? T(2) : static_cast<T>(gamma)};
  }
  // For any target.
  DLOPS_HOST_DEVICE SoftSigmoidFocal<double> general() const {
    return soft_sigmoid_focal(static_cast<double>(x), static_cast<double>(t),
                              static_cast<double>(alpha), gamma);
  }

  // Both at once: for a soft target, from one call.
  struct LossAndFirst {
    T loss, first;
  };
  DLOPS_HOST_DEVICE LossAndFirst loss_and_first() const {
    if (is_hard()) {
      const auto focal = hard();
      return {weight() * focal.loss(), weight() * sign() * focal.first()};
    }
    const auto focal = general();
    return {static_cast<T>(focal.loss), static_cast<T>(focal.x)};
  }
  // The derivatives with respect to the logit.
  DLOPS_HOST_DEVICE T first() const { return loss_and_first().first; }
  DLOPS_HOST_DEVICE T second() const {
    return is_hard() ? weight() * hard().second() : static_cast<T>(general().xx);
  }
};

// `width` neighbouring numbers, read and written at once. A null pointer stands for zeros, and for
// nowhere.
template <class scalar_t, int width>
struct alignas(width * sizeof(scalar_t)) Vector {
  scalar_t of[width];

  DLOPS_HOST_DEVICE static Vector load(const scalar_t* from, int64_t first) {
    return from == nullptr ? Vector{} : *reinterpret_cast<const Vector*>(from + first);
  }
  DLOPS_HOST_DEVICE void store(scalar_t* to, int64_t first) const {
    if (to != nullptr) write_at_once(to + first, *this);
  }
};

// The elements that a kernel works on.
template <class scalar_t>
struct Elements {
  using T = at::opmath_type<scalar_t>;
  const scalar_t* inputs;
  const scalar_t* targets;
  const T* class_alpha;  // one for each class, or null: then alpha serves all
  Divider classes;       // the size of the last dimension
  T all_alpha;           // negative: no weighting
  double gamma;

  // Calls f(j, element) for the elements first + j.
  template <int width, class F>
  DLOPS_HOST_DEVICE void for_each(int64_t first, const F& f) const {
    const auto x = Vector<scalar_t, width>::load(inputs, first);
    const auto t = Vector<scalar_t, width>::load(targets, first);
    const Vector<T, width> alpha = alphas<width>(first);
    bool hard = true;
    DLOPS_UNROLL
    for (int j = 0; j < width; ++j) hard = hard && is_hard_target(static_cast<T>(t.of[j]));
    const auto for_each_of = [&]<Known known>(std::integral_constant<Known, known>) {
      DLOPS_UNROLL
      for (int j = 0; j < width; ++j)
        f(j,
          Element<T, known>{static_cast<T>(x.of[j]), static_cast<T>(t.of[j]), alpha.of[j], gamma});
    };
    if (hard && gamma == 2) {
      for_each_of(std::integral_constant<Known, Known::squared>());
    } else if (hard) {
      for_each_of(std::integral_constant<Known, Known::hard>());
    } else {
      for_each_of(std::integral_constant<Known, Known::nothing>());
    }
  }
  template <int width>
  DLOPS_HOST_DEVICE Vector<T, width> alphas(int64_t first) const {
    Vector<T, width> alpha;
    DLOPS_UNROLL
    for (T& one : alpha.of) one = all_alpha;
    if (class_alpha == nullptr) return alpha;
    DLOPS_UNROLL
    for (int j = 0; j < width; ++j) {
      int64_t position = first + j;
      classes.split(position);  // leaves the class
      alpha.of[j] = class_alpha[position];
    }
    return alpha;
  }
};

// What multiplies the derivatives: one factor per element, or one for all.
template <class scalar_t>
struct Upstream {
  using T = at::opmath_type<scalar_t>;
  const scalar_t* grad_output;  // null stands for ones
  bool each;
  double scale;  // the reduction's own factor

  template <int width>
  DLOPS_HOST_DEVICE Vector<T, width> load(int64_t first) const {
    Vector<T, width> factors;
    if (each && grad_output != nullptr) {
      const auto grad = Vector<scalar_t, width>::load(grad_output, first);
      DLOPS_UNROLL
      for (int j = 0; j < width; ++j) factors.of[j] = static_cast<T>(grad.of[j]);
    } else {
      const double all = grad_output == nullptr ? 1.0 : static_cast<double>(grad_output[0]);
      DLOPS_UNROLL
      for (T& factor : factors.of) factor = static_cast<T>(all * scale);
    }
    return factors;
  }
  DLOPS_HOST_DEVICE bool is_one() const { return static_cast<double>(*grad_output) == 1.0; }
};

// The loss and its gradients, each where it is asked for: one code for all, so that each has the
// same bits without the others. Returns the sum of the losses.
template <class scalar_t>
struct LossAndGradient {
  using T = at::opmath_type<scalar_t>;
  Elements<scalar_t> elements;
  scalar_t* each = nullptr;  // the losses; null here and below: not asked for
  Upstream<scalar_t> upstream = {};
  scalar_t* grad_inputs = nullptr;
  scalar_t* grad_targets = nullptr;
  bool is_done_for_one = false;  // grad_inputs holds what it is for a grad_output of 1

  template <int width>
  DLOPS_HOST_DEVICE double run(int64_t first) const {
    if (is_done_for_one && upstream.is_one()) return 0;
    const auto factors = upstream.template load<width>(first);
    Vector<scalar_t, width> losses{}, by_input{}, by_target{};
    double sum = 0;
    elements.template for_each<width>(first, [&](int j, const auto& element) {
      const auto result = element.loss_and_first();
      sum += static_cast<double>(result.loss);
      losses.of[j] = static_cast<scalar_t>(result.loss);
      by_input.of[j] = static_cast<scalar_t>(factors.of[j] * result.first);
    });
    losses.store(each, first);
    by_input.store(grad_inputs, first);
    if (grad_targets != nullptr) {
      elements.template for_each<width>(first, [&](int j, const auto& element) {
        by_target.of[j] =
            static_cast<scalar_t>(static_cast<double>(factors.of[j]) * element.general().t);
      });
      by_target.store(grad_targets, first);
    }
    return sum;
  }
};

// The loss's tangent. Either tangent may be null, which stands for zero.
template <class scalar_t>
struct Tangent {
  using T = at::opmath_type<scalar_t>;
  Elements<scalar_t> elements;
  const scalar_t* tangent_inputs;
  const scalar_t* tangent_targets;
  scalar_t* each = nullptr;  // where not their sum is asked for, which is returned

  template <int width>
  DLOPS_HOST_DEVICE double run(int64_t first) const {
    const auto along_inputs = Vector<scalar_t, width>::load(tangent_inputs, first);
    const auto along_targets = Vector<scalar_t, width>::load(tangent_targets, first);
    Vector<scalar_t, width> tangents{};
    double sum = 0;
    elements.template for_each<width>(first, [&](int j, const auto& element) {
      T tangent(0);
      if (tangent_inputs != nullptr)
        tangent += element.first() * static_cast<T>(along_inputs.of[j]);
      if (tangent_targets != nullptr)
        tangent += static_cast<T>(element.general().t * static_cast<double>(along_targets.of[j]));
      sum += static_cast<double>(tangent);
      tangents.of[j] = static_cast<scalar_t>(tangent);
    });
    tangents.store(each, first);
    return sum;
  }
};

// The derivative of the gradients along the tangents. Either result may be null.
template <class scalar_t>
struct GradientTangent {
  using T = at::opmath_type<scalar_t>;
  Elements<scalar_t> elements;
  Upstream<scalar_t> upstream;
  const scalar_t* tangent_inputs;
  const scalar_t* tangent_targets;
  scalar_t* grad_inputs;
  scalar_t* grad_targets;

  template <int width>
  DLOPS_HOST_DEVICE void run(int64_t first) const {
    const auto factors = upstream.template load<width>(first);
    const auto along_inputs = Vector<scalar_t, width>::load(tangent_inputs, first);
    const auto along_targets = Vector<scalar_t, width>::load(tangent_targets, first);
    Vector<scalar_t, width> by_input{}, by_target{};
    elements.template for_each<width>(first, [&](int j, const auto& element) {
      const auto factor = static_cast<double>(factors.of[j]);
      const auto along_input = static_cast<double>(along_inputs.of[j]);
      const auto along_target = static_cast<double>(along_targets.of[j]);
      if (grad_inputs != nullptr) {
        double change = 0;
        if (tangent_inputs != nullptr)
          change += static_cast<double>(element.second()) * along_input;
        if (tangent_targets != nullptr) change += element.general().xt * along_target;
        by_input.of[j] = static_cast<scalar_t>(factor * change);
      }
      if (grad_targets != nullptr) {
        const SoftSigmoidFocal<double> focal = element.general();
        by_target.of[j] =
            static_cast<scalar_t>(factor * (focal.xt * along_input + focal.tt * along_target));
      }
    });
    by_input.store(grad_inputs, first);
    by_target.store(grad_targets, first);
  }
};

// f for vectors of elements, one per index, and for each of those that are left after them.
template <class F, int width>
struct InVectors {
  F f;
  int64_t vectors, left;

  InVectors(const F& f, int64_t count)
      : f(f), vectors(count / width), left(count - vectors * width) {}
  int64_t count() const { return vectors + left; }
  DLOPS_HOST_DEVICE auto operator()(int64_t i) const {
    return i < vectors ? f.template run<width>(i * width)
                       : f.template run<1>(vectors * width + (i - vectors));
  }
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
            Divider(inputs.dim() > 0 ? inputs.size(-1) : 1),
            static_cast<T>(alpha),
            gamma};
  }
  template <class scalar_t>
  Upstream<scalar_t> upstream(const at::Tensor& grad_output) const {
    return {grad_output.const_data_ptr<scalar_t>(), !reduced(), 1 / divisor()};
  }
  // Calls g(f, one or several elements per index): as many as 16 bytes hold, where all of `data`
  // start at a multiple of that.
  template <class scalar_t, class F, class G>
  void in_vectors(const F& f, std::initializer_list<at::Tensor> data, const G& g) const {
    constexpr int width = 16 / sizeof(scalar_t);
    const bool aligned = std::ranges::all_of(data, [](const at::Tensor& tensor) {
      return reinterpret_cast<intptr_t>(data_or_null<scalar_t>(tensor)) % 16 == 0;
    });
    aligned ? g(InVectors<F, width>(f, count())) : g(InVectors<F, 1>(f, count()));
  }
  // A value for every element, or their reduction.
  template <class scalar_t, class F>
  at::Tensor reduce(F f, std::initializer_list<at::Tensor> data) const {
    at::Tensor result = reduced() ? at::empty({}, inputs.options()) : at::empty_like(inputs);
    scalar_t* to = result.mutable_data_ptr<scalar_t>();
    if (reduced()) {
      in_vectors<scalar_t>(f, data, [&](const auto& sums) {
        sum(sums.count(), sums, StoreSum<scalar_t>{to, divisor()}, inputs.options());
      });
    } else {
      f.each = to;
      each<scalar_t>(f, data);
    }
    return result;
  }
  // f for every element.
  template <class scalar_t, class F>
  void each(const F& f, std::initializer_list<at::Tensor> data,
            int64_t max_blocks = kMaxBlocks) const {
    in_vectors<scalar_t>(
        f, data, [&](const auto& vectors) { for_each(vectors.count(), vectors, max_blocks); });
  }
};

at::Tensor sigmoid_focal_loss(const at::Tensor& inputs, const at::Tensor& targets,
                              const std::optional<at::Tensor>& class_alpha, double alpha,
                              double gamma, int64_t reduction) {
  constexpr const char* op = "sigmoid_focal_loss";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  const c10::DeviceGuard guard(inputs.device());
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    return call.reduce<scalar_t>(LossAndGradient<scalar_t>{call.elements<scalar_t>()},
                                 {call.inputs, call.targets});
  });
}

std::tuple<at::Tensor, at::Tensor> sigmoid_focal_loss_and_grad(
    const at::Tensor& inputs, const at::Tensor& targets,
    const std::optional<at::Tensor>& class_alpha, double alpha, double gamma, int64_t reduction) {
  constexpr const char* op = "sigmoid_focal_loss_and_grad";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  const c10::DeviceGuard guard(inputs.device());
  at::Tensor loss, grad_inputs = call.empty_grad(true);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    LossAndGradient<scalar_t> elements{call.elements<scalar_t>()};
    elements.upstream.scale = 1 / call.divisor();
    elements.grad_inputs = mutable_data_or_null<scalar_t>(grad_inputs);
    loss = call.reduce<scalar_t>(elements, {call.inputs, call.targets});
  });
  return {loss, grad_inputs};
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
    LossAndGradient<scalar_t> elements{call.elements<scalar_t>()};
    elements.upstream = call.upstream<scalar_t>(grad);
    elements.grad_inputs = mutable_data_or_null<scalar_t>(grad_inputs);
    elements.grad_targets = mutable_data_or_null<scalar_t>(grad_targets);
    call.each<scalar_t>(elements,
                        {call.inputs, call.targets, call.reduced() ? at::Tensor() : grad});
  });
  return {grad_inputs, grad_targets};
}

void sigmoid_focal_loss_scale_grad(const at::Tensor& grad_inputs, const at::Tensor& grad_output,
                                   const at::Tensor& inputs, const at::Tensor& targets,
                                   const std::optional<at::Tensor>& class_alpha, double alpha,
                                   double gamma, int64_t reduction) {
  constexpr const char* op = "sigmoid_focal_loss_scale_grad";
  const Call call(inputs, targets, class_alpha, alpha, gamma, reduction, op);
  const c10::DeviceGuard guard(inputs.device());
  const at::Tensor grad = call.dense_grad(grad_output);
  const at::Tensor result = call.dense(grad_inputs, "grad_inputs");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.scalar_type(), op, [&] {
    LossAndGradient<scalar_t> elements{call.elements<scalar_t>()};
    elements.upstream = call.upstream<scalar_t>(grad);
    elements.grad_inputs = mutable_data_or_null<scalar_t>(result);
    elements.is_done_for_one = call.reduced();
    call.each<scalar_t>(elements,
                        {call.inputs, call.targets, result, call.reduced() ? at::Tensor() : grad},
                        kFewBlocks);
  });
  if (!result.is_same(grad_inputs)) grad_inputs.copy_(result);
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
    return call.reduce<scalar_t>(
        Tangent<scalar_t>{call.elements<scalar_t>(), data_or_null<scalar_t>(along_inputs),
                          data_or_null<scalar_t>(along_targets)},
        {call.inputs, call.targets, along_inputs, along_targets});
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
    call.each<scalar_t>(
        GradientTangent<scalar_t>{call.elements<scalar_t>(), call.upstream<scalar_t>(grad),
                                  data_or_null<scalar_t>(along_inputs),
                                  data_or_null<scalar_t>(along_targets),
                                  mutable_data_or_null<scalar_t>(grad_inputs),
                                  mutable_data_or_null<scalar_t>(grad_targets)},
        {call.inputs, call.targets, along_inputs, along_targets,
         call.reduced() ? at::Tensor() : grad});
  });
  return {grad_inputs, grad_targets};
}

}  // namespace
}  // namespace dlops::cuda

TORCH_LIBRARY_IMPL(dlops, DLOPS_CUDA_KEY, m) {
  m.impl("sigmoid_focal_loss", &dlops::cuda::sigmoid_focal_loss);
  m.impl("sigmoid_focal_loss_and_grad", &dlops::cuda::sigmoid_focal_loss_and_grad);
  m.impl("sigmoid_focal_loss_scale_grad", &dlops::cuda::sigmoid_focal_loss_scale_grad);
  m.impl("sigmoid_focal_loss_vjp", &dlops::cuda::sigmoid_focal_loss_vjp);
  m.impl("sigmoid_focal_loss_jvp", &dlops::cuda::sigmoid_focal_loss_jvp);
  m.impl("sigmoid_focal_loss_hvp", &dlops::cuda::sigmoid_focal_loss_hvp);
}
