// The argument checks of the focal losses, for CPU and CUDA alike.
#pragma once

#include <ATen/core/Reduction.h>

#include <optional>
#include <vector>

#include "common/checks.h"

namespace dlops {

inline void check_reduction(int64_t reduction, const char* op) {
  TORCH_CHECK_VALUE(reduction >= 0 && reduction < at::Reduction::END, op,
                    ": reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);
}

inline void check_floating(const at::Tensor& tensor, const char* name, const char* op) {
  const at::ScalarType type = tensor.scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(
      type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16, op,
      ": ", name, " must be of a floating-point type of 16 bits or more, got ", type);
}

// A tensor that stands for the loss's covector: one factor where the loss is reduced.
inline void check_grad_output(const at::Tensor& grad_output, at::IntArrayRef loss_shape,
                              int64_t reduction, const char* op) {
  if (reduction == at::Reduction::None) {
    check_sizes(grad_output, "grad_output", loss_shape, op);
  } else {
    TORCH_CHECK(grad_output.numel() == 1, op,
                ": grad_output of a reduced loss must hold one value, ", "got shape ",
                grad_output.sizes());
  }
}

inline void check_sigmoid_focal_loss(const at::Tensor& inputs, const at::Tensor& targets,
                                     const std::optional<at::Tensor>& class_alpha,
                                     int64_t reduction, const char* op) {
  check_reduction(reduction, op);
  check_floating(inputs, "inputs", op);
  TORCH_CHECK_VALUE(targets.sizes() == inputs.sizes(), op,
                    ": targets must have the shape of inputs (", inputs.sizes(), "), got ",
                    targets.sizes());
  check_like(targets, "targets", inputs, "inputs", op);
  if (class_alpha.has_value()) {
    TORCH_CHECK(class_alpha->device() == inputs.device(), op, ": alpha is on ",
                class_alpha->device(), ", inputs are on ", inputs.device());
    TORCH_CHECK(inputs.dim() > 0, op,
                ": a tensor alpha needs inputs with a last dimension of classes");
    check_sizes(*class_alpha, "alpha", {inputs.size(-1)}, op);
  }
}

// A softmax loss's input, seen as (N, classes, inner).
struct FocalShape {
  int64_t N, classes, inner;
  std::vector<int64_t> loss;  // the shape of the unreduced loss
  bool has_probabilities;     // the target holds class probabilities, not indices
  int64_t rows() const { return N * inner; }
};

inline FocalShape check_focal_loss(const at::Tensor& input, const at::Tensor& target,
                                   const std::optional<at::Tensor>& weight, int64_t ignore_index,
                                   int64_t reduction, double label_smoothing, const char* op) {
  check_reduction(reduction, op);
  check_floating(input, "input", op);
  const char* no_classes =
      ": input must have at least one dimension, (C), (N, C) or (N, C, d1, ...), got shape []";
  if (at::isFloatingType(target.scalar_type())) {
    TORCH_CHECK_INDEX(input.dim() >= 1, op, no_classes);
  } else {
    TORCH_CHECK(input.dim() >= 1, op, no_classes);
  }
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing <= 1, op,
              ": label_smoothing must be between 0.0 and 1.0, got ", label_smoothing);
  TORCH_CHECK(target.device() == input.device(), op, ": input is on ", input.device(),
              " and target is on ", target.device());
  FocalShape shape{};
  const bool batched = input.dim() > 1;
  shape.N = batched ? input.size(0) : 1;
  shape.classes = input.size(batched ? 1 : 0);
  shape.inner = 1;
  if (batched) shape.loss.push_back(shape.N);
  for (int64_t i = 2; i < input.dim(); ++i) {
    shape.inner *= input.size(i);
    shape.loss.push_back(input.size(i));
  }
  // Class numbers are compared as float32, which holds every integer up to here.
  TORCH_CHECK(shape.classes <= (int64_t(1) << 24), op, ": at most ", int64_t(1) << 24,
              " classes are supported, got ", shape.classes);
  TORCH_CHECK_VALUE(!batched || (target.dim() > 0 && target.size(0) == shape.N), op,
                    ": expected input batch_size (", shape.N, ") to match target batch_size (",
                    target.dim() == 0 ? 0 : target.size(0), "), got input of shape ", input.sizes(),
                    " and target of shape ", target.sizes());
  shape.has_probabilities = at::isFloatingType(target.scalar_type());
  if (shape.has_probabilities) {
    TORCH_CHECK(target.sizes() == input.sizes(), op,
                ": a target of class probabilities must have the ", "shape of input (",
                input.sizes(), "), got ", target.sizes());
    check_like(target, "target", input, "input", op);
    TORCH_CHECK(ignore_index < 0, op,
                ": ignore_index is not supported for a floating point target, got ", ignore_index);
  } else {
    TORCH_CHECK(target.scalar_type() == at::kLong, op,
                ": target must hold class indices (int64) or class probabilities, got ",
                target.scalar_type());
    TORCH_CHECK(batched || target.sizes() != input.sizes(), op,
                ": target in the shape of input must hold class probabilities, got ",
                target.scalar_type(), " of shape ", target.sizes());
    TORCH_CHECK_VALUE(batched || target.dim() != 1, op,
                      ": expected target of one class for input of ", "shape ", input.sizes(),
                      ", got target of shape ", target.sizes());
    TORCH_CHECK(target.sizes() == at::IntArrayRef(shape.loss), op, ": expected target of shape ",
                at::IntArrayRef(shape.loss), " for input of shape ", input.sizes(), ", got ",
                target.scalar_type(), " indices of shape ", target.sizes());
  }
  if (weight.has_value()) {
    TORCH_CHECK(weight->dim() == 1 && weight->size(0) == shape.classes, op,
                ": weight must hold one value for each of the ", shape.classes,
                " classes, got shape ", weight->sizes());
    check_like(*weight, "weight", input, "input", op);
  }
  return shape;
}

}  // namespace dlops
