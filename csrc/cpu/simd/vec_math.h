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
  static V exp(V x) { return x.exp_u20(); }  // what native softmax uses
  static V expm1(V x) { return x.expm1(); }
  static V log(V x) { return x.log(); }
  static V log1p(V x) {  // for x >= 0
    if constexpr (std::is_same_v<T, float>) {
      // 1 + x = 2^k m with m from 2/3 to 4/3; where k is 0, m - 1 is x itself.
      int32_t bits[V::size()];
      float k[V::size()];
      (x + V(1)).store(bits);
      for (int l = 0; l < V::size(); ++l) {
        const int32_t exponent = (bits[l] - 0x3f2aaaab) >> 23;
        bits[l] -= exponent * (1 << 23);
        k[l] = static_cast<float>(exponent);
      }
      const V power = V::loadu(k), m = V::loadu(bits);
      const V small = log1p_of_fraction(select(eq(power, V(0)), x, m - V(1)));
      return power * V(0.693145752f) + (small + power * V(1.42860677e-6f));
    } else {
      return x.log1p();
    }
  }
  // For x from -1/3 to 1.
  static V log1p_of_fraction(V x) {
    if constexpr (std::is_same_v<T, float>) {
      // log(1 + x) = 2 artanh(s) = 2 (s + s^3/3 + s^5/5 + ...), s = x / (2 + x) at most 1/3; the
      // coefficients are the minimax ones: relative error 5e-9, after rounding 2 units at most.
      const V s = x / (V(2) + x), u = s * s;
      V series(0.14005996f);
      series = at::vec::fmadd(series, u, V(0.14000902f));
      series = at::vec::fmadd(series, u, V(0.20010763f));
      series = at::vec::fmadd(series, u, V(0.33333209f));
      return at::vec::fmadd(s + s, u * series, s + s);
    } else {
      return x.log1p();
    }
  }
  static V pow(V x, V y) { return x.pow(y); }
  static V abs(V x) { return x.abs(); }
  static V max(V x, V bound) { return at::vec::maximum(x, bound); }
  static V min(V x, V bound) { return at::vec::minimum(x, bound); }
  static V ge(V x, V y) { return x >= y; }
  static V eq(V x, V y) { return x == y; }
  static V select(V condition, V yes, V no) { return V::blendv(no, yes, condition); }
};

}  // namespace
}  // namespace dlops::cpu
