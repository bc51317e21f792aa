// Softmax focal loss over a range of rows. A row is one set of class logits: the input is
// (N, classes, inner), row number n * inner + i holds the elements (n, c, i).
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

namespace dlops::cpu {

template <class scalar_t>
struct FocalArgs {
  const scalar_t* input;
  const int64_t* target;                    // a class for each row, or null
  const scalar_t* probabilities;            // like input, or null
  const at::opmath_type<scalar_t>* weight;  // for each class, or null
  int64_t classes, inner;
  int64_t ignore_index;
  double gamma, label_smoothing;
};

// What multiplies the derivatives: the reduction's own factor, then one per row or one for all.
template <class scalar_t>
struct RowFactor {
  double share;
  const scalar_t* each;  // may be null
  double all;
  double upstream(int64_t row) const {
    return each == nullptr ? all : static_cast<double>(each[row]);
  }
};

// Bytes of working memory for one thread.
template <int capability, class scalar_t>
int64_t focal_loss_scratch(int64_t classes);

// Each computes rows [begin, end). The results are written where their pointer is not null. Those
// for wide rows read the classes of a row where they are, side by side (inner is 1), and need no
// working memory; they are the faster ones from so many classes on. Where 16 rows fill a vector
// they have to be more, as rows are turned round faster.
constexpr int64_t kWideClasses = 24, kWideClassesOf16 = 32;

// Returns the sum of the losses.
template <int capability, class scalar_t>
double focal_loss_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end, scalar_t* loss,
                       void* scratch);
template <int capability, class scalar_t>
void focal_loss_vjp_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                         RowFactor<scalar_t> grad, scalar_t* grad_input, scalar_t* grad_target,
                         void* scratch);
// The losses, and their gradients times `share`.
template <int capability, class scalar_t>
double focal_loss_and_grad_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                                double share, scalar_t* loss, scalar_t* grad_input, void* scratch);
template <int capability, class scalar_t>
double focal_loss_wide_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                            scalar_t* loss);
template <int capability, class scalar_t>
double focal_loss_and_grad_wide_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                                     double share, scalar_t* loss, scalar_t* grad_input);
template <int capability, class scalar_t>
void focal_loss_vjp_wide_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                              RowFactor<scalar_t> grad, scalar_t* grad_input,
                              scalar_t* grad_target);
// Returns the sum of the tangents. Either tangent may be null, which stands for zero.
template <int capability, class scalar_t>
double focal_loss_jvp_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                           const scalar_t* tangent_input, const scalar_t* tangent_target,
                           scalar_t* tangent, void* scratch);
template <int capability, class scalar_t>
void focal_loss_hvp_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                         RowFactor<scalar_t> grad, const scalar_t* tangent_input,
                         const scalar_t* tangent_target, scalar_t* grad_input,
                         scalar_t* grad_target, void* scratch);

}  // namespace dlops::cpu
