// Contiguous images of few channels, such as a network's first layer's, without im2col: the pixels
// that a kernel cell meets along a row of outputs are a row of the image, shifted.
//
//   output[o, y, (0 .. OW-1)] = sum over c, r and s of weight[o, c, r, s] * row[c, y + r][s + (0 ..
//   OW-1)]
//
// is a matrix product for each row of outputs, one of whose matrices is rows of the image that
// overlap: the right one, or the left one of the product turned round, where channels fill vectors
// better than pixels do. Images are copied with their padding, a strip of rows at a time. The
// gradient of the weight has an order of its own: conv2d_rows_weight.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv2d_math.h"

namespace dlops::cpu {

// Whether the forward pass serves images of this type, and rows of outputs or channels fill
// vectors.
bool takes_rows(const Conv2dGeometry& g, at::ScalarType dtype);

// All tensors are contiguous.
void rows_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                  const at::Tensor& bias, const at::Tensor& output);

// Whether the gradient of the weight serves images of this type. Its result may have any strides.
bool takes_rows_grad_weight(const Conv2dGeometry& g, at::ScalarType dtype);
void rows_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                      const at::Tensor& input, const at::Tensor& grad_weight);

}  // namespace dlops::cpu
