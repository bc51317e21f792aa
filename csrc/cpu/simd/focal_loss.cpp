#include "cpu/simd/focal_loss.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>

#include "cpu/simd/focal_softmax.h"
#include "cpu/simd/transpose_tiles.h"

// A vector's lanes are rows: a tile holds `lanes` rows, class by class, so that every sum over
// classes is a loop over vectors, in the same order for each row, whatever its neighbours and the
// layout.
namespace dlops::cpu {
namespace {

template <class scalar_t>
struct Rows {
  using T = at::opmath_type<scalar_t>;
  using M = VecMath<T>;
  using V = typename M::V;
  static constexpr int64_t lanes = V::size();

  const FocalArgs<scalar_t>& args;
  int64_t first, count;  // the rows of this tile
  T* x;                  // logits, [class][lane]
  T target_class[lanes], valid_lane[lanes], target_weight[lanes];

  Rows(const FocalArgs<scalar_t>& args, T* space) : args(args), first(0), count(0), x(space) {}

  static int64_t tile_size(int64_t classes) { return classes * lanes; }
  int64_t offset(int64_t row) const {
    return args.inner == 1 ? row * args.classes
                           : row / args.inner * args.classes * args.inner + row % args.inner;
  }

  // Copies the rows' elements of a tensor like the input into a tile. Missing lanes are 0.
  void read(const scalar_t* from, T* tile) const {
    if (count < lanes) std::fill_n(tile, tile_size(args.classes), T(0));
    if (args.inner == 1) {
      const scalar_t* rows = from + first * args.classes;
      return transpose_tiles(rows, args.classes, count, args.classes, tile, lanes);
    }
    for_each_element(
        [&](int64_t at, int64_t element) { tile[at] = static_cast<T>(from[element]); });
  }
  void write(const T* tile, scalar_t* to) const {
    if (args.inner == 1) {
      scalar_t* rows = to + first * args.classes;
      return transpose_tiles(tile, lanes, args.classes, count, rows, args.classes);
    }
    for_each_element(
        [&](int64_t at, int64_t element) { to[element] = static_cast<scalar_t>(tile[at]); });
  }
  // Calls f(place in the tile, place in the tensor), along the memory of a tensor whose rows are
  // not contiguous.
  template <class F>
  void for_each_element(const F& f) const {
    if (first % args.inner + count <= args.inner) {
      const int64_t start = offset(first);
      for (int64_t c = 0; c < args.classes; ++c)
        for (int64_t l = 0; l < count; ++l) f(c * lanes + l, start + c * args.inner + l);
    } else {
      for (int64_t c = 0; c < args.classes; ++c)
        for (int64_t l = 0; l < count; ++l) f(c * lanes + l, offset(first + l) + c * args.inner);
    }
  }

  void load(int64_t row, int64_t end) {
    first = row;
    count = std::min(lanes, end - row);
    read(args.input, x);
    for (int64_t l = 0; l < lanes; ++l) {
      const int64_t t = l < count && args.target != nullptr ? args.target[first + l] : -1;
      const bool valid = l < count && (args.target == nullptr || t != args.ignore_index);
      valid_lane[l] = T(valid);
      target_class[l] = T(valid ? t : -1);
      target_weight[l] =
          valid && args.target != nullptr && args.weight != nullptr ? args.weight[t] : T(1);
    }
  }
  auto valid() const { return M::ge(V::loadu(valid_lane), V(T(1))); }
  V target() const { return V::loadu(target_class); }
  V logit(int64_t c) const { return V::loadu(x + c * lanes); }
  V weight(int64_t c) const { return V(args.weight == nullptr ? T(1) : args.weight[c]); }
  // The share of class c in the smoothed target, `target` being the tile of probabilities.
  V share(int64_t c, const T* target) const {
    const auto [kept, spread] = Smoothing<T>(args.label_smoothing, args.classes);
    if (target != nullptr) return V(kept) * V::loadu(target + c * lanes) + V(spread);
    return M::select(M::eq(this->target(), V(T(c))), V(kept + spread), V(spread));
  }
  bool one_class_each() const { return args.target != nullptr && args.label_smoothing == 0; }
};

// The sums of what f(c) returns, `n` vectors, over the classes: each in four chains that the
// processor runs side by side.
template <class M, size_t n, class F>
std::array<typename M::V, n> sums_over(int64_t classes, const F& f) {
  Sum<M> chains[4][n];
  const auto add = [&](int64_t chain, const std::array<typename M::V, n>& values) {
    for (size_t i = 0; i < n; ++i) chains[chain][i].add(values[i]);
  };
  int64_t c = 0;
  for (; c + 4 <= classes; c += 4)
    for (int64_t chain = 0; chain < 4; ++chain) add(chain, f(c + chain));
  for (; c < classes; ++c) add(0, f(c));
  std::array<typename M::V, n> totals;
  for (size_t i = 0; i < n; ++i) {
    for (int64_t chain = 1; chain < 4; ++chain) chains[0][i].add(chains[chain][i].total);
    totals[i] = chains[0][i].total;
  }
  return totals;
}

template <class M, class F>
typename M::V sum_over(int64_t classes, const F& f) {
  return sums_over<M, 1>(classes, [&](int64_t c) { return std::array{f(c)}; })[0];
}

template <class scalar_t>
typename Rows<scalar_t>::V largest_logit(const Rows<scalar_t>& rows) {
  using M = typename Rows<scalar_t>::M;
  typename M::V max[4] = {rows.logit(0), rows.logit(0), rows.logit(0), rows.logit(0)};
  int64_t c = 0;
  for (; c + 4 <= rows.args.classes; c += 4)
    for (int64_t i = 0; i < 4; ++i) max[i] = M::max(max[i], rows.logit(c + i));
  for (; c < rows.args.classes; ++c) max[0] = M::max(max[0], rows.logit(c));
  return M::max(M::max(max[0], max[1]), M::max(max[2], max[3]));
}

// A tile's softmax. With `exps`, exp(x - max) is kept there.
template <class scalar_t>
Softmax<typename Rows<scalar_t>::M> softmax_of(const Rows<scalar_t>& rows,
                                               typename Rows<scalar_t>::T* exps = nullptr) {
  using R = Rows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  using T = typename R::T;
  const V max = largest_logit(rows);
  V ties(T(-1));
  const V smaller = sum_over<M>(rows.args.classes, [&](int64_t c) {
    const auto tie = M::eq(rows.logit(c), max);
    const V shifted = rows.logit(c) - max, e = M::exp(shifted);
    if (exps != nullptr) e.store(exps + c * R::lanes);
    ties = ties + M::select(tie, V(T(1)), V(T(0)));
    // The difference of a largest logit is 0, or NaN where the row has no softmax.
    return M::select(tie, shifted, e);
  });
  return Softmax<M>(max, smaller + ties, rows.args.gamma);
}

// The logits of the target classes, where each row has one.
template <class scalar_t>
typename Rows<scalar_t>::V target_logit(const Rows<scalar_t>& rows) {
  using R = Rows<scalar_t>;
  typename R::T values[R::lanes] = {};
  for (int64_t l = 0; l < rows.count; ++l) {
    const int64_t t = static_cast<int64_t>(rows.target_class[l]);
    if (t >= 0) values[l] = rows.x[t * R::lanes + l];
  }
  return R::V::loadu(values);
}

template <class scalar_t>
typename Rows<scalar_t>::V row_losses(const Rows<scalar_t>& rows,
                                      const at::opmath_type<scalar_t>* target) {
  using R = Rows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  const auto softmax = softmax_of(rows);
  V loss(0);
  if (rows.one_class_each()) {
    loss = weighted_loss<M>(V::loadu(rows.target_weight), softmax.focal(target_logit(rows)).loss());
  } else {
    loss = sum_over<M>(rows.args.classes, [&](int64_t c) {
      return weighted_loss<M>(rows.weight(c) * rows.share(c, target),
                              softmax.focal(rows.logit(c)).loss());
    });
  }
  return M::select(rows.valid(), loss, V(0));
}

// Stores a value per row and returns their sum.
template <class scalar_t>
double finish(const Rows<scalar_t>& rows, typename Rows<scalar_t>::V values, scalar_t* to) {
  typename Rows<scalar_t>::T lane[Rows<scalar_t>::lanes];
  values.store(lane);
  double sum = 0;
  for (int64_t l = 0; l < rows.count; ++l) sum += static_cast<double>(lane[l]);
  if (to != nullptr)
    for (int64_t l = 0; l < rows.count; ++l) to[rows.first + l] = static_cast<scalar_t>(lane[l]);
  return sum;
}

// The upstream gradient of each row; 0 for ignored ones.
template <class scalar_t>
typename Rows<scalar_t>::V upstream(const Rows<scalar_t>& rows, RowFactor<scalar_t> grad) {
  using R = Rows<scalar_t>;
  typename R::T lane[R::lanes] = {};
  for (int64_t l = 0; l < rows.count; ++l)
    lane[l] = static_cast<typename R::T>(grad.upstream(rows.first + l));
  return R::M::select(rows.valid(), R::V::loadu(lane), typename R::V(0));
}
// The reduction's own factor; 0 for ignored rows.
template <class scalar_t>
typename Rows<scalar_t>::V shares(const Rows<scalar_t>& rows, RowFactor<scalar_t> grad) {
  using R = Rows<scalar_t>;
  using V = typename R::V;
  return R::M::select(rows.valid(), V(static_cast<typename R::T>(grad.share)), V(0));
}

// Whole-tile working memory, in the order it is asked for.
template <class scalar_t>
struct Tiles {
  using T = typename Rows<scalar_t>::T;
  static constexpr int64_t kCount = 4;
  T* x;
  T* target;
  T* a;
  T* b;
  Tiles(void* scratch, int64_t classes)
      : x(static_cast<T*>(scratch)),
        target(x + Rows<scalar_t>::tile_size(classes)),
        a(target + Rows<scalar_t>::tile_size(classes)),
        b(a + Rows<scalar_t>::tile_size(classes)) {}
};

// Calls f(rows, tile of target probabilities or null) for tiles of [begin, end).
template <class scalar_t, class F>
void for_each_tile(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                   const Tiles<scalar_t>& tiles, const F& f) {
  Rows<scalar_t> rows(args, tiles.x);
  for (int64_t row = begin; row < end; row += Rows<scalar_t>::lanes) {
    rows.load(row, end);
    if (args.probabilities != nullptr) rows.read(args.probabilities, tiles.target);
    f(rows, args.probabilities != nullptr ? tiles.target : nullptr);
  }
}

// The gradient for rows with one class each: weight * phi' * (onehot - p). Returns the losses.
template <class scalar_t>
typename Rows<scalar_t>::V one_class_gradient(const Rows<scalar_t>& rows, RowFactor<scalar_t> grad,
                                              at::opmath_type<scalar_t>* result) {
  using R = Rows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  const auto softmax = softmax_of(rows, result);
  const V target = rows.target();
  const SoftmaxFocal<M> focal = softmax.focal(target_logit(rows));
  const V weight = V::loadu(rows.target_weight), factor = upstream(rows, grad);
  const V slope = weighted<M>(shares(rows, grad) * weight, focal.first());
  const V minus_slope = (V(0) - slope) * softmax.inverse;
  for (int64_t c = 0; c < rows.args.classes; ++c) {
    const V e = V::loadu(result + c * R::lanes);
    const auto is_target = M::eq(target, V(typename R::T(c)));
    const V gradient = M::select(is_target, slope * focal.not_p, minus_slope * e);
    (gradient * factor).store(result + c * R::lanes);
  }
  return M::select(rows.valid(), weighted_loss<M>(weight, focal.loss()), V(0));
}

// The gradient for any target: g_c - p_c sum(g), g_c = weight_c share_c phi'_c. Returns the losses
// if they are wanted.
template <bool with_loss, class scalar_t>
typename Rows<scalar_t>::V general_gradient(const Rows<scalar_t>& rows,
                                            const at::opmath_type<scalar_t>* target,
                                            RowFactor<scalar_t> grad,
                                            at::opmath_type<scalar_t>* result) {
  using R = Rows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  const auto softmax = softmax_of(rows);
  const V part = shares(rows, grad), factor = upstream(rows, grad);
  const auto sums = sums_over<M, with_loss ? 2 : 1>(rows.args.classes, [&](int64_t c) {
    const V share = rows.weight(c) * rows.share(c, target);
    const SoftmaxFocal<M> focal = softmax.focal(rows.logit(c));
    const V slope = weighted<M>(part * share, focal.first());
    slope.store(result + c * R::lanes);
    if constexpr (with_loss) {
      return std::array{slope, weighted_loss<M>(share, focal.loss())};
    } else {
      return std::array{slope};
    }
  });
  for (int64_t c = 0; c < rows.args.classes; ++c) {
    const V gradient = V::loadu(result + c * R::lanes) - softmax.p(rows.logit(c)) * sums[0];
    (gradient * factor).store(result + c * R::lanes);
  }
  return M::select(rows.valid(), sums.back(), V(0));
}

// Either; returns the losses if they are wanted.
template <bool with_loss, class scalar_t>
typename Rows<scalar_t>::V gradient(const Rows<scalar_t>& rows,
                                    const at::opmath_type<scalar_t>* target,
                                    RowFactor<scalar_t> grad, at::opmath_type<scalar_t>* result) {
  if (rows.one_class_each()) return one_class_gradient(rows, grad, result);
  return general_gradient<with_loss>(rows, target, grad, result);
}

// A tangent of the logits relative to its mean under the softmax, v_c - p.v, and the same divided
// by 1 - p_c: both without cancellation where one class has nearly all of the probability.
template <class scalar_t>
struct Centred {
  using R = Rows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  const typename R::T* tangent;  // a tile, or null for zero
  V at_max, max_minus_mean;

  Centred(const R& rows, const Softmax<M>& softmax, const typename R::T* tangent)
      : tangent(tangent), at_max(0), max_minus_mean(0) {
    if (tangent == nullptr) return;
    const int64_t classes = rows.args.classes;
    for (int64_t c = 0; c < classes; ++c)
      at_max = M::select(M::eq(rows.logit(c), softmax.max), raw(c), at_max);
    max_minus_mean = sum_over<M>(
        classes, [&](int64_t c) { return softmax.p(rows.logit(c)) * (at_max - raw(c)); });
  }
  V raw(int64_t c) const { return V::loadu(tangent + c * R::lanes); }
  V value(int64_t c) const {
    return tangent == nullptr ? V(0) : (raw(c) - at_max) + max_minus_mean;
  }
  V over_complement(int64_t c, V not_p) const {
    const V safe = M::select(M::eq(not_p, V(0)), V(1), not_p);
    return M::select(M::eq(not_p, V(0)), V(0), value(c) / safe);
  }
};

}  // namespace

template <int capability, class scalar_t>
int64_t focal_loss_scratch(int64_t classes) {
  return Tiles<scalar_t>::kCount * Rows<scalar_t>::tile_size(classes) *
         static_cast<int64_t>(sizeof(at::opmath_type<scalar_t>));
}

template <int capability, class scalar_t>
double focal_loss_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end, scalar_t* loss,
                       void* scratch) {
  const Tiles<scalar_t> tiles(scratch, args.classes);
  double sum = 0;
  for_each_tile(args, begin, end, tiles, [&](const auto& rows, const auto* target) {
    sum += finish(rows, row_losses(rows, target), loss);
  });
  return sum;
}

template <int capability, class scalar_t>
double focal_loss_and_grad_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                                double share, scalar_t* loss, scalar_t* grad_input, void* scratch) {
  const Tiles<scalar_t> tiles(scratch, args.classes);
  const RowFactor<scalar_t> grad{share, nullptr, 1};
  double sum = 0;
  for_each_tile(args, begin, end, tiles, [&](const auto& rows, const auto* target) {
    sum += finish(rows, gradient<true>(rows, target, grad, tiles.a), loss);
    rows.write(tiles.a, grad_input);
  });
  return sum;
}

template <int capability, class scalar_t>
void focal_loss_vjp_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                         RowFactor<scalar_t> grad, scalar_t* grad_input, scalar_t* grad_target,
                         void* scratch) {
  using R = Rows<scalar_t>;
  using V = typename R::V;
  const Tiles<scalar_t> tiles(scratch, args.classes);
  for_each_tile(args, begin, end, tiles, [&](const R& rows, const typename R::T* target) {
    if (grad_input != nullptr) {
      gradient<false>(rows, target, grad, tiles.a);
      rows.write(tiles.a, grad_input);
    }
    if (grad_target == nullptr) return;
    const auto softmax = softmax_of(rows);
    const V factor = shares(rows, grad) * upstream(rows, grad);
    const V kept(static_cast<typename R::T>(1 - args.label_smoothing));
    for (int64_t c = 0; c < args.classes; ++c)
      (factor * kept * rows.weight(c) * softmax.focal(rows.logit(c)).loss())
          .store(tiles.a + c * R::lanes);
    rows.write(tiles.a, grad_target);
  });
}

template <int capability, class scalar_t>
double focal_loss_jvp_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                           const scalar_t* tangent_input, const scalar_t* tangent_target,
                           scalar_t* tangent, void* scratch) {
  using R = Rows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  const Tiles<scalar_t> tiles(scratch, args.classes);
  double sum = 0;
  for_each_tile(args, begin, end, tiles, [&](const R& rows, const typename R::T* target) {
    if (tangent_input != nullptr) rows.read(tangent_input, tiles.a);
    if (tangent_target != nullptr) rows.read(tangent_target, tiles.b);
    const auto softmax = softmax_of(rows);
    const Centred<scalar_t> centred(rows, softmax, tangent_input == nullptr ? nullptr : tiles.a);
    const V kept(static_cast<typename R::T>(1 - args.label_smoothing));
    Sum<M> result;
    for (int64_t c = 0; c < args.classes; ++c) {
      const SoftmaxFocal<M> focal = softmax.focal(rows.logit(c));
      result.add(weighted<M>(rows.weight(c) * rows.share(c, target), focal.first()) *
                 centred.value(c));
      if (tangent_target != nullptr)
        result.add(kept * rows.weight(c) * focal.loss() * V::loadu(tiles.b + c * R::lanes));
    }
    sum += finish(rows, M::select(rows.valid(), result.total, V(0)), tangent);
  });
  return sum;
}

template <int capability, class scalar_t>
void focal_loss_hvp_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                         RowFactor<scalar_t> grad, const scalar_t* tangent_input,
                         const scalar_t* tangent_target, scalar_t* grad_input,
                         scalar_t* grad_target, void* scratch) {
  using R = Rows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  const Tiles<scalar_t> tiles(scratch, args.classes);
  for_each_tile(args, begin, end, tiles, [&](const R& rows, const typename R::T* target) {
    if (tangent_input != nullptr) rows.read(tangent_input, tiles.a);
    if (tangent_target != nullptr) rows.read(tangent_target, tiles.b);
    const auto softmax = softmax_of(rows);
    const Centred<scalar_t> centred(rows, softmax, tangent_input == nullptr ? nullptr : tiles.a);
    const V kept(static_cast<typename R::T>(1 - args.label_smoothing));
    const V factor = shares(rows, grad) * upstream(rows, grad);
    // The derivative of g_c - p_c sum(g) along the tangents: dg_c - p_c sum(dg) - dp_c sum(g).
    Sum<M> slopes, changes;
    for (int64_t c = 0; c < args.classes; ++c) {
      const SoftmaxFocal<M> focal = softmax.focal(rows.logit(c));
      const V share = rows.weight(c) * rows.share(c, target);
      V change =
          weighted<M>(share, focal.second_times_not_p()) * centred.over_complement(c, focal.not_p);
      if (tangent_target != nullptr)
        change = change + kept * rows.weight(c) * focal.first() * V::loadu(tiles.b + c * R::lanes);
      slopes.add(weighted<M>(share, focal.first()));
      changes.add(change);
      change.store(tiles.b + c * R::lanes);
    }
    if (grad_target != nullptr) {
      for (int64_t c = 0; c < args.classes; ++c)
        (factor * kept * rows.weight(c) * softmax.focal(rows.logit(c)).first() * centred.value(c))
            .store(tiles.target + c * R::lanes);
      rows.write(tiles.target, grad_target);
    }
    if (grad_input == nullptr) return;
    for (int64_t c = 0; c < args.classes; ++c) {
      const V p = softmax.p(rows.logit(c));
      const V change = V::loadu(tiles.b + c * R::lanes);
      (factor * (change - p * changes.total - slopes.total * p * centred.value(c)))
          .store(tiles.b + c * R::lanes);
    }
    rows.write(tiles.b, grad_input);
  });
}

#define DLOPS_INSTANTIATE(scalar_t)                                                                \
  template int64_t focal_loss_scratch<DLOPS_CAPABILITY, scalar_t>(int64_t);                        \
  template double focal_loss_rows<DLOPS_CAPABILITY, scalar_t>(const FocalArgs<scalar_t>&, int64_t, \
                                                              int64_t, scalar_t*, void*);          \
  template double focal_loss_and_grad_rows<DLOPS_CAPABILITY, scalar_t>(                            \
      const FocalArgs<scalar_t>&, int64_t, int64_t, double, scalar_t*, scalar_t*, void*);          \
  template void focal_loss_vjp_rows<DLOPS_CAPABILITY, scalar_t>(                                   \
      const FocalArgs<scalar_t>&, int64_t, int64_t, RowFactor<scalar_t>, scalar_t*, scalar_t*,     \
      void*);                                                                                      \
  template double focal_loss_jvp_rows<DLOPS_CAPABILITY, scalar_t>(                                 \
      const FocalArgs<scalar_t>&, int64_t, int64_t, const scalar_t*, const scalar_t*, scalar_t*,   \
      void*);                                                                                      \
  template void focal_loss_hvp_rows<DLOPS_CAPABILITY, scalar_t>(                                   \
      const FocalArgs<scalar_t>&, int64_t, int64_t, RowFactor<scalar_t>, const scalar_t*,          \
      const scalar_t*, scalar_t*, scalar_t*, void*);

DLOPS_INSTANTIATE(double)
DLOPS_INSTANTIATE(float)
DLOPS_INSTANTIATE(c10::BFloat16)
DLOPS_INSTANTIATE(c10::Half)

}  // namespace dlops::cpu
