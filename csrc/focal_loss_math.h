// Focal loss per element: value, first and second derivative, stable at every logit. Free of torch;
// shared by the CPU kernels (scalar and SIMD) and the CUDA kernels.
//
// Lin et al., "Focal Loss for Dense Object Detection" (2017): FL = -(1 - p)^gamma log p, where p is
// the probability given to the truth.
//
// Every function is a template over `M`, the arithmetic it runs in: M::V is the number (a float, a
// double or a SIMD vector of them), and M's static functions are the elementary functions on it.
// ScalarMath below is the plain one.
#pragma once

#include <cmath>
#include <limits>

#include "common/host_device.h"

namespace dlops {

template <class T>
struct ScalarMath {
  using V = T;
  using Scalar = T;
  static DLOPS_HOST_DEVICE T exp(T x) { return std::exp(x); }
  static DLOPS_HOST_DEVICE T log1p(T x) { return std::log1p(x); }
  // 1 / (1 + x) and log(1 + x) for x in [0, 1]
  static DLOPS_HOST_DEVICE void inverse_and_log(T x, T& inverse, T& log) {
    inverse = T(1) / (T(1) + x);
    log = std::log1p(x);
  }
  static DLOPS_HOST_DEVICE T pow(T x, T y) { return std::pow(x, y); }
  static DLOPS_HOST_DEVICE T abs(T x) { return std::abs(x); }
  // NaN in `x` passes through both.
  static DLOPS_HOST_DEVICE T max(T x, T bound) { return x < bound ? bound : x; }
  static DLOPS_HOST_DEVICE T min(T x, T bound) { return x > bound ? bound : x; }
  static DLOPS_HOST_DEVICE bool ge(T x, T y) { return x >= y; }
  static DLOPS_HOST_DEVICE bool eq(T x, T y) { return x == y; }
  static DLOPS_HOST_DEVICE T select(bool condition, T yes, T no) { return condition ? yes : no; }
};

// base^gamma for base in [0, 1]. Common exponents avoid pow, which costs more than all the rest.
template <class M>
DLOPS_HOST_DEVICE typename M::V focal_power(typename M::V base, typename M::Scalar gamma) {
  using V = typename M::V;
  if (gamma == 0) return V(1);
  if (gamma == 1) return base;
  if (gamma == 2) return base * base;
  return M::pow(base, V(gamma));
}

// A finite stand-in for infinity, so that inf * 0 in a product that vanishes gives 0.
template <class M>
DLOPS_HOST_DEVICE typename M::V finite(typename M::V x) {
  return M::min(x, typename M::V(std::numeric_limits<typename M::Scalar>::max()));
}

// ---------------------------------------------------------------------------------------------
// Sigmoid, hard targets (0 or 1). With z = x for target 0 and z = -x for target 1, the wrong
// answer has probability q = sigmoid(z), and the loss is q^gamma * softplus(z).
template <class M>
struct SigmoidFocal {
  using V = typename M::V;
  using Scalar = typename M::Scalar;
  Scalar gamma;
  V q, p;           // probability of the wrong and of the right answer, q + p = 1
  V cross_entropy;  // softplus(z) = -log p
  V power;          // q^gamma

  DLOPS_HOST_DEVICE SigmoidFocal(V z, Scalar gamma) : gamma(gamma) {
    const V e = M::exp(V(0) - M::abs(z));
    V larger, log;
    M::inverse_and_log(e, larger, log);
    const V smaller = e * larger;
    const auto positive = M::ge(z, V(0));
    q = M::select(positive, larger, smaller);
    p = M::select(positive, smaller, larger);
    cross_entropy = M::select(positive, z, V(0)) + log;
    power = focal_power<M>(q, gamma);
  }
  DLOPS_HOST_DEVICE V loss() const { return power * cross_entropy; }
  // d loss / dz
  DLOPS_HOST_DEVICE V first() const {
    return power * (q + V(gamma) * (finite<M>(cross_entropy) * p));
  }
  // d^2 loss / dz^2
  DLOPS_HOST_DEVICE V second() const {
    const V ce_p = finite<M>(cross_entropy) * p;
    return power * (V(1 + 2 * gamma) * q * p + V(gamma) * ce_p * (V(gamma) * p - q));
  }
};

// ---------------------------------------------------------------------------------------------
// Sigmoid, any target t in [0, 1], as torchvision's formula reads it:
//   loss = w * ce * q^gamma, w = alpha t + (1 - alpha)(1 - t) (or 1 where alpha < 0),
//   ce = softplus(x) - x t, q = 1 - p_t = p + t - 2 p t, p = sigmoid(x).
// All derivatives to second order in x and t. Scalar: soft targets are rare.
template <class T>
struct SoftSigmoidFocal {
  T loss, x, t, xx, xt, tt;  // the value and its partial derivatives

  DLOPS_HOST_DEVICE SoftSigmoidFocal(T logit, T target, T alpha, T gamma) {
    using M = ScalarMath<T>;
    const T e = M::exp(-M::abs(logit));
    const T larger = T(1) / (T(1) + e), smaller = e * larger;
    const T p = logit >= 0 ? larger : smaller;
    const T not_p = logit >= 0 ? smaller : larger;
    const T ce = M::log1p(e) + (logit >= 0 ? logit * (1 - target) : -logit * target);
    const T held = finite<M>(ce);  // an infinite loss has a gradient
    const T q = p * (1 - target) + not_p * target;
    const T slope = p * not_p;               // dp/dx
    const T q_x = slope * (1 - 2 * target);  // dq/dx
    const T q_t = not_p - p;                 // dq/dt
    const T q_xx = slope * (not_p - p) * (1 - 2 * target);
    const T q_xt = -2 * slope;
    // q^gamma = f and its derivatives. A hard target with an underflowed q has none left to give.
    const T f = focal_power<M>(q, gamma);
    const T f1 = gamma == 0 || q == 0 ? T(0) : gamma * f / q;
    const T f2 = gamma == 0 || q == 0 ? T(0) : (gamma - 1) * f1 / q;
    const T f_x = f1 * q_x, f_t = f1 * q_t;
    const T f_xx = f2 * q_x * q_x + f1 * q_xx;
    const T f_xt = f2 * q_x * q_t + f1 * q_xt;
    const T f_tt = f2 * q_t * q_t;
    const T ce_x = p - target, ce_t = -logit;
    // g = ce * f
    const T g = ce * f;
    const T g_x = ce_x * f + held * f_x;
    const T g_t = ce_t * f + ce * f_t;
    const T g_xx = slope * f + 2 * ce_x * f_x + held * f_xx;
    const T g_xt = -f + ce_x * f_t + ce_t * f_x + ce * f_xt;
    const T g_tt = 2 * ce_t * f_t + ce * f_tt;
    const T w = alpha < 0 ? T(1) : alpha * target + (1 - alpha) * (1 - target);
    const T w_t = alpha < 0 ? T(0) : 2 * alpha - 1;
    loss = w * g;
    x = w * g_x;
    t = w * g_t + w_t * g;
    xx = w * g_xx;
    xt = w * g_xt + w_t * g_x;
    tt = w * g_tt + 2 * w_t * g_t;
  }
};

// ---------------------------------------------------------------------------------------------
// Softmax: the loss as a function of v = log p of one class, phi(v) = -(1 - p)^gamma v.
// `log_p` and `not_p` = 1 - p come from the row's statistics, each computed without cancellation.
template <class M>
struct SoftmaxFocal {
  using V = typename M::V;
  using Scalar = typename M::Scalar;
  Scalar gamma;
  V log_p, not_p, p, power;
  V ratio;  // -log p / (1 - p), 1 in the limit p -> 1

  DLOPS_HOST_DEVICE SoftmaxFocal(V log_p, V not_p, Scalar gamma)
      : gamma(gamma), log_p(log_p), not_p(not_p) {
    p = M::exp(log_p);
    power = focal_power<M>(not_p, gamma);
    const auto certain = M::eq(not_p, V(0));
    ratio = M::select(certain, V(1), finite<M>(V(0) - log_p) / M::select(certain, V(1), not_p));
  }
  DLOPS_HOST_DEVICE V loss() const { return V(0) - power * log_p; }
  // d phi / dv
  DLOPS_HOST_DEVICE V first() const { return V(0) - power * (V(1) + V(gamma) * p * ratio); }
  // (1 - p) * d^2 phi / dv^2: the factor keeps it finite as p -> 1 with gamma < 1.
  DLOPS_HOST_DEVICE V second_times_not_p() const {
    const V v = V(0) - finite<M>(V(0) - log_p);
    return V(gamma) * power * p * (V(2) + v + V(gamma - 1) * p * ratio);
  }
};

}  // namespace dlops
