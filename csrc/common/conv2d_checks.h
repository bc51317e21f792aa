// The argument checks of the convolution ops, for CPU and CUDA alike, and what follows from the
// arguments alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "common/checks.h"

namespace dlops {

// The results are channels_last where one of the two factors is.
inline at::MemoryFormat memory_format(const at::Tensor& a, const at::Tensor& b) {
  const bool last = a.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                    b.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  return last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

inline Conv2dGeometry check_conv2d(const at::Tensor& input, const at::Tensor& weight,
                                   const std::optional<at::Tensor>& bias,
                                   const Conv2dArguments& arguments, const char* op) {
  check_like(weight, "weight", input, "input", op);
  const Conv2dGeometry g = conv2d_geometry(input.sizes(), weight.sizes(), arguments, op);
  if (bias.has_value() && bias->defined()) {
    check_like(*bias, "bias", input, "input", op);
    check_sizes(*bias, "bias", {g.O}, op);
  }
  return g;
}

inline Conv2dGeometry check_conv2d_grad_input(const at::Tensor& grad_output,
                                              const at::Tensor& weight, at::IntArrayRef input_size,
                                              const Conv2dArguments& arguments, const char* op) {
  check_like(weight, "weight", grad_output, "grad_output", op);
  const Conv2dGeometry g = conv2d_geometry(input_size, weight.sizes(), arguments, op);
  check_sizes(grad_output, "grad_output", {g.N, g.O, g.OH, g.OW}, op);
  return g;
}

inline Conv2dGeometry check_conv2d_grad_weight(const at::Tensor& grad_output,
                                               const at::Tensor& input, at::IntArrayRef kernel_size,
                                               const Conv2dArguments& arguments, const char* op) {
  check_like(input, "input", grad_output, "grad_output", op);
  check_dim(input, "input", 4, op);
  check_dim(grad_output, "grad_output", 4, op);
  const auto kernel = check_list<2>(kernel_size, "kernel_size", 1, op);
  TORCH_CHECK(arguments.groups > 0, op, ": groups must be greater than zero, got ",
              arguments.groups);
  const std::array<int64_t, 4> weight{grad_output.size(1), input.size(1) / arguments.groups,
                                      kernel[0], kernel[1]};
  const Conv2dGeometry g = conv2d_geometry(input.sizes(), weight, arguments, op);
  check_sizes(grad_output, "grad_output", {g.N, g.O, g.OH, g.OW}, op);
  return g;
}

// complex32 has neither products nor vector code of its own: it is computed as complex64.
inline bool is_complex_half(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kComplexHalf;
}

inline at::Tensor complex_float(const at::Tensor& tensor) { return tensor.to(at::kComplexFloat); }

inline std::optional<at::Tensor> complex_float(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? std::optional(complex_float(*tensor)) : std::nullopt;
}

}  // namespace dlops
