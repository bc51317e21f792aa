// The gradient of a large weight from few pixels: a batch of one small image, say, under hundreds
// of channels. The weight then is all the memory there is to move, and it is written once, where it
// belongs:
//
//   grad_weight[Og x K] = grad_output[Og x P] col'[P x K]
//
// with all P pixels of the batch, K in the order in which the weight's cells and channels lie.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv2d_math.h"

namespace dlops::cpu {

// Whether there are few enough pixels, and whether that pays, for images of this type.
bool takes_few_pixels(const Conv2dGeometry& g, at::ScalarType dtype);

// All tensors are dense in the given memory format. False, and nothing is written, if grad_output
// is not finite: its products with the padding's zeros would be NaN.
bool few_pixels_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                            const at::Tensor& input, const at::Tensor& grad_weight,
                            at::MemoryFormat format);

}  // namespace dlops::cpu
