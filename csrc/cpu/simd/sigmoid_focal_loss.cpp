#include "cpu/simd/sigmoid_focal_loss.h"

#include <ATen/OpMathType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "cpu/simd/rounded.h"
#include "cpu/simd/vec_math.h"
#include "focal_loss_math.h"

// Works tile by tile. A tile's hard targets (0 and 1) go through vectors, all in one loop; the
// elements with a soft target are then redone one by one with the general formula. So the result
// for an element never depends on its neighbours.
namespace dlops::cpu {
namespace {

constexpr int64_t kTile = 512;

// One tile in the type that the arithmetic runs in.
template <class T>
struct Tile {
  int64_t begin, count;
  alignas(64) T x[kTile], target[kTile], alpha[kTile], result[kTile];
  bool soft;  // whether any target is neither 0 nor 1
};

template <class scalar_t, class T>
void load(const SigmoidFocalArgs<scalar_t>& args, int64_t begin, int64_t end, Tile<T>& tile) {
  tile.begin = begin;
  tile.count = end - begin;
  for (int64_t i = 0; i < tile.count; ++i) tile.x[i] = static_cast<T>(args.inputs[begin + i]);
  int64_t hard = 0;
  for (int64_t i = 0; i < tile.count; ++i) {
    const T target = static_cast<T>(args.targets[begin + i]);
    tile.target[i] = target;
    hard += (target == T(0)) | (target == T(1));
  }
  tile.soft = hard != tile.count;
  if (args.class_alpha == nullptr) {
    std::fill_n(tile.alpha, tile.count, static_cast<T>(args.alpha));
  } else {
    int64_t c = begin % args.classes;
    for (int64_t i = 0; i < tile.count; ++i) {
      tile.alpha[i] = static_cast<T>(args.class_alpha[c]);
      if (++c == args.classes) c = 0;
    }
  }
  // Whole vectors are computed; what lies past the end is not stored.
  const int64_t padded = std::min(kTile, (tile.count + 15) / 16 * 16);
  std::fill(tile.x + tile.count, tile.x + padded, T(0));
  std::fill(tile.target + tile.count, tile.target + padded, T(0));
  std::fill(tile.alpha + tile.count, tile.alpha + padded, T(0));
}

enum class Order { value, first, second };

// The derivative of that order with respect to the logit, for hard targets.
template <Order order, class M>
typename M::V hard(typename M::V x, typename M::V target, typename M::V alpha,
                   typename M::Scalar gamma) {
  using V = typename M::V;
  const V sign = V(1) - target - target;  // z = sign * x
  const SigmoidFocal<M> focal(sign * x, gamma);
  const V weight = alpha * target + (V(1) - alpha) * (V(1) - target);
  const V used = M::select(M::ge(alpha, V(0)), weight, V(1));
  if constexpr (order == Order::value) return used * focal.loss();
  if constexpr (order == Order::first) return used * sign * focal.first();
  if constexpr (order == Order::second) return used * focal.second();
}

template <class T>
bool is_soft(T target) {
  return !(target == T(0) || target == T(1));
}

// The general formula, in double: its intermediate powers overflow float.
template <class T>
SoftSigmoidFocal<double> general(const Tile<T>& tile, int64_t i, double gamma) {
  return SoftSigmoidFocal<double>(static_cast<double>(tile.x[i]),
                                  static_cast<double>(tile.target[i]),
                                  static_cast<double>(tile.alpha[i]), gamma);
}

// tile.result = that derivative.
template <Order order, class T>
void derivative(Tile<T>& tile, double gamma) {
  using M = VecMath<T>;
  using V = typename M::V;
  for (int64_t i = 0; i < tile.count; i += V::size()) {
    hard<order, M>(V::loadu(tile.x + i), V::loadu(tile.target + i), V::loadu(tile.alpha + i),
                   static_cast<T>(gamma))
        .store(tile.result + i);
  }
  if (!tile.soft) return;
  for (int64_t i = 0; i < tile.count; ++i) {
    if (!is_soft(tile.target[i])) continue;
    const SoftSigmoidFocal<double> focal = general(tile, i, gamma);
    tile.result[i] = static_cast<T>(order == Order::value   ? focal.loss
                                    : order == Order::first ? focal.x
                                                            : focal.xx);
  }
}

// Calls f(tile) for the tiles of [begin, end).
template <class scalar_t, class F>
void for_each_tile(const SigmoidFocalArgs<scalar_t>& args, int64_t begin, int64_t end, const F& f) {
  Tile<at::opmath_type<scalar_t>> tile;
  for (int64_t at = begin; at < end; at += kTile) {
    load(args, at, std::min(end, at + kTile), tile);
    f(tile);
  }
}

template <class T>
double sum(const T* values, int64_t count) {
  T partial[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int64_t l = 0; l < 16; ++l) partial[l] += values[i + l];
  for (int64_t l = 0; i < count; ++i, ++l) partial[l] += values[i];
  double total = 0;
  for (int64_t l = 0; l < 16; ++l) total += static_cast<double>(partial[l]);
  return total;
}

template <class T, class scalar_t>
void store(const T* values, int64_t count, scalar_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<scalar_t>(values[i]);
}

// values *= the upstream gradient
template <class T, class scalar_t>
void scale(T* values, int64_t begin, int64_t count, Upstream<scalar_t> grad) {
  if (grad.each == nullptr) {
    for (int64_t i = 0; i < count; ++i) values[i] *= static_cast<T>(grad.all);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] *= static_cast<T>(grad.each[begin + i]);
  }
}

template <class scalar_t>
double upstream(const Upstream<scalar_t>& grad, int64_t i) {
  return grad.each == nullptr ? grad.all : static_cast<double>(grad.each[i]);
}

}  // namespace

template <int capability, class scalar_t>
double sigmoid_focal_loss_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                                scalar_t* loss) {
  double total = 0;
  for_each_tile(args, begin, end, [&](auto& tile) {
    derivative<Order::value>(tile, args.gamma);
    if (loss != nullptr) store(tile.result, tile.count, loss + tile.begin);
    total += sum(tile.result, tile.count);
  });
  return total;
}

template <int capability, class scalar_t>
void sigmoid_focal_loss_vjp_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                  int64_t end, Upstream<scalar_t> grad, scalar_t* grad_inputs,
                                  scalar_t* grad_targets) {
  for_each_tile(args, begin, end, [&](auto& tile) {
    if (grad_inputs != nullptr) {
      derivative<Order::first>(tile, args.gamma);
      scale(tile.result, tile.begin, tile.count, grad);
      store(tile.result, tile.count, grad_inputs + tile.begin);
    }
    if (grad_targets == nullptr) return;
    for (int64_t i = 0; i < tile.count; ++i)
      grad_targets[tile.begin + i] =
          rounded<scalar_t>(upstream(grad, tile.begin + i) * general(tile, i, args.gamma).t);
  });
}

template <int capability, class scalar_t>
double sigmoid_focal_loss_jvp_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                    int64_t end, const scalar_t* tangent_inputs,
                                    const scalar_t* tangent_targets, scalar_t* tangent) {
  using T = at::opmath_type<scalar_t>;
  double total = 0;
  for_each_tile(args, begin, end, [&](auto& tile) {
    if (tangent_inputs != nullptr) {
      derivative<Order::first>(tile, args.gamma);
      scale(tile.result, tile.begin, tile.count, Upstream<scalar_t>{tangent_inputs, 0});
    } else {
      std::fill_n(tile.result, tile.count, T(0));
    }
    if (tangent_targets != nullptr) {
      for (int64_t i = 0; i < tile.count; ++i)
        tile.result[i] += static_cast<T>(general(tile, i, args.gamma).t *
                                         static_cast<double>(tangent_targets[tile.begin + i]));
    }
    if (tangent != nullptr) store(tile.result, tile.count, tangent + tile.begin);
    total += sum(tile.result, tile.count);
  });
  return total;
}

template <int capability, class scalar_t>
void sigmoid_focal_loss_hvp_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                  int64_t end, Upstream<scalar_t> grad,
                                  const scalar_t* tangent_inputs, const scalar_t* tangent_targets,
                                  scalar_t* grad_inputs, scalar_t* grad_targets) {
  using T = at::opmath_type<scalar_t>;
  const auto tangent = [](const scalar_t* tangents, int64_t i) {
    return tangents == nullptr ? 0.0 : static_cast<double>(tangents[i]);
  };
  for_each_tile(args, begin, end, [&](auto& tile) {
    if (grad_inputs != nullptr) {
      if (tangent_inputs != nullptr) {
        derivative<Order::second>(tile, args.gamma);
        scale(tile.result, tile.begin, tile.count, Upstream<scalar_t>{tangent_inputs, 0});
      } else {
        std::fill_n(tile.result, tile.count, T(0));
      }
      if (tangent_targets != nullptr) {
        for (int64_t i = 0; i < tile.count; ++i)
          tile.result[i] += static_cast<T>(general(tile, i, args.gamma).xt *
                                           tangent(tangent_targets, tile.begin + i));
      }
      scale(tile.result, tile.begin, tile.count, grad);
      store(tile.result, tile.count, grad_inputs + tile.begin);
    }
    if (grad_targets == nullptr) return;
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t at = tile.begin + i;
      const SoftSigmoidFocal<double> focal = general(tile, i, args.gamma);
      grad_targets[at] =
          rounded<scalar_t>(upstream(grad, at) * (focal.xt * tangent(tangent_inputs, at) +
                                                  focal.tt * tangent(tangent_targets, at)));
    }
  });
}

#define DLOPS_INSTANTIATE(scalar_t)                                                             \
  template double sigmoid_focal_loss_range<DLOPS_CAPABILITY, scalar_t>(                         \
      const SigmoidFocalArgs<scalar_t>&, int64_t, int64_t, scalar_t*);                          \
  template void sigmoid_focal_loss_vjp_range<DLOPS_CAPABILITY, scalar_t>(                       \
      const SigmoidFocalArgs<scalar_t>&, int64_t, int64_t, Upstream<scalar_t>, scalar_t*,       \
      scalar_t*);                                                                               \
  template double sigmoid_focal_loss_jvp_range<DLOPS_CAPABILITY, scalar_t>(                     \
      const SigmoidFocalArgs<scalar_t>&, int64_t, int64_t, const scalar_t*, const scalar_t*,    \
      scalar_t*);                                                                               \
  template void sigmoid_focal_loss_hvp_range<DLOPS_CAPABILITY, scalar_t>(                       \
      const SigmoidFocalArgs<scalar_t>&, int64_t, int64_t, Upstream<scalar_t>, const scalar_t*, \
      const scalar_t*, scalar_t*, scalar_t*);

DLOPS_INSTANTIATE(double)
DLOPS_INSTANTIATE(float)
DLOPS_INSTANTIATE(c10::BFloat16)
DLOPS_INSTANTIATE(c10::Half)

}  // namespace dlops::cpu
