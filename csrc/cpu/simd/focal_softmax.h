// A softmax and its focal loss on vectors whose lanes are rows, or classes of one row.
#pragma once

#include <cstdint>

#include "cpu/simd/vec_math.h"
#include "focal_loss_math.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// The largest logit is left out of the sum: then no digit of a probability near 1 is lost, nor of
// its complement.
template <class M>
struct Softmax {
  using V = typename M::V;
  using T = typename M::Scalar;
  V max;
  V log_sum;     // log(1 + others)
  V inverse;     // 1 / (1 + others): the largest probability
  V complement;  // 1 - that
  T gamma;

  // `others` is the sum of exp(x - max) over the classes but one of the largest.
  Softmax(V max, V others, double gamma)
      : max(max),
        log_sum(M::log1p(others)),
        inverse(V(T(1)) / (V(T(1)) + others)),
        complement(others * inverse),
        gamma(static_cast<T>(gamma)) {}

  V log_p(V logit) const {
    return M::select(M::eq(logit, max), V(T(0)) - log_sum, (logit - max) - log_sum);
  }
  // phi and its derivatives for the class with this logit
  SoftmaxFocal<M> focal(V logit) const {
    const V lp = log_p(logit);
    const V not_p = M::select(M::eq(logit, max), complement, V(T(1)) - M::exp(lp));
    return SoftmaxFocal<M>(lp, not_p, gamma);
  }
  V p(V logit) const { return M::exp(logit - max) * inverse; }
};

// A vector times a factor that may be 0: then 0, even where the vector is infinite.
template <class M>
typename M::V weighted(typename M::V factor, typename M::V value) {
  using V = typename M::V;
  return M::select(M::eq(factor, V(0)), V(0), factor * value);
}
// The same for losses, but where one is NaN.
template <class M>
typename M::V weighted_loss(typename M::V factor, typename M::V loss) {
  return M::select(M::eq(loss, loss), weighted<M>(factor, loss), loss);
}

// A sum that loses no digits however many terms it has (Kahan).
template <class M>
struct Sum {
  using V = typename M::V;
  V total{typename M::Scalar(0)}, lost{typename M::Scalar(0)};
  void add(V value) {
    const V wanted = value - lost, next = total + wanted;
    const V error = (next - total) - wanted;
    // Where the sum is infinite the error is not a number: nothing is lost then.
    lost = M::select(M::eq(error, error), error, V(0));
    total = next;
  }
};

// The classes' parts in a smoothed target.
template <class T>
struct Smoothing {
  T kept, spread;
  Smoothing(double label_smoothing, int64_t classes)
      : kept(static_cast<T>(1 - label_smoothing)),
        spread(static_cast<T>(label_smoothing / static_cast<double>(classes))) {}
};

}  // namespace
}  // namespace dlops::cpu
