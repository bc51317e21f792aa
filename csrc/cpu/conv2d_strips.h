// Convolution without im2col: in channels_last memory the pixels under a row of the kernel already
// stand side by side, so a product may read them where they are.
//
//   output[x, o] += input[x * stride_w + (0 .. S-1), c] * weight[r, (0 .. S-1), c, o]
//
// for each kernel row r is one matrix product of depth S * C, whose left matrix is the image itself
// with rows that overlap. Pixels at the border, which see fewer cells, are products of their own:
// nothing is multiplied with padding. The gradient of the input is the same with the roles of input
// and output exchanged, one part for each phase of the stride. Contiguous (NCHW) images, and those
// of a type that is not multiplied as it is, are brought into that form a strip of rows at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv2d_math.h"

namespace dlops::cpu {

// Whether these kernels take a convolution of this type and layout.
bool takes_strips(const Conv2dGeometry& g, at::ScalarType dtype, at::MemoryFormat format);

// Images and results are dense in the given memory format; bias, where there is one, has the type
// that products are summed in.
void strips_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                    const at::Tensor& bias, const at::Tensor& output, at::MemoryFormat format);
void strips_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& weight, const at::Tensor& grad_input,
                       at::MemoryFormat format);
// The same of float32 by sums of bfloat16 products (conv2d_parts.h). False, and the result
// is not worked out, where a number cannot be split.
bool strips_forward_by_parts(const Conv2dGeometry& g, const at::Tensor& input,
                             const at::Tensor& weight, const at::Tensor& bias,
                             const at::Tensor& output, at::MemoryFormat format);
bool strips_grad_input_by_parts(const Conv2dGeometry& g, const at::Tensor& grad_output,
                                const at::Tensor& weight, const at::Tensor& grad_input,
                                at::MemoryFormat format);
void strips_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                        const at::Tensor& input, const at::Tensor& grad_weight,
                        at::MemoryFormat format);

}  // namespace dlops::cpu
