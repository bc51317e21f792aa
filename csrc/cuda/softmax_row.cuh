// One row of the softmax focal loss, shared out among the members of a team (rows.cuh): its
// softmax, its target, and sums over its classes. Free of torch's tensors, host and device.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>
#include <cstdio>

#include "common/host_device.h"
#include "focal_loss_math.h"

namespace dlops::cuda {

// The op's arguments. The input is (N, classes, inner); row n * inner + i holds the logits (n, c,
// i).
template <class scalar_t>
struct FocalArgs {
  using T = at::opmath_type<scalar_t>;
  const scalar_t* input;
  const int64_t* labels;          // a class for each row, or null
  const scalar_t* probabilities;  // like input, or null
  const scalar_t* weight;         // for each class, or null
  int64_t classes, inner;
  int64_t ignore_index;
  T gamma;
  T kept, spread;  // a class's share of the target is kept * share + spread: label smoothing

  DLOPS_HOST_DEVICE int64_t offset(int64_t row, int64_t c) const {
    return (row / inner * classes + c) * inner + row % inner;
  }
  DLOPS_HOST_DEVICE T class_weight(int64_t c) const {
    return weight == nullptr ? T(1) : static_cast<T>(weight[c]);
  }
  DLOPS_HOST_DEVICE bool is_class(int64_t label) const { return 0 <= label && label < classes; }
};

// A row's largest logit: the first of equal ones, whatever the order of the members. A NaN stays
// where it comes first, and else makes itself felt in the sum of exponentials.
template <class T>
struct RowMax {
  T max;
  int64_t argmax;  // -1: no class yet
};

struct Larger {
  template <class T>
  DLOPS_HOST_DEVICE RowMax<T> operator()(RowMax<T> a, RowMax<T> b) const {
    if (a.argmax < 0) return b;
    if (b.argmax < 0) return a;
    return b.max > a.max || (b.max == a.max && b.argmax < a.argmax) ? b : a;
  }
};

struct Plus {
  template <class T>
  DLOPS_HOST_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

// A value times a factor that may be 0: then 0, even where the value is infinite.
template <class T>
DLOPS_HOST_DEVICE T weighted(T factor, T value) {
  return factor == 0 ? T(0) : factor * value;
}
// The same for a loss, but where it is NaN.
template <class T>
DLOPS_HOST_DEVICE T weighted_loss(T factor, T loss) {
  return loss == loss ? weighted(factor, loss) : loss;
}

template <class scalar_t, class Team>
struct Row {
  using T = at::opmath_type<scalar_t>;
  using Focal = SoftmaxFocal<ScalarMath<T>>;
  const FocalArgs<scalar_t>& args;
  const Team& team;
  int64_t row;
  int64_t label;  // -1 where the target holds probabilities
  bool ignored;
  T max, log_sum, inverse, complement;  // log(1 + others), p of argmax, and 1 - that
  int64_t argmax;

  DLOPS_HOST_DEVICE Row(const FocalArgs<scalar_t>& args, int64_t row, const Team& team)
      : args(args), team(team), row(row), label(-1), ignored(false) {
    if (args.labels != nullptr) {
      label = args.labels[row];
      ignored = label == args.ignore_index;
      if (!ignored && !args.is_class(label)) refuse_label();
    }
    if (!ignored) find_softmax();
  }

  // --------------------------------------------------------------------------------- elements

  DLOPS_HOST_DEVICE bool is_first_member() const { return team.rank() == 0; }
  // Class c's element of a tensor like the input.
  DLOPS_HOST_DEVICE T at(const scalar_t* tensor, int64_t c) const {
    return static_cast<T>(tensor[args.offset(row, c)]);
  }
  DLOPS_HOST_DEVICE void set(scalar_t* tensor, int64_t c, T value) const {
    tensor[args.offset(row, c)] = static_cast<scalar_t>(value);
  }
  // Calls f(c) for this member's classes.
  template <class F>
  DLOPS_HOST_DEVICE void for_each_class(const F& f) const {
    for (int64_t c = team.rank(); c < args.classes; c += Team::size) f(c);
  }
  // f(0) + ... + f(classes - 1), known to every member; so all of them must take part. In double:
  // one thread may add up thousands of terms.
  template <class F>
  DLOPS_HOST_DEVICE T sum(const F& f) const {
    double total = 0;
    for_each_class([&](int64_t c) { total += static_cast<double>(f(c)); });
    return static_cast<T>(team.reduce(total, Plus()));
  }

  // ----------------------------------------------------------------------------------- target

  // Whether the target names one class and gives the others nothing.
  DLOPS_HOST_DEVICE bool has_one_class() const {
    return args.labels != nullptr && args.spread == 0;
  }
  DLOPS_HOST_DEVICE bool has_share(int64_t c) const { return !has_one_class() || c == label; }
  // The class's share in the smoothed target, times its weight.
  DLOPS_HOST_DEVICE T share(int64_t c) const {
    const T own = args.labels != nullptr ? T(c == label) : at(args.probabilities, c);
    return args.class_weight(c) * (args.kept * own + args.spread);
  }
  // The sum of f over the classes that have a share.
  template <class F>
  DLOPS_HOST_DEVICE T sum_of_shares(const F& f) const {
    return has_one_class() ? f(label) : sum(f);
  }
  // A member that finds a bad label says so and stops the kernel, as the native loss does; the
  // others treat the row as ignored.
  DLOPS_HOST_DEVICE void refuse_label() {
#if defined(__CUDA_ARCH__)
    if (is_first_member()) {
      printf("dlops focal_loss: target %lld at position %lld is out of bounds for %lld classes\n",
             static_cast<long long>(label), static_cast<long long>(row),
             static_cast<long long>(args.classes));
      CUDA_KERNEL_ASSERT(false && "dlops focal_loss: target is out of bounds");
    }
#endif
    ignored = true;
  }

  // ---------------------------------------------------------------------------------- softmax

  DLOPS_HOST_DEVICE void find_softmax() {
    // Two passes, the second out of the cache: rescaling the sum whenever a larger logit comes
    // costs more instructions an element than memory leaves time for.
    RowMax<T> found{T(0), -1};
    for_each_class([&](int64_t c) { found = Larger()(found, RowMax<T>{at(args.input, c), c}); });
    found = team.reduce(found, Larger());
    max = found.max;
    argmax = found.argmax;
    // Leaving out the largest keeps every digit of a probability near 1 and of its complement. NaN
    // where the row has no softmax: its largest logit is infinite or NaN.
    const T others = sum([&](int64_t c) {
                       return c == argmax ? T(0) : ScalarMath<T>::exp(at(args.input, c) - max);
                     }) +
                     (max - max);
    log_sum = ScalarMath<T>::log1p(others);
    inverse = 1 / (1 + others);
    complement = others * inverse;
  }
  DLOPS_HOST_DEVICE T p(int64_t c) const {
    return c == argmax ? inverse : ScalarMath<T>::exp(at(args.input, c) - max) * inverse;
  }
  DLOPS_HOST_DEVICE T not_p(int64_t c) const { return c == argmax ? complement : 1 - p(c); }
  // phi and its derivatives for class c.
  DLOPS_HOST_DEVICE Focal focal(int64_t c) const {
    const T log_p = c == argmax ? -log_sum : (at(args.input, c) - max) - log_sum;
    const T not_p = c == argmax ? complement : 1 - ScalarMath<T>::exp(log_p);
    return Focal(log_p, not_p, args.gamma);
  }
  // The derivative of the loss with respect to log p of class c.
  DLOPS_HOST_DEVICE T slope(int64_t c) const { return weighted(share(c), focal(c).first()); }
};

// A tangent of the logits relative to its mean under the softmax, v_c - p.v, and the same divided
// by 1 - p_c: both without cancellation where one class has nearly all of the probability.
template <class scalar_t, class Team>
struct Centred {
  using T = at::opmath_type<scalar_t>;
  const Row<scalar_t, Team>& row;
  const scalar_t* tangent;  // null stands for zero
  T at_max, max_minus_mean;

  DLOPS_HOST_DEVICE Centred(const Row<scalar_t, Team>& row, const scalar_t* tangent)
      : row(row), tangent(tangent), at_max(0), max_minus_mean(0) {
    if (tangent == nullptr || row.args.classes == 0) return;
    at_max = row.at(tangent, row.argmax);
    max_minus_mean = row.sum([&](int64_t c) { return row.p(c) * (at_max - row.at(tangent, c)); });
  }
  DLOPS_HOST_DEVICE T value(int64_t c) const {
    return tangent == nullptr ? T(0) : (row.at(tangent, c) - at_max) + max_minus_mean;
  }
  DLOPS_HOST_DEVICE T over_complement(int64_t c, T not_p) const {
    return not_p == 0 ? T(0) : value(c) / not_p;
  }
};

}  // namespace dlops::cuda
