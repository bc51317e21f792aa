// Elementary functions as focal_loss_math.h takes them, in fewer instructions than CUDA's own have,
// where what is known of the argument allows that. Free of torch.
#pragma once

#include "common/host_device.h"
#include "focal_loss_math.h"

namespace dlops::cuda {

template <class T>
struct DeviceMath : ScalarMath<T> {};

template <>
struct DeviceMath<float> : ScalarMath<float> {
  // 1 / x, of x in [1, 4], to the last digit or the one before: a division has a branch for what is
  // not.
  static DLOPS_HOST_DEVICE float inverse(float x) {
#if defined(__CUDA_ARCH__)
    float first;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(first) : "f"(x));
    return fmaf(first, fmaf(-x, first, 1.0f), first);
#else
    return 1 / x;
#endif
  }
  // 1 / (1 + x) and log(1 + x) for x in [0, 1]. The logarithm is 2 atanh(s), s = x / (2 + x) in
  // [0, 1/3], whose series in s^2 ends early: Chebyshev's polynomial of degree 4 is within 2e-8.
  static DLOPS_HOST_DEVICE void inverse_and_log(float x, float& inverse_of, float& log) {
    inverse_of = inverse(1 + x);
    const float s = x * inverse(2 + x), z = s * s;
    const float series =
        0.3333332017f + z * (0.2000378032f + z * (0.141183099f + z * 0.1342574901f));
    log = 2 * s + 2 * s * z * series;
  }
};

}  // namespace dlops::cuda
