// Depthwise convolution of channels_last tensors, one output per channel; see
// simd/conv2d_depthwise.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv2d_math.h"

namespace dlops::cpu {

bool takes_depthwise(const Conv2dGeometry& g, at::ScalarType dtype);

// Images are channels_last; low-precision ones are computed in float32. The results are
// channels_last, that of grad_weight in the shape of the weight (C, 1, R, S).
void depthwise_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                       const at::Tensor& bias, const at::Tensor& output);
void depthwise_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& weight, const at::Tensor& grad_input);
void depthwise_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                           const at::Tensor& input, const at::Tensor& grad_weight);

}  // namespace dlops::cpu
