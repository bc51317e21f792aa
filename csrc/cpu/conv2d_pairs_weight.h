// The gradient of a convolution's weight from bfloat16 images, on machines that multiply bfloat16:
//
//   grad_weight[o, r, s, c] += input[c, pixel under (r, s)] * grad_output[pixel, o]
//
// for each kernel cell one matrix product whose depth is the pixels of a strip. The input stands in
// phase planes (simd/conv2d_planes.h), where each cell is a shift, and the gradient in pairs of
// pixels, as such a product wants its right matrix. Few channels make one product of all cells, and
// many small images are the depth themselves.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv2d_math.h"

namespace dlops::cpu {

// Whether this kernel takes a convolution of this type.
bool takes_pairs(const Conv2dGeometry& g, at::ScalarType dtype);

// All are dense in the given memory format; grad_weight may be float32. False, and nothing done,
// where a number is not finite: it would be multiplied with zeros that stand beside the images,
// which gives NaN where there is no product.
bool pairs_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& input, const at::Tensor& grad_weight,
                       at::MemoryFormat format);

}  // namespace dlops::cpu
