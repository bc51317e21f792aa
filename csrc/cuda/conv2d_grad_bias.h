// The gradient of a convolution's bias on CUDA, whatever the way of convolving.
#pragma once

#include <ATen/core/Tensor.h>

namespace dlops::cuda {

// grad_output (N, O, OH, OW) summed over all but O.
at::Tensor sum_of_pixels(const at::Tensor& grad_output);

}  // namespace dlops::cuda
