// The arithmetic of focal_loss_math.h on SIMD vectors.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

template <class T>
struct VecMath {
  using V = at::vec::Vectorized<T>;
  using Scalar = T;
  static V exp(V x) { return x.exp_u20(); }  // what native softmax uses
  static V expm1(V x) { return x.expm1(); }
  static V log(V x) { return x.log(); }
  static V log1p(V x) { return x.log1p(); }
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
