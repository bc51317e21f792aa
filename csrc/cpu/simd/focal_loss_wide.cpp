#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <iterator>
#include <limits>

#include "cpu/simd/focal_loss.h"
#include "cpu/simd/focal_softmax.h"
#include "cpu/simd/load_store.h"

// A vector's lanes are neighbouring classes of one row, which is read where it is. What follows
// from a row's sums alone (logarithms, the loss, the slope) is then worked out for several rows at
// once, one in each lane. Every sum has one order, whatever the row's neighbours are.
namespace dlops::cpu {
namespace {

// Some rows at work, at most one for each lane of a vector.
template <class scalar_t>
struct WideRows {
  using T = at::opmath_type<scalar_t>;
  using M = VecMath<T>;
  using V = typename M::V;
  static constexpr int64_t lanes = V::size();

  const FocalArgs<scalar_t>& args;
  const int64_t classes;
  int64_t first = 0, count = 0;
  V max{0}, others{0};  // what Softmax is made from

  explicit WideRows(const FocalArgs<scalar_t>& args) : args(args), classes(args.classes) {}
  // How many of them stay in the first-level cache.
  int64_t group() const { return std::clamp<int64_t>(8192 / classes, 1, lanes); }

  const scalar_t* row(const scalar_t* tensor, int64_t i) const {
    return tensor + (first + i) * classes;
  }
  scalar_t* row(scalar_t* tensor, int64_t i) const { return tensor + (first + i) * classes; }
  const scalar_t* logits(int64_t i) const { return row(args.input, i); }

  int64_t target(int64_t i) const { return args.target[first + i]; }
  bool valid(int64_t i) const { return args.target == nullptr || target(i) != args.ignore_index; }
  // The factors of a row's gradient; 0 where it is ignored.
  T share(RowFactor<scalar_t> grad, int64_t i) const {
    return valid(i) ? static_cast<T>(grad.share) : T(0);
  }
  T upstream(RowFactor<scalar_t> grad, int64_t i) const {
    return valid(i) ? static_cast<T>(grad.upstream(first + i)) : T(0);
  }
  V weight(int64_t c, int64_t some) const {
    return args.weight == nullptr ? V(T(1)) : load<T>(args.weight + c, some);
  }
  bool one_class_each() const { return args.target != nullptr && args.label_smoothing == 0; }
  Softmax<M> softmax() const { return {max, others, args.gamma}; }
};

// `values` in the first lanes, `rest` in the others.
template <class V>
V first_lanes(V values, int64_t some, V rest) {
  return some >= V::size() ? values : V::set(rest, values, some);
}

// f(chain, c, how many) for vectors of classes, in chains that the processor runs side by side.
template <class V, int chains, class F>
C10_ALWAYS_INLINE void for_each_in_chains(int64_t begin, int64_t end, const F& f) {
  constexpr int64_t lanes = V::size();
  int64_t c = begin;
  if constexpr (chains > 1)
    for (; c + chains * lanes <= end; c += chains * lanes)
      for (int64_t i = 0; i < chains; ++i) f(i, c + i * lanes, lanes);
  for (; c + lanes <= end; c += lanes) f(0, c, lanes);
  if (c < end) f(0, c, end - c);
}

// f(c, how many) likewise, in order.
template <class V, class F>
void for_each_vector(int64_t classes, const F& f) {
  for_each_in_chains<V, 1>(0, classes, [&](int64_t, int64_t c, int64_t some) { f(c, some); });
}

template <class M, int chains, class scalar_t>
C10_ALWAYS_INLINE typename M::V largest(const scalar_t* x, int64_t classes) {
  using V = typename M::V;
  using T = typename M::Scalar;
  const V none(-std::numeric_limits<T>::infinity());
  V max[chains];
  std::fill_n(max, chains, none);
  for_each_in_chains<V, chains>(0, classes, [&](int64_t chain, int64_t c, int64_t some) {
    max[chain] = M::max(max[chain], first_lanes(load<T>(x + c, some), some, none));
  });
  for (int i = 1; i < chains; ++i) max[0] = M::max(max[0], max[i]);
  return max[0];
}

// A row's exponentials of x - max, but for those of the largest logits, and how many these are.
template <class M>
struct Exponentials {
  using V = typename M::V;
  V sum{0}, ties{0};
  void add(V e, V logit, V max) {
    const auto tie = M::eq(logit, max);
    sum = sum + M::select(tie, V(0), e);
    ties = M::select(tie, ties + V(1), ties);
  }
  void add(const Exponentials& other) {
    sum = sum + other.sum;
    ties = ties + other.ties;
  }
};

// With `exps`, exp(x - max) is kept there. What lies `ahead` of both is fetched meanwhile.
template <class M, int chains, bool keep, class scalar_t>
C10_ALWAYS_INLINE Exponentials<M> add_up(const scalar_t* x, int64_t classes, typename M::V max,
                                         scalar_t* exps, int64_t ahead) {
  using V = typename M::V;
  using T = typename M::Scalar;
  constexpr int64_t kPart = 1024 * V::size();  // a part's sum has few roundings
  const V none(-std::numeric_limits<T>::infinity());
  Exponentials<M> all;
  for (int64_t begin = 0; begin < classes; begin += kPart) {
    Exponentials<M> part[chains];
    for_each_in_chains<V, chains>(begin, std::min(classes, begin + kPart),
                                  [&](int64_t chain, int64_t c, int64_t some) {
                                    const V logit = first_lanes(load<T>(x + c, some), some, none);
                                    __builtin_prefetch(x + c + ahead);
                                    if constexpr (keep) __builtin_prefetch(exps + c + ahead, 1);
                                    const V e = M::exp(logit - max);
                                    if constexpr (keep) store(e, exps + c, some);
                                    part[chain].add(e, logit, max);
                                  });
    for (const Exponentials<M>& chain : part) all.add(chain);
  }
  return all;
}

// A vector for each row; then all of a row's lanes are combined, and the results stand side by
// side.
template <class M>
struct PerRow {
  using V = typename M::V;
  using T = typename M::Scalar;
  static constexpr int64_t lanes = V::size();
  T values[lanes * lanes];

  explicit PerRow(int64_t rows) { std::fill(values + rows * lanes, std::end(values), T(0)); }
  void set(int64_t i, V of_row) { of_row.store(values + i * lanes); }
  template <class F>
  V combined(const F& f) const {
    T turned[lanes * lanes];
    at::vec::transpose_mxn<T>(values, lanes, turned, lanes, lanes, lanes);
    V result = V::loadu(turned);
    for (int64_t l = 1; l < lanes; ++l) result = f(result, V::loadu(turned + l * lanes));
    return result;
  }
  V sum() const {
    return combined([](V a, V b) { return a + b; });
  }
  V largest() const {
    return combined([](V a, V b) { return M::max(a, b); });
  }
};

// The softmax of the rows at work. With `exps`, exp(x - max) is kept in rows there.
template <bool keep, int chains, class scalar_t>
void add_up_rows(WideRows<scalar_t>& rows, scalar_t* exps) {
  using R = WideRows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  using T = typename R::T;
  const int64_t count = std::min(rows.count, R::lanes);
  PerRow<M> max(count), sum(count), ties(count);
  for (int64_t i = 0; i < count; ++i) max.set(i, largest<M, chains>(rows.logits(i), rows.classes));
  rows.max = max.largest();
  T each[R::lanes];
  rows.max.store(each);
  for (int64_t i = 0; i < count; ++i) {
    const auto found =
        add_up<M, chains, keep>(rows.logits(i), rows.classes, V(each[i]),
                                keep ? rows.row(exps, i) : nullptr, rows.group() * rows.classes);
    sum.set(i, found.sum);
    ties.set(i, found.ties);
  }
  // The difference of a largest logit is 0, or NaN where the row has no softmax.
  rows.others = sum.sum() + (ties.sum() - V(T(1))) + (rows.max - rows.max);
}

template <bool keep, class scalar_t>
void add_up_rows(WideRows<scalar_t>& rows, scalar_t* exps) {
  // Chains are worth it where each gets a few vectors.
  if (rows.classes >= 8 * rows.lanes) {
    add_up_rows<keep, 4>(rows, exps);
  } else {
    add_up_rows<keep, 1>(rows, exps);
  }
}

// Calls f(rows) for a few rows at a time.
template <class scalar_t, class F>
void for_each_group(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end, const F& f) {
  WideRows<scalar_t> rows(args);
  for (rows.first = begin; rows.first < end; rows.first += rows.group()) {
    rows.count = std::min(rows.group(), end - rows.first);
    f(rows);
  }
}

// ------------------------------------------------------------------- rows with one class each

// The logit and the weight of each row's class.
template <class scalar_t>
struct Targets {
  using R = WideRows<scalar_t>;
  using V = typename R::V;
  using T = typename R::T;
  T logit[R::lanes] = {}, weight[R::lanes] = {};  // 0 for ignored rows

  explicit Targets(const R& rows) {
    for (int64_t i = 0; i < rows.count; ++i) {
      if (!rows.valid(i)) continue;
      logit[i] = static_cast<T>(rows.logits(i)[rows.target(i)]);
      weight[i] = rows.args.weight == nullptr ? T(1) : rows.args.weight[rows.target(i)];
    }
  }
  V logits() const { return V::loadu(logit); }
  V weights() const { return V::loadu(weight); }
};

template <class scalar_t>
void one_class_losses(WideRows<scalar_t>& rows, at::opmath_type<scalar_t>* losses) {
  using M = typename WideRows<scalar_t>::M;
  add_up_rows<false>(rows, static_cast<scalar_t*>(nullptr));
  const Targets<scalar_t> targets(rows);
  const auto focal = rows.softmax().focal(targets.logits());
  weighted_loss<M>(targets.weights(), focal.loss()).store(losses);
}

// weight * phi' * (onehot - p), and the losses.
template <class scalar_t>
void one_class_gradients(WideRows<scalar_t>& rows, RowFactor<scalar_t> grad, scalar_t* to,
                         at::opmath_type<scalar_t>* losses) {
  using R = WideRows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  using T = typename R::T;
  // The exponentials wait in the result, where it can hold them.
  constexpr bool keep = std::is_same_v<scalar_t, T>;
  add_up_rows<keep>(rows, to);
  const Targets<scalar_t> targets(rows);
  T share[R::lanes] = {}, minus_slope[R::lanes], at_target[R::lanes], max[R::lanes];
  for (int64_t i = 0; i < rows.count; ++i) share[i] = rows.share(grad, i);
  const auto softmax = rows.softmax();
  const auto focal = softmax.focal(targets.logits());
  weighted_loss<M>(targets.weights(), focal.loss()).store(losses);
  const V slope = weighted<M>(V::loadu(share) * targets.weights(), focal.first());
  ((V(T(0)) - slope) * softmax.inverse).store(minus_slope);
  (slope * focal.not_p).store(at_target);
  softmax.max.store(max);
  for (int64_t i = 0; i < rows.count; ++i) {
    const scalar_t* x = rows.logits(i);
    scalar_t* result = rows.row(to, i);
    const T upstream = rows.upstream(grad, i);
    const V scale(minus_slope[i]), factor(upstream), largest(max[i]);
    for_each_vector<V>(rows.classes, [&](int64_t c, int64_t some) {
      const V e = keep ? load<T>(result + c, some) : M::exp(load<T>(x + c, some) - largest);
      store(scale * e * factor, result + c, some);
    });
    if (rows.valid(i)) result[rows.target(i)] = static_cast<scalar_t>(at_target[i] * upstream);
  }
}

// ---------------------------------------------------------------------------------- any target

// One row and its softmax, the same in every lane.
template <class scalar_t>
struct WideRow {
  using R = WideRows<scalar_t>;
  using M = typename R::M;
  using V = typename R::V;
  using T = typename R::T;
  const R& rows;
  const scalar_t* x;
  const scalar_t* probabilities;  // or null: then a class
  T target;
  Smoothing<T> smoothing;
  Softmax<M> softmax;

  WideRow(const R& rows, int64_t i, T max, T others)
      : rows(rows),
        x(rows.logits(i)),
        probabilities(rows.args.probabilities == nullptr ? nullptr
                                                         : rows.row(rows.args.probabilities, i)),
        target(rows.args.target == nullptr ? T(-1) : static_cast<T>(rows.target(i))),
        smoothing(rows.args.label_smoothing, rows.classes),
        softmax(V(max), V(others), rows.args.gamma) {}

  V logits(int64_t c, int64_t some) const { return load<T>(x + c, some); }
  // What stands before a class's loss: its weight times its share in the smoothed target.
  V shares(int64_t c, int64_t some) const {
    const V kept(smoothing.kept), spread(smoothing.spread);
    if (probabilities != nullptr)
      return rows.weight(c, some) * (kept * load<T>(probabilities + c, some) + spread);
    const auto is_target = M::eq(V::arange(static_cast<T>(c), T(1)), V(target));
    return rows.weight(c, some) *
           M::select(is_target, V(smoothing.kept + smoothing.spread), spread);
  }
  V losses(int64_t c, int64_t some) const {
    return weighted_loss<M>(shares(c, some), softmax.focal(logits(c, some)).loss());
  }
  // The sum of f(c, how many) over the classes.
  template <class F>
  T sum(const F& f) const {
    Sum<M> sum;
    for_each_vector<V>(rows.classes, [&](int64_t c, int64_t some) {
      sum.add(first_lanes(f(c, some), some, V(T(0))));
    });
    return added_up(sum);
  }
  static T added_up(const Sum<M>& sum) {
    return at::vec::vec_reduce_all<T>([](V a, V b) { return a + b; }, sum.total);
  }
  // g_c - p_c sum(g) of the slopes g_c = weight_c share_c phi'_c. Returns the loss if it is wanted.
  template <bool with_loss>
  T gradient(T share, T upstream, scalar_t* to) const {
    // The slopes wait in the result, where it can hold them.
    constexpr bool keep = std::is_same_v<scalar_t, T>;
    const V none(T(0));
    Sum<M> total, loss;
    for_each_vector<V>(rows.classes, [&](int64_t c, int64_t some) {
      const auto focal = softmax.focal(logits(c, some));
      const V shares = this->shares(c, some), slope = weighted<M>(V(share) * shares, focal.first());
      if constexpr (keep) store(slope, to + c, some);
      total.add(first_lanes(slope, some, none));
      if constexpr (with_loss)
        loss.add(first_lanes(weighted_loss<M>(shares, focal.loss()), some, none));
    });
    const V all(added_up(total));
    for_each_vector<V>(rows.classes, [&](int64_t c, int64_t some) {
      V slope;
      if constexpr (keep) {
        slope = load<T>(to + c, some);
      } else {
        slope = weighted<M>(V(share) * shares(c, some), softmax.focal(logits(c, some)).first());
      }
      store((slope - softmax.p(logits(c, some)) * all) * V(upstream), to + c, some);
    });
    return with_loss ? added_up(loss) : T(0);
  }
  // Of a target that is probabilities: weight_c phi_c.
  void target_gradient(T factor, scalar_t* to) const {
    const V kept = V(factor) * V(smoothing.kept);
    for_each_vector<V>(rows.classes, [&](int64_t c, int64_t some) {
      store(kept * rows.weight(c, some) * softmax.focal(logits(c, some)).loss(), to + c, some);
    });
  }
};

// Calls f(row number, row) for the rows at work.
template <class scalar_t, class F>
void for_each_row(WideRows<scalar_t>& rows, const F& f) {
  using R = WideRows<scalar_t>;
  typename R::T max[R::lanes], others[R::lanes];
  add_up_rows<false>(rows, static_cast<scalar_t*>(nullptr));
  rows.max.store(max);
  rows.others.store(others);
  for (int64_t i = 0; i < rows.count; ++i) f(i, WideRow<scalar_t>(rows, i, max[i], others[i]));
}

// Stores a value per row where it is wanted, 0 for ignored rows, and returns their sum.
template <class scalar_t>
double finish(const WideRows<scalar_t>& rows, const at::opmath_type<scalar_t>* values,
              scalar_t* to) {
  double sum = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    const auto value = rows.valid(i) ? values[i] : 0;
    sum += static_cast<double>(value);
    if (to != nullptr) to[rows.first + i] = static_cast<scalar_t>(value);
  }
  return sum;
}

}  // namespace

template <int capability, class scalar_t>
double focal_loss_wide_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                            scalar_t* loss) {
  using T = at::opmath_type<scalar_t>;
  double sum = 0;
  for_each_group(args, begin, end, [&](WideRows<scalar_t>& rows) {
    T losses[WideRows<scalar_t>::lanes];
    if (rows.one_class_each()) {
      one_class_losses(rows, losses);
    } else {
      for_each_row(rows, [&](int64_t i, const WideRow<scalar_t>& row) {
        losses[i] = rows.valid(i)
                        ? row.sum([&](int64_t c, int64_t some) { return row.losses(c, some); })
                        : T(0);
      });
    }
    sum += finish(rows, losses, loss);
  });
  return sum;
}

template <int capability, class scalar_t>
double focal_loss_and_grad_wide_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                                     double share, scalar_t* loss, scalar_t* grad_input) {
  using T = at::opmath_type<scalar_t>;
  const RowFactor<scalar_t> grad{share, nullptr, 1};
  double sum = 0;
  for_each_group(args, begin, end, [&](WideRows<scalar_t>& rows) {
    T losses[WideRows<scalar_t>::lanes];
    if (rows.one_class_each()) {
      one_class_gradients(rows, grad, grad_input, losses);
    } else {
      for_each_row(rows, [&](int64_t i, const WideRow<scalar_t>& row) {
        losses[i] = row.template gradient<true>(rows.share(grad, i), rows.upstream(grad, i),
                                                rows.row(grad_input, i));
      });
    }
    sum += finish(rows, losses, loss);
  });
  return sum;
}

template <int capability, class scalar_t>
void focal_loss_vjp_wide_rows(const FocalArgs<scalar_t>& args, int64_t begin, int64_t end,
                              RowFactor<scalar_t> grad, scalar_t* grad_input,
                              scalar_t* grad_target) {
  for_each_group(args, begin, end, [&](WideRows<scalar_t>& rows) {
    if (rows.one_class_each()) {
      at::opmath_type<scalar_t> losses[WideRows<scalar_t>::lanes];
      if (grad_input != nullptr) one_class_gradients(rows, grad, grad_input, losses);
      return;
    }
    for_each_row(rows, [&](int64_t i, const WideRow<scalar_t>& row) {
      const auto share = rows.share(grad, i), upstream = rows.upstream(grad, i);
      if (grad_input != nullptr)
        row.template gradient<false>(share, upstream, rows.row(grad_input, i));
      if (grad_target != nullptr) row.target_gradient(share * upstream, rows.row(grad_target, i));
    });
  });
}

#define DLOPS_INSTANTIATE(scalar_t)                                                              \
  template double focal_loss_wide_rows<DLOPS_CAPABILITY, scalar_t>(const FocalArgs<scalar_t>&,   \
                                                                   int64_t, int64_t, scalar_t*); \
  template double focal_loss_and_grad_wide_rows<DLOPS_CAPABILITY, scalar_t>(                     \
      const FocalArgs<scalar_t>&, int64_t, int64_t, double, scalar_t*, scalar_t*);               \
  template void focal_loss_vjp_wide_rows<DLOPS_CAPABILITY, scalar_t>(                            \
      const FocalArgs<scalar_t>&, int64_t, int64_t, RowFactor<scalar_t>, scalar_t*, scalar_t*);

DLOPS_INSTANTIATE(double)
DLOPS_INSTANTIATE(float)
DLOPS_INSTANTIATE(c10::BFloat16)
DLOPS_INSTANTIATE(c10::Half)

}  // namespace dlops::cpu
