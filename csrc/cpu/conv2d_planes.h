// Convolution of few input channels per group (depthwise, thin groups, first layers) on contiguous
// tensors, without im2col: see simd/conv2d_planes.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "conv2d_math.h"

namespace dlops::cpu {

// Groups that make thin matrices.
inline bool has_thin_groups(const Conv2dGeometry& g) {
  return g.groups > 1 && std::min(g.channels_per_group(), g.outputs_per_group()) < 8;
}

// Whether these kernels take a convolution of this type, and gain by it.
bool takes_planes(const Conv2dGeometry& g, at::ScalarType dtype);

// All tensors are contiguous; weight and bias are in the type that products are summed in.
void planes_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                    const at::Tensor& bias, const at::Tensor& output);
// False, and nothing done, where a weight is not finite: it would be multiplied with zeros that
// stand beside the gradient, which gives NaN where there is no product.
bool planes_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& weight, const at::Tensor& grad_input);
void planes_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                        const at::Tensor& input, const at::Tensor& grad_weight);

}  // namespace dlops::cpu
