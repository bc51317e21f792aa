// Softmax focal loss on CUDA: a team of threads for each row (rows.cuh, softmax_row.cuh), which is
// read once where its registers hold it, for the loss and its gradient alike.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include <tuple>

#include "common/cuda_utils.cuh"
#include "common/focal_checks.h"
#include "cuda/rows.cuh"
#include "cuda/softmax_row.cuh"
#include "cuda/sum.cuh"

namespace dlops::cuda {
namespace {

// -------------------------------------------------------------------------------------- kernels

// What multiplies a row's derivatives.
template <class scalar_t>
struct Upstream {
  using T = at::opmath_type<scalar_t>;
  const scalar_t* grad_output;  // null stands for ones
  bool each;                    // one for each row, or one for all
  const T* normalizer;          // what the mean divides by, or null

  DLOPS_HOST_DEVICE T operator()(int64_t row) const {
    const T grad = grad_output == nullptr ? T(1) : static_cast<T>(grad_output[each ? row : 0]);
    return normalizer == nullptr ? grad : grad / *normalizer;
  }
  DLOPS_HOST_DEVICE bool is_one() const { return static_cast<T>(*grad_output) == T(1); }
};

// The loss and its gradient, each where it is asked for: one kernel for both, so that either has
// the same bits without the other. Returns the loss.
//
// grad_input = g_c - p_c sum(g), where g_c is the slope of class c, as g_c (1 - p_c) - p_c (the
// others' slopes).
template <class scalar_t>
struct LossAndGradient {
  using T = at::opmath_type<scalar_t>;
  FocalArgs<scalar_t> args;
  scalar_t* each = nullptr;  // a loss for each row; null here and below: not asked for
  Upstream<scalar_t> upstream = {};
  scalar_t* grad_input = nullptr;
  scalar_t* grad_target = nullptr;
  bool is_done_for_one = false;  // grad_input holds what it is for a grad_output of 1

  template <class Team>
  DLOPS_HOST_DEVICE T operator()(int64_t i, const Team& team) const {
    if (is_done_for_one && upstream.is_one()) return T(0);
    const bool wants_gradient = grad_input != nullptr || grad_target != nullptr;
    const T factor = wants_gradient ? upstream(i) : T(0);
    Row<scalar_t, Team> row(args, i, team);
    const Sums<T> sums = row.takes_part() ? row.sums() : Sums<T>{};
    if (each != nullptr && row.is_first_member()) each[i] = static_cast<scalar_t>(sums.loss);
    if (row.ignored) {
      row.clear(grad_input);
      row.clear(grad_target);
      return T(0);
    }
    if (!wants_gradient) return sums.loss;
    if (grad_input != nullptr) write_grad_input(row, factor, factor * sums.slope);
    if (grad_target != nullptr)
      row.for_each_class([&](int64_t c) {
        row.set(grad_target, c, factor * args.kept * args.class_weight(c) * row.focal(c).loss());
      });
    return sums.loss;
  }

  template <class R>
  DLOPS_HOST_DEVICE void write_grad_input(R& row, T factor, T slopes) const {
    if (row.has_one_class()) {
      const T at_label = slopes * row.not_p_of(row.label_logit), others = -(slopes * row.inverse);
      row.logits.write(grad_input + row.first,
                       [&](T x) { return others * ScalarMath<T>::exp(x - row.max); });
      // By the member that wrote there before.
      if (row.logits.owns(row.label)) row.set(grad_input, row.label, at_label);
    } else {
      row.for_each_class([&](int64_t c) {
        const T own = factor * row.slope(c);
        row.set(grad_input, c, own * row.not_p(c) - row.p(c) * (slopes - own));
      });
    }
  }
};

// The loss's tangent. Either tangent may be null, which stands for zero.
template <class scalar_t>
struct Tangent {
  using T = at::opmath_type<scalar_t>;
  FocalArgs<scalar_t> args;
  const scalar_t* tangent_input;
  const scalar_t* tangent_target;
  scalar_t* each = nullptr;  // for each row, where not their reduction is asked for

  template <class Team>
  DLOPS_HOST_DEVICE T operator()(int64_t i, const Team& team) const {
    const Row<scalar_t, Team> row(args, i, team);
    T value(0);
    if (row.takes_part()) {
      const Centred<scalar_t, Team> centred(row, tangent_input);
      value = row.sum_of_shares([&](int64_t c) { return row.slope(c) * centred.value(c); });
      if (tangent_target != nullptr)
        value += row.sum([&](int64_t c) {
          return args.kept * args.class_weight(c) * row.focal(c).loss() * row.at(tangent_target, c);
        });
    }
    if (row.is_first_member() && each != nullptr) each[i] = static_cast<scalar_t>(value);
    return value;
  }
};

// The derivative of the gradients along the tangents: that of g_c - p_c sum(g) is
// dg_c - p_c sum(dg) - dp_c sum(g).
template <class scalar_t>
struct GradientTangent {
  FocalArgs<scalar_t> args;
  Upstream<scalar_t> upstream;
  const scalar_t* tangent_input;
  const scalar_t* tangent_target;
  scalar_t* grad_input;
  scalar_t* grad_target;

  template <class Team>
  DLOPS_HOST_DEVICE int operator()(int64_t i, const Team& team) const {
    using T = at::opmath_type<scalar_t>;
    const Row<scalar_t, Team> row(args, i, team);
    if (row.takes_part()) {
      const T factor = upstream(i);
      const Centred<scalar_t, Team> centred(row, tangent_input);
      if (grad_input != nullptr) write_grad_input(row, centred, factor);
      if (grad_target != nullptr)
        row.for_each_class([&](int64_t c) {
          row.set(
              grad_target, c,
              factor * args.kept * args.class_weight(c) * row.focal(c).first() * centred.value(c));
        });
    }
    if (row.ignored) {
      row.clear(grad_input);
      row.clear(grad_target);
    }
    return 0;
  }

  template <class R, class C, class T>
  DLOPS_HOST_DEVICE void write_grad_input(const R& row, const C& centred, T factor) const {
    // How the slope of class c changes: through its probability, and through its target.
    const auto through_p = [&](int64_t c) {
      const auto focal = row.focal(c);
      return weighted(row.share(c), focal.second_times_not_p()) *
             centred.over_complement(c, focal.not_p);
    };
    const auto through_target = [&](int64_t c) {
      return args.kept * args.class_weight(c) * row.focal(c).first() * row.at(tangent_target, c);
    };
    const T slopes = row.sum_of_shares([&](int64_t c) { return row.slope(c); });
    T changes = row.sum_of_shares(through_p);
    if (tangent_target != nullptr) changes += row.sum(through_target);
    row.for_each_class([&](int64_t c) {
      T own = row.has_share(c) ? through_p(c) : T(0);
      if (tangent_target != nullptr) own += through_target(c);
      const T p = row.p(c);
      row.set(grad_input, c,
              factor * (own * row.not_p(c) - p * (changes - own) - slopes * p * centred.value(c)));
    });
  }
};

// What a row adds to the divisor of the mean: its target's weight.
template <class scalar_t>
struct TargetWeight {
  FocalArgs<scalar_t> args;
  DLOPS_HOST_DEVICE auto operator()(int64_t row) const {
    using T = at::opmath_type<scalar_t>;
    const int64_t label = args.labels[row];
    const bool counts = label != args.ignore_index && args.is_class(label);
    return counts ? args.class_weight(label) : T(0);
  }
};

// -------------------------------------------------------------------------------------- results

template <class T>
struct StoreSum {
  T* to;
  DLOPS_HOST_DEVICE void operator()(double sum) const { *to = static_cast<T>(sum); }
};

template <class scalar_t>
struct StoreReduced {
  using T = at::opmath_type<scalar_t>;
  scalar_t* to;
  const T* normalizer;  // null: the sum itself
  DLOPS_HOST_DEVICE void operator()(double sum) const {
    *to =
        static_cast<scalar_t>(normalizer == nullptr ? sum : sum / static_cast<double>(*normalizer));
  }
};

// ------------------------------------------------------------------------------------ launchers

// The op's arguments, checked and laid out alike. A channels_last input is a batch of N * H * W
// rows whose classes are neighbours in memory.
struct Call {
  const char* op;
  FocalShape shape;
  at::MemoryFormat format;
  at::Tensor input, target, weight;
  double gamma, label_smoothing;
  int64_t ignore_index, reduction;

  Call(const at::Tensor& input_, const at::Tensor& target_,
       const std::optional<at::Tensor>& weight_, double gamma, int64_t ignore_index,
       int64_t reduction, double label_smoothing, const char* op)
      : op(op),
        shape(check_focal_loss(input_, target_, weight_, ignore_index, reduction, label_smoothing,
                               op)),
        format(input_.suggest_memory_format()),
        gamma(gamma),
        label_smoothing(label_smoothing),
        ignore_index(ignore_index),
        reduction(reduction) {
    const c10::DeviceGuard guard(input_.device());
    input = input_.contiguous(format);
    target = shape.has_probabilities ? target_.contiguous(format) : target_.contiguous();
    if (weight_.has_value()) weight = weight_->contiguous();
  }
  at::Tensor dense(const std::optional<at::Tensor>& tensor, const char* name) const {
    if (!tensor.has_value()) return {};
    check_like(*tensor, name, input, "input", op);
    check_sizes(*tensor, name, input.sizes(), op);
    return tensor->contiguous(format);
  }
  at::Tensor dense_grad(const at::Tensor& grad_output) const {
    check_grad_output(grad_output, shape.loss, reduction, op);
    check_like(grad_output, "grad_output", input, "input", op);
    return grad_output.contiguous();
  }
  void check_normalizer(const at::Tensor& normalizer) const {
    TORCH_CHECK(normalizer.device() == input.device() && normalizer.numel() == 1 &&
                    normalizer.scalar_type() == at::toOpMathType(input.scalar_type()),
                op, ": normalizer must be the one that focal_loss returned for this input");
  }
  // A gradient, or an empty tensor in place of one that was not asked for.
  at::Tensor empty_grad(bool asked) const {
    return asked ? at::empty_like(input) : at::empty({0}, input.options());
  }
  bool reduced() const { return reduction != at::Reduction::None; }
  int64_t stride() const { return format == at::MemoryFormat::Contiguous ? shape.inner : 1; }
  at::TensorOptions sum_options() const {
    return input.options().dtype(at::toOpMathType(input.scalar_type()));
  }
  template <class scalar_t>
  RowShape rows() const {
    return {shape.rows(), shape.classes, stride(), kPacks<scalar_t> * Pack<scalar_t>::width};
  }
  // `output`: another tensor like the input that is read or written 16 bytes at a time.
  template <class scalar_t>
  FocalArgs<scalar_t> args(const at::Tensor& output = {}) const {
    using T = at::opmath_type<scalar_t>;
    FocalArgs<scalar_t> args{};
    args.input = input.const_data_ptr<scalar_t>();
    if (shape.has_probabilities) {
      args.probabilities = target.const_data_ptr<scalar_t>();
    } else {
      args.labels = target.const_data_ptr<int64_t>();
    }
    args.weight = data_or_null<scalar_t>(weight);
    args.classes = shape.classes;
    args.inner = Divider(stride());
    args.in_packs = stride() == 1 && are_aligned(shape.classes, Pack<scalar_t>::width,
                                                 {&input, output.defined() ? &output : &input});
    args.ignore_index = ignore_index;
    args.gamma = static_cast<T>(gamma);
    args.kept = static_cast<T>(1 - label_smoothing);
    args.spread =
        static_cast<T>(label_smoothing / static_cast<double>(std::max<int64_t>(1, shape.classes)));
    return args;
  }
  // What the mean divides by, or null where it is not asked for.
  template <class scalar_t>
  const at::opmath_type<scalar_t>* divisor(const at::Tensor& normalizer) const {
    return reduction == at::Reduction::Mean ? normalizer.const_data_ptr<at::opmath_type<scalar_t>>()
                                            : nullptr;
  }
  template <class scalar_t>
  Upstream<scalar_t> upstream(const at::Tensor& grad_output, const at::Tensor& normalizer) const {
    return {grad_output.const_data_ptr<scalar_t>(), !reduced(), divisor<scalar_t>(normalizer)};
  }
  template <class scalar_t>
  at::Tensor normalizer() const {
    using T = at::opmath_type<scalar_t>;
    if (shape.has_probabilities) return at::full({}, shape.rows(), sum_options());
    at::Tensor result = at::empty({}, sum_options());
    sum(shape.rows(), TargetWeight<scalar_t>{args<scalar_t>()},
        StoreSum<T>{result.mutable_data_ptr<T>()}, sum_options());
    return result;
  }
  // What f returns for each row, or their reduction.
  template <class scalar_t, class F>
  at::Tensor reduce(const at::Tensor& normalizer, F f) const {
    const std::vector<int64_t> scalar;
    at::Tensor result = at::empty(reduced() ? scalar : shape.loss, input.options());
    scalar_t* to = result.mutable_data_ptr<scalar_t>();
    if (reduced()) {
      sum_rows(rows<scalar_t>(), f, StoreReduced<scalar_t>{to, divisor<scalar_t>(normalizer)},
               sum_options());
    } else {
      f.each = to;
      for_each_row(rows<scalar_t>(), f);
    }
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> focal_loss(const at::Tensor& input, const at::Tensor& target,
                                              const std::optional<at::Tensor>& weight, double gamma,
                                              int64_t ignore_index, int64_t reduction,
                                              double label_smoothing) {
  constexpr const char* op = "focal_loss";
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing, op);
  const c10::DeviceGuard guard(input.device());
  at::Tensor loss, normalizer;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    normalizer = call.normalizer<scalar_t>();
    loss = call.reduce<scalar_t>(normalizer, LossAndGradient<scalar_t>{call.args<scalar_t>()});
  });
  return {loss, normalizer};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> focal_loss_and_grad(
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    double gamma, int64_t ignore_index, int64_t reduction, double label_smoothing) {
  constexpr const char* op = "focal_loss_and_grad";
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing, op);
  const c10::DeviceGuard guard(input.device());
  at::Tensor loss, normalizer, grad_input = call.empty_grad(true);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    normalizer = call.normalizer<scalar_t>();
    LossAndGradient<scalar_t> rows{call.args<scalar_t>(grad_input)};
    rows.upstream.normalizer = call.divisor<scalar_t>(normalizer);
    rows.grad_input = mutable_data_or_null<scalar_t>(grad_input);
    loss = call.reduce<scalar_t>(normalizer, rows);
  });
  return {loss, normalizer, grad_input};
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
  call.check_normalizer(normalizer);
  const c10::DeviceGuard guard(input.device());
  const at::Tensor grad = call.dense_grad(grad_output);
  at::Tensor grad_input = call.empty_grad(output_mask[0]);
  at::Tensor grad_target = call.empty_grad(output_mask[1] && call.shape.has_probabilities);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    LossAndGradient<scalar_t> rows{call.args<scalar_t>(grad_input)};
    rows.upstream = call.upstream<scalar_t>(grad, normalizer);
    rows.grad_input = mutable_data_or_null<scalar_t>(grad_input);
    rows.grad_target = mutable_data_or_null<scalar_t>(grad_target);
    for_each_row(call.rows<scalar_t>(), rows);
  });
  return {grad_input, grad_target};
}

void focal_loss_scale_grad(const at::Tensor& grad_input, const at::Tensor& grad_output,
                           const at::Tensor& normalizer, const at::Tensor& input,
                           const at::Tensor& target, const std::optional<at::Tensor>& weight,
                           double gamma, int64_t ignore_index, int64_t reduction,
                           double label_smoothing) {
  constexpr const char* op = "focal_loss_scale_grad";
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing, op);
  call.check_normalizer(normalizer);
  const c10::DeviceGuard guard(input.device());
  const at::Tensor grad = call.dense_grad(grad_output);
  at::Tensor result = call.dense(grad_input, "grad_input");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    LossAndGradient<scalar_t> rows{call.args<scalar_t>(result)};
    rows.upstream = call.upstream<scalar_t>(grad, normalizer);
    rows.grad_input = mutable_data_or_null<scalar_t>(result);
    rows.is_done_for_one = call.reduced();
    for_each_row(call.rows<scalar_t>(), rows, kFewBlocks);
  });
  if (!result.is_same(grad_input)) grad_input.copy_(result);
}

at::Tensor focal_loss_jvp(const at::Tensor& normalizer,
                          const std::optional<at::Tensor>& tangent_input,
                          const std::optional<at::Tensor>& tangent_target, const at::Tensor& input,
                          const at::Tensor& target, const std::optional<at::Tensor>& weight,
                          double gamma, int64_t ignore_index, int64_t reduction,
                          double label_smoothing) {
  constexpr const char* op = "focal_loss_jvp";
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing, op);
  call.check_normalizer(normalizer);
  const c10::DeviceGuard guard(input.device());
  const at::Tensor along_input = call.dense(tangent_input, "tangent_input");
  const at::Tensor along_target = call.dense(tangent_target, "tangent_target");
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    return call.reduce<scalar_t>(
        normalizer, Tangent<scalar_t>{call.args<scalar_t>(), data_or_null<scalar_t>(along_input),
                                      data_or_null<scalar_t>(along_target)});
  });
}

std::tuple<at::Tensor, at::Tensor> focal_loss_hvp(
    const at::Tensor& grad_output, const at::Tensor& normalizer,
    const std::optional<at::Tensor>& tangent_input, const std::optional<at::Tensor>& tangent_target,
    const at::Tensor& input, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    double gamma, int64_t ignore_index, int64_t reduction, double label_smoothing,
    std::array<bool, 2> output_mask) {
  constexpr const char* op = "focal_loss_hvp";
  const Call call(input, target, weight, gamma, ignore_index, reduction, label_smoothing, op);
  call.check_normalizer(normalizer);
  const c10::DeviceGuard guard(input.device());
  const at::Tensor grad = call.dense_grad(grad_output);
  const at::Tensor along_input = call.dense(tangent_input, "tangent_input");
  const at::Tensor along_target = call.dense(tangent_target, "tangent_target");
  at::Tensor grad_input = call.empty_grad(output_mask[0]);
  at::Tensor grad_target = call.empty_grad(output_mask[1] && call.shape.has_probabilities);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), op, [&] {
    for_each_row(call.rows<scalar_t>(),
                 GradientTangent<scalar_t>{
                     call.args<scalar_t>(), call.upstream<scalar_t>(grad, normalizer),
                     data_or_null<scalar_t>(along_input), data_or_null<scalar_t>(along_target),
                     mutable_data_or_null<scalar_t>(grad_input),
                     mutable_data_or_null<scalar_t>(grad_target)});
  });
  return {grad_input, grad_target};
}

}  // namespace
}  // namespace dlops::cuda

TORCH_LIBRARY_IMPL(dlops, DLOPS_CUDA_KEY, m) {
  m.impl("focal_loss", &dlops::cuda::focal_loss);
  m.impl("focal_loss_and_grad", &dlops::cuda::focal_loss_and_grad);
  m.impl("focal_loss_scale_grad", &dlops::cuda::focal_loss_scale_grad);
  m.impl("focal_loss_vjp", &dlops::cuda::focal_loss_vjp);
  m.impl("focal_loss_jvp", &dlops::cuda::focal_loss_jvp);
  m.impl("focal_loss_hvp", &dlops::cuda::focal_loss_hvp);
}
