// What the ways of convolving on CUDA share: conv2d.cu (im2col and the library's product),
// conv2d_implicit.cu (implicit GEMM) and conv2d_depthwise.cu.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "conv2d_math.h"

namespace dlops::cuda {

// Smaller in tests, so that small cases are cut too.
#if !defined(DLOPS_WORKSPACE_BYTES)
#define DLOPS_WORKSPACE_BYTES (64 << 20)
#endif
constexpr int64_t kWorkspaceBytes = DLOPS_WORKSPACE_BYTES;

// Whether every output pixel sees the one input pixel that is where it is.
inline bool is_pointwise(const Conv2dGeometry& g) {
  return g.R == 1 && g.S == 1 && g.stride_h == 1 && g.stride_w == 1 && g.OH == g.H && g.OW == g.W &&
         g.pad_top == 0 && g.pad_left == 0;
}

// Whether the ways without a column matrix are: unless DLOPS_CUDA_CONV2D=im2col asks for the other.
bool asks_for_implicit_gemm();

// Whether a way is asked for and serves this dtype, device and geometry.
bool takes_depthwise(const at::Tensor& tensor, const Conv2dGeometry& g);
bool takes_implicit_gemm(const at::Tensor& tensor, const Conv2dGeometry& g);
bool takes_implicit_grad_input(const at::Tensor& tensor, const Conv2dGeometry& g);

// Each writes all of its last argument, which is not empty.
void implicit_conv2d(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, const at::Tensor& output);
void implicit_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                         const at::Tensor& weight, const at::Tensor& grad_input);
void implicit_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& input, const at::Tensor& grad_weight);

void depthwise_conv2d(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias, const at::Tensor& output);
void depthwise_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                          const at::Tensor& weight, const at::Tensor& grad_input);
void depthwise_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                           const at::Tensor& input, const at::Tensor& grad_weight);

}  // namespace dlops::cuda
