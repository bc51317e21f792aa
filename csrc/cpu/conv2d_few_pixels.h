// A batch of few pixels under a large weight: one small image, say, of hundreds of channels. The
// weight then is almost all the memory there is to move, and it is read or written once, where it
// is, while the pixels are brought into columns for it:
//
//   output[O x P]      = weight[O x K] col[K x P]
//   grad_col[P x K]    = grad_output'[P x O] weight[O x K]
//   grad_weight[O x K] = grad_output[O x P] col'[P x K]
//
// with all P pixels of the batch. The first two add up the same terms in the same order as
// conv2d_strips.h: the bits of an image's result do not depend on how many others there are.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv2d_math.h"

namespace dlops::cpu {

// Each writes its result and returns true, or false where it does not pay or where something is not
// finite: products with the zeros of the columns would then be NaN. bfloat16 has the second by
// strips, and the first where channels are neighbours in memory. Images, gradients and results are
// dense in the given memory format; bias, where there is one, is contiguous.
bool few_pixels_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                        const at::Tensor& bias, const at::Tensor& output, at::MemoryFormat format);
bool few_pixels_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                           const at::Tensor& weight, const at::Tensor& grad_input,
                           at::MemoryFormat format);
bool few_pixels_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                            const at::Tensor& input, const at::Tensor& grad_weight,
                            at::MemoryFormat format);

}  // namespace dlops::cpu
