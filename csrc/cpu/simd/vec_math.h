// The arithmetic of focal_loss_math.h on SIMD vectors. Where a function is written out, at::vec's
// (of SLEEF) takes ten times as long in some processes as in others.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <type_traits>

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

template <class T>
struct VecMath {
  using V = at::vec::Vectorized<T>;
  using Scalar = T;
  static V exp(V x) {  // for x <= 0
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (std::is_same_v<T, float>) return exp_of_negative(x);
#endif
    return x.exp_u20();  // what native softmax uses
  }
  static V log1p(V x) {  // for x >= 0
    if constexpr (std::is_same_v<T, float>) {
      // 1 + x = 2^k m with m from 2/3 to 4/3; where k is 0, m - 1 is x itself. The bits of what is
      // not finite are no number: x - x makes it NaN.
      int32_t bits[V::size()];
      float k[V::size()];
      (x + V(1)).store(bits);
      for (int l = 0; l < V::size(); ++l) {
        const int32_t exponent = (bits[l] - 0x3f2aaaab) >> 23;
        bits[l] -= exponent * (1 << 23);
        k[l] = static_cast<float>(exponent);
      }
      const V power = V::loadu(k), m = V::loadu(bits);
      const V f = select(eq(power, V(0)), x, m - V(1));
      return power * V(0.693145752f) + (log_of_ratio(f / (V(2) + f)) + power * V(1.42860677e-6f)) +
             (x - x);
    } else {
      return x.log1p();
    }
  }
  // 1 / (1 + x) and log(1 + x) for x in [0, 1]
  static void inverse_and_log(V x, V& inverse, V& log) {
    const V one = V(1) + x;
    if constexpr (std::is_same_v<T, float>) {
      const V two = V(2) + x, both = V(1) / (one * two);  // division costs most
      inverse = both * two;
      log = log_of_ratio(x * one * both);
    } else {
      inverse = V(1) / one;
      log = x.log1p();
    }
  }
  static V pow(V x, V y) { return x.pow(y); }
  static V abs(V x) { return x.abs(); }
#if defined(CPU_CAPABILITY_AVX512)
  // These instructions return the second operand where either is NaN.
  static V max(V x, V bound) {
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_max_ps(bound, x);
    } else {
      return _mm512_max_pd(bound, x);
    }
  }
  static V min(V x, V bound) {
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_min_ps(bound, x);
    } else {
      return _mm512_min_pd(bound, x);
    }
  }
  // at::vec would turn each mask into a vector and back.
  static auto ge(V x, V y) { return compare<_CMP_GE_OQ>(x, y); }
  static auto eq(V x, V y) { return compare<_CMP_EQ_OQ>(x, y); }
  static V select(__mmask16 condition, V yes, V no) {
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_mask_blend_ps(condition, no, yes);
    } else {
      return _mm512_mask_blend_pd(static_cast<__mmask8>(condition), no, yes);
    }
  }
#else
  static V max(V x, V bound) { return at::vec::maximum(x, bound); }
  static V min(V x, V bound) { return at::vec::minimum(x, bound); }
  static V ge(V x, V y) { return x >= y; }
  static V eq(V x, V y) { return x == y; }
  static V select(V condition, V yes, V no) { return V::blendv(no, yes, condition); }
#endif

 private:
#if defined(CPU_CAPABILITY_AVX512)
  template <int comparison>
  static __mmask16 compare(V x, V y) {
    if constexpr (std::is_same_v<T, float>) {
      return _mm512_cmp_ps_mask(x, y, comparison);
    } else {
      return _mm512_cmp_pd_mask(x, y, comparison);
    }
  }
  // 2^n e^r with n whole and |r| <= log(2) / 2; e^r by minimax coefficients, relative error 9e-8.
  // That log(2) is one float adds up to n times 2e-9.
  static V exp_of_negative(V x) {
    const V bounded = _mm512_max_ps(V(-104.0f), x);  // e^-104 is 0; NaN passes
    const V n = (bounded * V(1.44269504f)).round();
    const V r = at::vec::fnmadd(n, V(0.693147182f), bounded);
    V series(0.00829027285f);
    series = at::vec::fmadd(series, r, V(0.0418981599f));
    series = at::vec::fmadd(series, r, V(0.166676381f));
    series = at::vec::fmadd(series, r, V(0.499991478f));
    series = at::vec::fmadd(series, r, V(0.999999706f));
    series = at::vec::fmadd(series, r, V(1.0f));
    return _mm512_scalef_ps(series, n);
  }
#endif
  // log((1 + s) / (1 - s)) = 2 (s + s^3/3 + s^5/5 + ...) for s from -1/3 to 1/3, with minimax
  // coefficients: relative error 5e-9.
  static V log_of_ratio(V s) {
    const V u = s * s;
    V series(0.14005996f);
    series = at::vec::fmadd(series, u, V(0.14000902f));
    series = at::vec::fmadd(series, u, V(0.20010763f));
    series = at::vec::fmadd(series, u, V(0.33333209f));
    return at::vec::fmadd(s + s, u * series, s + s);
  }
};

}  // namespace
}  // namespace dlops::cpu
