// Every op's schema, in one list, and the Python module dlops._C.
//
// The kernels are registered beside their code: csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu. Batches
// are always 4-D here (N, C, H, W); unbatched input and the string paddings are handled in
// dlops/functional.py. Padding of a convolution is (top, left, bottom, right). Reductions are
// at::Reduction's numbers: 0 none, 1 mean, 2 sum.
#include <torch/library.h>
#include <torch/python.h>

#include "build_info.h"
#include "kernels.h"
#if defined(DLOPS_WITH_CUDA)
#include "cuda/capture.h"
#endif

TORCH_LIBRARY(dlops, m) {
  // Convolution: bilinear, so these three are closed under differentiation.
  m.def(
      "conv2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, "
      "SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def(
      "conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[4] input_size, SymInt[2] "
      "stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def(
      "conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[2] kernel_size, SymInt[2] "
      "stride, "
      "SymInt[4] padding, SymInt[2] dilation, SymInt groups) -> Tensor");
  m.def("conv2d_grad_bias(Tensor grad_output) -> Tensor");
  m.def(
      "conv2d_backward(Tensor grad_output, Tensor? input, Tensor? weight, SymInt[4] input_size, "
      "SymInt[2] kernel_size, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, "
      "SymInt groups, bool[3] output_mask) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");

  // im2col and its transpose, col2im.
  m.def(
      "unfold(Tensor input, SymInt[2] kernel_size, SymInt[2] dilation, SymInt[2] padding, "
      "SymInt[2] stride) -> Tensor");
  m.def(
      "fold(Tensor input, SymInt[2] output_size, SymInt[2] kernel_size, SymInt[2] dilation, "
      "SymInt[2] padding, SymInt[2] stride) -> Tensor");

  // Max pooling. `cells` holds each maximum's position in its window: r * kernel_w + s, uint8 where
  // the window has at most 256 cells, else int64. Scatter (the backward) and gather (the derivative
  // of scatter) are each other's transpose.
  m.def(
      "max_pool2d(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, bool ceil_mode) -> (Tensor output, Tensor cells)");
  m.def(
      "max_pool2d_values(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, bool ceil_mode) -> Tensor");
  m.def(
      "max_pool2d_indices(Tensor cells, SymInt[4] input_size, SymInt[2] kernel_size, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) -> Tensor");
  m.def(
      "max_pool2d_scatter(Tensor grad_output, Tensor cells, SymInt[4] input_size, "
      "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) -> Tensor");
  m.def(
      "max_pool2d_gather(Tensor input, Tensor cells, SymInt[2] kernel_size, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation) -> Tensor");

  // Focal losses: the value, its product with a covector (the backward), with a tangent (forward
  // mode), and the derivative of the backward along a tangent. `and_grad` is the value with the
  // product for a covector of ones, worked out together; `scale_grad` turns that product into the
  // one for grad_output, in place.
  m.def(
      "sigmoid_focal_loss(Tensor inputs, Tensor targets, Tensor? class_alpha, float alpha, "
      "float gamma, int reduction) -> Tensor");
  m.def(
      "sigmoid_focal_loss_and_grad(Tensor inputs, Tensor targets, Tensor? class_alpha, float "
      "alpha, "
      "float gamma, int reduction) -> (Tensor loss, Tensor grad_inputs)");
  m.def(
      "sigmoid_focal_loss_scale_grad(Tensor(a!) grad_inputs, Tensor grad_output, Tensor inputs, "
      "Tensor targets, Tensor? class_alpha, float alpha, float gamma, int reduction) -> ()");
  m.def(
      "sigmoid_focal_loss_vjp(Tensor grad_output, Tensor inputs, Tensor targets, "
      "Tensor? class_alpha, float alpha, float gamma, int reduction, bool[2] output_mask) "
      "-> (Tensor grad_inputs, Tensor grad_targets)");
  m.def(
      "sigmoid_focal_loss_jvp(Tensor? tangent_inputs, Tensor? tangent_targets, Tensor inputs, "
      "Tensor targets, Tensor? class_alpha, float alpha, float gamma, int reduction) -> Tensor");
  m.def(
      "sigmoid_focal_loss_hvp(Tensor grad_output, Tensor? tangent_inputs, Tensor? tangent_targets, "
      "Tensor inputs, Tensor targets, Tensor? class_alpha, float alpha, float gamma, int "
      "reduction, "
      "bool[2] output_mask) -> (Tensor grad_inputs, Tensor grad_targets)");

  // The softmax form. `normalizer` is what 'mean' divides by: the summed weights of the targets, or
  // the number of rows where the target holds class probabilities.
  m.def(
      "focal_loss(Tensor input, Tensor target, Tensor? weight, float gamma, SymInt ignore_index, "
      "int reduction, float label_smoothing) -> (Tensor loss, Tensor normalizer)");
  m.def(
      "focal_loss_and_grad(Tensor input, Tensor target, Tensor? weight, float gamma, "
      "SymInt ignore_index, int reduction, float label_smoothing) "
      "-> (Tensor loss, Tensor normalizer, Tensor grad_input)");
  m.def(
      "focal_loss_scale_grad(Tensor(a!) grad_input, Tensor grad_output, Tensor normalizer, "
      "Tensor input, Tensor target, Tensor? weight, float gamma, SymInt ignore_index, "
      "int reduction, float label_smoothing) -> ()");
  m.def(
      "focal_loss_vjp(Tensor grad_output, Tensor normalizer, Tensor input, Tensor target, "
      "Tensor? weight, float gamma, SymInt ignore_index, int reduction, float label_smoothing, "
      "bool[2] output_mask) -> (Tensor grad_input, Tensor grad_target)");
  m.def(
      "focal_loss_jvp(Tensor normalizer, Tensor? tangent_input, Tensor? tangent_target, "
      "Tensor input, Tensor target, Tensor? weight, float gamma, SymInt ignore_index, "
      "int reduction, float label_smoothing) -> Tensor");
  m.def(
      "focal_loss_hvp(Tensor grad_output, Tensor normalizer, Tensor? tangent_input, "
      "Tensor? tangent_target, Tensor input, Tensor target, Tensor? weight, float gamma, "
      "SymInt ignore_index, int reduction, float label_smoothing, bool[2] output_mask) "
      "-> (Tensor grad_input, Tensor grad_target)");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("build_info", &dlops::build_info,
        "What this binary was built with, and what it found on this machine, as a dict.");
  dlops::add_kernels(m);
#if defined(DLOPS_WITH_CUDA)
  m.def("capture", &dlops::cuda::capture,
        "The number of the CUDA graph that a device's current stream captures, 0 if none.");
#endif
}
