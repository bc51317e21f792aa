// float32 convolution by sums of bfloat16 products, where torch.set_float32_matmul_precision allows
// it ('high') and the machine multiplies bfloat16 by AMX. With x = high + low, each the nearest
// bfloat16 number,
//
//   x w = high(x) high(w) + high(x) low(w) + low(x) high(w)
//
// but for 2^-15 of it at most, about 2^-18 in the norm: one convolution in bfloat16, summed in
// float32, of images with the parts (high, high, low) of each pixel's channels and weights with
// (high, low, high). Below 2^-117 the low parts count as zeros, and within a hundredth of float32's
// largest number a product may be infinite.
#pragma once

#include <ATen/core/Tensor.h>

#include "conv2d_math.h"

namespace dlops::cpu {

constexpr int64_t kParts = 3;

// Whether products of this type may be such sums now, on this machine, and depth_channels of a
// group are enough for them to be worth it.
bool takes_parts(at::ScalarType dtype, int64_t depth_channels);

// The parts of some pixels' channels, [pixel][part][channel]. False where a number has none.
bool split_pixels(const float* from, int64_t pixels, int64_t channels, at::BFloat16* to);

// Those of a weight (O, C, R, S), along axis 1 or for each group along axis 0; undefined where a
// number has none.
at::Tensor weight_parts(const at::Tensor& weight, int64_t axis, int64_t groups);

// All are dense in the given memory format. False, and grad_weight is not worked out, where a
// number has no parts or no kernel takes the convolution.
bool parts_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& input, const at::Tensor& grad_weight,
                       at::MemoryFormat format);

}  // namespace dlops::cpu
