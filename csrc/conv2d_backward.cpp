// The gradients that a backward pass asks for, by one call from Python; each is an op of its own,
// on every device.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace dlops {
namespace {

using Gradient = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef,
                            c10::SymIntArrayRef, c10::SymIntArrayRef, c10::SymIntArrayRef,
                            c10::SymInt);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A factor that was not kept, as no gradient needs it, is undefined.
std::tuple<at::Tensor, at::Tensor, at::Tensor> conv2d_backward(
    const at::Tensor& grad_output, const std::optional<at::Tensor>& input,
    const std::optional<at::Tensor>& weight, c10::SymIntArrayRef input_size,
    c10::SymIntArrayRef kernel_size, c10::SymIntArrayRef stride, c10::SymIntArrayRef padding,
    c10::SymIntArrayRef dilation, c10::SymInt groups, std::array<bool, 3> output_mask) {
  static const auto grad_input = find<Gradient>("dlops::conv2d_grad_input");
  static const auto grad_weight = find<Gradient>("dlops::conv2d_grad_weight");
  static const auto grad_bias = find<at::Tensor(const at::Tensor&)>("dlops::conv2d_grad_bias");
  const auto [by_input, by_weight, by_bias] = output_mask;
  TORCH_CHECK(!by_input || weight.has_value(), "conv2d_backward: grad_input needs weight");
  TORCH_CHECK(!by_weight || input.has_value(), "conv2d_backward: grad_weight needs input");
  at::Tensor of_input, of_weight, of_bias;
  if (by_input)
    of_input = grad_input.call(grad_output, *weight, input_size, stride, padding, dilation, groups);
  if (by_weight)
    of_weight =
        grad_weight.call(grad_output, *input, kernel_size, stride, padding, dilation, groups);
  if (by_bias) of_bias = grad_bias.call(grad_output);
  return {of_input, of_weight, of_bias};
}

}  // namespace
}  // namespace dlops

TORCH_LIBRARY_IMPL(dlops, CompositeImplicitAutograd, m) {
  m.impl("conv2d_backward", &dlops::conv2d_backward);
}
