// Sigmoid focal loss over a range of elements.
#pragma once

#include <cstdint>

namespace dlops::cpu {

template <class scalar_t>
struct SigmoidFocalArgs {
  const scalar_t* inputs;
  const scalar_t* targets;
  const double* class_alpha;  // one for each of `classes`, or null: then alpha serves all
  int64_t classes;            // the size of the last dimension
  double alpha;               // negative: no weighting
  double gamma;
};

// What multiplies the derivatives: the reduction's own factor, then one per element or one for all.
template <class scalar_t>
struct Upstream {
  double share;
  const scalar_t* each;  // may be null
  double all;
};

// Each computes elements [begin, end). The results are written where their pointer is not null.

// Returns the sum of the losses.
template <int capability, class scalar_t>
double sigmoid_focal_loss_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                                scalar_t* loss);
// The same, and the derivatives by the inputs, each times `share`.
template <int capability, class scalar_t>
double sigmoid_focal_loss_and_grad_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                         int64_t end, double share, scalar_t* loss,
                                         scalar_t* grad_inputs);
template <int capability, class scalar_t>
void sigmoid_focal_loss_vjp_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                  int64_t end, Upstream<scalar_t> grad, scalar_t* grad_inputs,
                                  scalar_t* grad_targets);
// Returns the sum of the tangents. Either tangent may be null, which stands for zero.
template <int capability, class scalar_t>
double sigmoid_focal_loss_jvp_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                    int64_t end, const scalar_t* tangent_inputs,
                                    const scalar_t* tangent_targets, scalar_t* tangent);
template <int capability, class scalar_t>
void sigmoid_focal_loss_hvp_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                  int64_t end, Upstream<scalar_t> grad,
                                  const scalar_t* tangent_inputs, const scalar_t* tangent_targets,
                                  scalar_t* grad_inputs, scalar_t* grad_targets);

}  // namespace dlops::cpu
