#include "cpu/simd/sigmoid_focal_loss.h"

#include <ATen/OpMathType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "cpu/simd/load_store.h"
#include "cpu/simd/rounded.h"
#include "cpu/simd/vec_math.h"
#include "focal_loss_math.h"

// Works tile by tile. A tile's hard targets (0 and 1) go through vectors, all in one loop; the
// elements with a soft target are then redone one by one with the general formula. So the result
// for an element never depends on its neighbours.
namespace dlops::cpu {
namespace {

constexpr int64_t kTile = 512;

enum class Order { value, first, second };

// One tile of results, in the type that the arithmetic runs in.
template <class scalar_t>
struct Tile {
  using T = at::opmath_type<scalar_t>;
  using V = typename VecMath<T>::V;
  const SigmoidFocalArgs<scalar_t>& args;
  int64_t begin = 0, count = 0;
  alignas(64) T class_alpha[kTile], results[3][kTile];

  explicit Tile(const SigmoidFocalArgs<scalar_t>& args) : args(args) {}
  void start(int64_t from, int64_t to) {
    begin = from;
    count = to - from;
    if (args.class_alpha == nullptr) return;
    int64_t c = begin % args.classes;
    for (int64_t i = 0; i < count; ++i) {
      class_alpha[i] = static_cast<T>(args.class_alpha[c]);
      if (++c == args.classes) c = 0;
    }
  }
  T* result(Order order) { return results[static_cast<int>(order)]; }
  V inputs(int64_t i) const { return load<T>(args.inputs + begin + i, count - i); }
  V targets(int64_t i) const { return load<T>(args.targets + begin + i, count - i); }
  V alpha(int64_t i) const {
    return args.class_alpha == nullptr ? V(static_cast<T>(args.alpha))
                                       : load<T>(class_alpha + i, count - i);
  }
  // The general formula, in double: its intermediate powers overflow float.
  SoftSigmoidFocal<double> general(int64_t i) const {
    const T alpha = args.class_alpha == nullptr ? static_cast<T>(args.alpha) : class_alpha[i];
    return SoftSigmoidFocal<double>(static_cast<double>(args.inputs[begin + i]),
                                    static_cast<double>(args.targets[begin + i]),
                                    static_cast<double>(alpha), args.gamma);
  }
  bool is_soft(int64_t i) const {
    const T target = static_cast<T>(args.targets[begin + i]);
    return !(target == T(0) || target == T(1));
  }
};

// The derivatives with respect to the logit, for hard targets.
template <class M>
struct Hard {
  using V = typename M::V;
  V sign;  // z = sign * x
  V used;  // the alpha that counts
  SigmoidFocal<M> focal;

  C10_ALWAYS_INLINE Hard(V x, V target, V alpha, typename M::Scalar gamma)
      : sign(V(1) - target - target),
        used(M::select(M::ge(alpha, V(0)), M::select(M::eq(target, V(0)), V(1) - alpha, alpha),
                       V(1))),
        focal(sign * x, gamma) {}
  template <Order order>
  C10_ALWAYS_INLINE V of() const {
    if constexpr (order == Order::value) return used * focal.loss();
    if constexpr (order == Order::first) return used * sign * focal.first();
    if constexpr (order == Order::second) return used * focal.second();
  }
};

// tile.results[order] = the derivatives of these orders for hard targets; whether all of them are.
template <Order... orders, class scalar_t>
C10_ALWAYS_INLINE bool hard_derivatives(Tile<scalar_t>& tile, typename Tile<scalar_t>::T gamma) {
  using T = typename Tile<scalar_t>::T;
  using M = VecMath<T>;
  using V = typename M::V;
  V soft(0);  // some bit is set in a lane that has met one
  for (int64_t i = 0; i < tile.count; i += V::size()) {
    const V target = tile.targets(i);
    soft = soft | at::vec::fmsub(target, target, target);  // t t - t is 0 for 0 and 1 alone
    const Hard<M> hard(tile.inputs(i), target, tile.alpha(i), gamma);
    (hard.template of<orders>().store(tile.result(orders) + i), ...);
  }
  return soft.zero_mask() == (1 << V::size()) - 1;
}

template <Order order>
double of(const SoftSigmoidFocal<double>& focal) {
  return order == Order::value ? focal.loss : order == Order::first ? focal.x : focal.xx;
}

// tile.results[order] = the derivatives of these orders.
template <Order... orders, class scalar_t>
void derivatives(Tile<scalar_t>& tile) {
  using T = typename Tile<scalar_t>::T;
  const T gamma = static_cast<T>(tile.args.gamma);
  // Of a gamma that is known here, no other power is left in the loop.
  if (gamma == T(2) ? hard_derivatives<orders...>(tile, T(2))
                    : hard_derivatives<orders...>(tile, gamma))
    return;
  for (int64_t i = 0; i < tile.count; ++i) {
    if (!tile.is_soft(i)) continue;
    const SoftSigmoidFocal<double> focal = tile.general(i);
    ((tile.result(orders)[i] = static_cast<T>(of<orders>(focal))), ...);
  }
}

// Calls f(tile) for the tiles of [begin, end).
template <class scalar_t, class F>
void for_each_tile(const SigmoidFocalArgs<scalar_t>& args, int64_t begin, int64_t end, const F& f) {
  Tile<scalar_t> tile(args);
  for (int64_t at = begin; at < end; at += kTile) {
    tile.start(at, std::min(end, at + kTile));
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
void store_row(const T* values, int64_t count, scalar_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<scalar_t>(values[i]);
}

// Stores values where they are wanted, and returns their sum.
template <class T, class scalar_t>
double finish(const T* values, int64_t begin, int64_t count, scalar_t* to) {
  if (to != nullptr) store_row(values, count, to + begin);
  return sum(values, count);
}

// values *= the upstream gradient
template <class T, class scalar_t>
void scale(T* values, int64_t begin, int64_t count, Upstream<scalar_t> grad) {
  for (int64_t i = 0; i < count; ++i) values[i] *= static_cast<T>(grad.share);
  if (grad.each == nullptr) {
    for (int64_t i = 0; i < count; ++i) values[i] *= static_cast<T>(grad.all);
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] *= static_cast<T>(grad.each[begin + i]);
  }
}

template <class scalar_t>
double upstream(const Upstream<scalar_t>& grad, int64_t i) {
  return grad.share * (grad.each == nullptr ? grad.all : static_cast<double>(grad.each[i]));
}

}  // namespace

template <int capability, class scalar_t>
double sigmoid_focal_loss_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                                scalar_t* loss) {
  double total = 0;
  for_each_tile(args, begin, end, [&](auto& tile) {
    derivatives<Order::value>(tile);
    total += finish(tile.result(Order::value), tile.begin, tile.count, loss);
  });
  return total;
}

template <int capability, class scalar_t>
double sigmoid_focal_loss_and_grad_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                         int64_t end, double share, scalar_t* loss,
                                         scalar_t* grad_inputs) {
  double total = 0;
  for_each_tile(args, begin, end, [&](auto& tile) {
    derivatives<Order::value, Order::first>(tile);
    total += finish(tile.result(Order::value), tile.begin, tile.count, loss);
    auto* slopes = tile.result(Order::first);
    scale(slopes, tile.begin, tile.count, Upstream<scalar_t>{share, nullptr, 1});
    store_row(slopes, tile.count, grad_inputs + tile.begin);
  });
  return total;
}

template <int capability, class scalar_t>
void sigmoid_focal_loss_vjp_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                  int64_t end, Upstream<scalar_t> grad, scalar_t* grad_inputs,
                                  scalar_t* grad_targets) {
  for_each_tile(args, begin, end, [&](auto& tile) {
    if (grad_inputs != nullptr) {
      derivatives<Order::first>(tile);
      auto* slopes = tile.result(Order::first);
      scale(slopes, tile.begin, tile.count, grad);
      store_row(slopes, tile.count, grad_inputs + tile.begin);
    }
    if (grad_targets == nullptr) return;
    for (int64_t i = 0; i < tile.count; ++i)
      grad_targets[tile.begin + i] =
          rounded<scalar_t>(upstream(grad, tile.begin + i) * tile.general(i).t);
  });
}

template <int capability, class scalar_t>
double sigmoid_focal_loss_jvp_range(const SigmoidFocalArgs<scalar_t>& args, int64_t begin,
                                    int64_t end, const scalar_t* tangent_inputs,
                                    const scalar_t* tangent_targets, scalar_t* tangent) {
  using T = at::opmath_type<scalar_t>;
  double total = 0;
  for_each_tile(args, begin, end, [&](auto& tile) {
    T* result = tile.result(Order::first);
    if (tangent_inputs != nullptr) {
      derivatives<Order::first>(tile);
      scale(result, tile.begin, tile.count, Upstream<scalar_t>{1, tangent_inputs, 0});
    } else {
      std::fill_n(result, tile.count, T(0));
    }
    if (tangent_targets != nullptr) {
      for (int64_t i = 0; i < tile.count; ++i)
        result[i] += static_cast<T>(tile.general(i).t *
                                    static_cast<double>(tangent_targets[tile.begin + i]));
    }
    total += finish(result, tile.begin, tile.count, tangent);
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
      T* result = tile.result(Order::second);
      if (tangent_inputs != nullptr) {
        derivatives<Order::second>(tile);
        scale(result, tile.begin, tile.count, Upstream<scalar_t>{1, tangent_inputs, 0});
      } else {
        std::fill_n(result, tile.count, T(0));
      }
      if (tangent_targets != nullptr) {
        for (int64_t i = 0; i < tile.count; ++i)
          result[i] +=
              static_cast<T>(tile.general(i).xt * tangent(tangent_targets, tile.begin + i));
      }
      scale(result, tile.begin, tile.count, grad);
      store_row(result, tile.count, grad_inputs + tile.begin);
    }
    if (grad_targets == nullptr) return;
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t at = tile.begin + i;
      const SoftSigmoidFocal<double> focal = tile.general(i);
      grad_targets[at] =
          rounded<scalar_t>(upstream(grad, at) * (focal.xt * tangent(tangent_inputs, at) +
                                                  focal.tt * tangent(tangent_targets, at)));
    }
  });
}

#define DLOPS_INSTANTIATE(scalar_t)                                                             \
  template double sigmoid_focal_loss_range<DLOPS_CAPABILITY, scalar_t>(                         \
      const SigmoidFocalArgs<scalar_t>&, int64_t, int64_t, scalar_t*);                          \
  template double sigmoid_focal_loss_and_grad_range<DLOPS_CAPABILITY, scalar_t>(                \
      const SigmoidFocalArgs<scalar_t>&, int64_t, int64_t, double, scalar_t*, scalar_t*);       \
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
