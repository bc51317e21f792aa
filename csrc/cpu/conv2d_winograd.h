// Convolution by 3x3 kernels of stride 1 as Winograd's F(2x2, 3x3): 16 products of matrices for
// four outputs where the definition takes 36, behind transforms of the input, the weight and the
// products (simd/conv2d_winograd.h). The gradient of the input is one, too, with the weight turned
// round, and the gradient of the weight is F(3x3, 2x2). Its errors are about as large as those of
// the long sums: coefficients are 1 and 1/2. But they are a share of what is in a tile of 4x4
// pixels, not in a window alone: beside a number that is a million times as large, a small one
// keeps no digits.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "conv2d_math.h"

namespace dlops::cpu {

// Whether this kernel takes a convolution of this type: where it gains, and DLOPS_CPU_CONV2D=direct
// does not forbid it.
bool takes_winograd(const Conv2dGeometry& g, at::ScalarType dtype);
bool takes_winograd_weight(const Conv2dGeometry& g, at::ScalarType dtype);

// Images, gradients and results are dense in the given memory format. The first two return the
// images whose results are not theirs, as a number is not finite: the transforms would spread it
// over its tile. An image's bits must not depend on its neighbours, so that the others stay.
std::vector<int64_t> winograd_forward(const Conv2dGeometry& g, const at::Tensor& input,
                                      const at::Tensor& weight, const at::Tensor& bias,
                                      const at::Tensor& output, at::MemoryFormat format);
std::vector<int64_t> winograd_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                                         const at::Tensor& weight, const at::Tensor& grad_input,
                                         at::MemoryFormat format);
// False, and grad_weight is not worked out, where a number is not finite.
bool winograd_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& input, const at::Tensor& grad_weight,
                          at::MemoryFormat format);

}  // namespace dlops::cpu
