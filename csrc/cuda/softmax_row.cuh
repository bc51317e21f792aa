// One row of the softmax focal loss, shared out among the members of a team (rows.cuh): its
// softmax, its target, and sums over its classes. Free of torch's tensors, host and device.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>
#include <cstdio>
#include <limits>

#include "common/host_device.h"
#include "cuda/divider.h"
#include "cuda/row_share.cuh"
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
  int64_t classes;
  Divider inner;
  bool in_packs;  // the rows of all tensors like the input start at multiples of 16 bytes
  int64_t ignore_index;
  T gamma;
  T kept, spread;  // a class's share of the target is kept * share + spread: label smoothing

  // Where a row's first class stands.
  DLOPS_HOST_DEVICE int64_t offset(int64_t row) const {
    const int64_t n = inner.split(row);
    return n * classes * inner.divisor() + row;
  }
  DLOPS_HOST_DEVICE RowLayout layout() const { return {classes, inner.divisor(), in_packs}; }
  DLOPS_HOST_DEVICE T class_weight(int64_t c) const {
    return weight == nullptr ? T(1) : static_cast<T>(weight[c]);
  }
  DLOPS_HOST_DEVICE bool is_class(int64_t label) const { return 0 <= label && label < classes; }
};

// The exponentials of some logits relative to the largest of them. Those of the largest are 1 each
// and counted apart: leaving one out keeps every digit of a probability near 1 and of its
// complement.
template <class T>
struct Exponentials {
  double sum;
  T max, ties;

  DLOPS_HOST_DEVICE static Exponentials none() {
    return {0.0, -std::numeric_limits<T>::infinity(), T(0)};
  }
  // Makes them relative to something larger.
  DLOPS_HOST_DEVICE void raise(T larger) {
    sum = (sum + static_cast<double>(ties)) * static_cast<double>(ScalarMath<T>::exp(max - larger));
    max = larger;
    ties = T(0);
  }
};

// A NaN is never the largest and makes itself felt in the sum.
struct Join {
  template <class T>
  DLOPS_HOST_DEVICE Exponentials<T> operator()(Exponentials<T> a, Exponentials<T> b) const {
    if (a.max < b.max) a.raise(b.max);
    if (b.max < a.max) b.raise(a.max);
    return {a.sum + b.sum, a.max, a.ties + b.ties};
  }
};

struct Largest {
  template <class T>
  DLOPS_HOST_DEVICE T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};
struct Plus {
  template <class T>
  DLOPS_HOST_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  template <class T>
  DLOPS_HOST_DEVICE T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

// What a row's loss and its gradient need of all classes: the losses and their derivatives with
// respect to log p, each times its share in the target.
template <class T>
struct Sums {
  T loss, slope;
  DLOPS_HOST_DEVICE Sums operator+(Sums other) const {
    return {loss + other.loss, slope + other.slope};
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
  int64_t row, first;  // its number, and where its first class stands
  int64_t label;       // -1 where the target holds probabilities
  bool ignored;
  RowShare<scalar_t, Team> logits;
  T label_logit;                        // 0 where there is none
  T max, log_sum, inverse, complement;  // log(1 + others), p of the largest, and 1 - that

  DLOPS_HOST_DEVICE Row(const FocalArgs<scalar_t>& args, int64_t row, const Team& team)
      : args(args),
        team(team),
        row(row),
        first(args.offset(row)),
        label(-1),
        ignored(false),
        logits(args.input + first, args.layout(), team.rank()),
        label_logit(0) {
    if (args.labels != nullptr) {
      label = args.labels[row];
      ignored = label == args.ignore_index;
      if (!ignored && !args.is_class(label)) refuse_label();
      if (!ignored) label_logit = at(args.input, label);
    }
    if (takes_part()) find_softmax();
  }

  // --------------------------------------------------------------------------------- elements

  // Whether this row goes through all reductions: an ignored one does where others wait for it.
  DLOPS_HOST_DEVICE bool takes_part() const { return !ignored || Team::together; }
  DLOPS_HOST_DEVICE bool is_first_member() const { return team.rank() == 0; }
  // Class c's element of a tensor like the input.
  DLOPS_HOST_DEVICE T at(const scalar_t* tensor, int64_t c) const {
    return static_cast<T>(tensor[first + c * args.inner.divisor()]);
  }
  DLOPS_HOST_DEVICE void set(scalar_t* tensor, int64_t c, T value) const {
    tensor[first + c * args.inner.divisor()] = static_cast<scalar_t>(value);
  }
  DLOPS_HOST_DEVICE void clear(scalar_t* tensor) const {
    if (tensor != nullptr) for_each_class([&](int64_t c) { set(tensor, c, T(0)); });
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
  // The sum of f over the classes that have a share; 0 in an ignored row.
  template <class F>
  DLOPS_HOST_DEVICE T sum_of_shares(const F& f) const {
    if (has_one_class()) return ignored ? T(0) : f(label);
    const T total = sum(f);
    return ignored ? T(0) : total;
  }
  // The same for loss and slope at once.
  DLOPS_HOST_DEVICE Sums<T> sums() const {
    if (ignored && has_one_class()) return {};
    if (has_one_class()) return of_class(label, label_logit);
    Sums<double> total{};
    for_each_class([&](int64_t c) {
      const Sums<T> one = of_class(c, at(args.input, c));
      total = total + Sums<double>{static_cast<double>(one.loss), static_cast<double>(one.slope)};
    });
    total = team.reduce(total, Plus());
    if (ignored) return {};
    return {static_cast<T>(total.loss), static_cast<T>(total.slope)};
  }
  DLOPS_HOST_DEVICE Sums<T> of_class(int64_t c, T x) const {
    const Focal focal = focal_of(x);
    const T share = this->share(c);
    return {weighted_loss(share, focal.loss()), weighted(share, focal.first())};
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

  // In one pass: a member's sum is relative to the largest logit that it has met, and made relative
  // to a larger one at most once a chunk. Of a row that is one chunk, all members' sums are
  // relative to the same.
  DLOPS_HOST_DEVICE void find_softmax() {
    auto found = Exponentials<T>::none();
    logits.for_each_chunk([&] {
      T max = found.max;
      logits.for_each_logit([&](T x) { max = Largest()(max, x); });
      if (logits.is_one_chunk()) max = team.reduce(max, Largest());
      if (max > found.max) found.raise(max);
      add_chunk(found);
    });
    found = team.reduce(found, Join());
    max = found.max;
    // NaN where the row has no softmax: its largest logit is infinite.
    const T others = static_cast<T>(found.sum + static_cast<double>(found.ties - 1)) + (max - max);
    log_sum = ScalarMath<T>::log1p(others);
    inverse = 1 / (1 + others);
    complement = others * inverse;
  }
  DLOPS_HOST_DEVICE void add_chunk(Exponentials<T>& found) const {
    // The exponentials of a chunk are few enough to be summed as they are. With nothing but -inf so
    // far, each of them is 0.
    const T max = found.max, base = max == -std::numeric_limits<T>::infinity() ? T(0) : max;
    T sum(0), ties(0);
    logits.for_each_logit([&](T x) {
      const T e = ScalarMath<T>::exp(x - base);
      sum += x == max ? T(0) : e;
      ties += x == max ? T(1) : T(0);
    });
    found.sum += static_cast<double>(sum);
    found.ties += ties;
  }
  // The first of the largest.
  DLOPS_HOST_DEVICE int64_t argmax() const {
    int64_t found = args.classes - 1;  // where all are NaN
    for_each_class([&](int64_t c) {
      if (c < found && at(args.input, c) == max) found = c;
    });
    return team.reduce(found, Least());
  }
  // Of a class by its logit, or of class c: its probability, 1 - that, and phi with its
  // derivatives.
  DLOPS_HOST_DEVICE T p_of(T x) const { return ScalarMath<T>::exp(x - max) * inverse; }
  DLOPS_HOST_DEVICE T not_p_of(T x) const { return x == max ? complement : 1 - p_of(x); }
  DLOPS_HOST_DEVICE Focal focal_of(T x) const {
    const T log_p = (x - max) - log_sum;
    const T not_p = x == max ? complement : 1 - ScalarMath<T>::exp(log_p);
    return Focal(log_p, not_p, args.gamma);
  }
  DLOPS_HOST_DEVICE T p(int64_t c) const { return p_of(at(args.input, c)); }
  DLOPS_HOST_DEVICE T not_p(int64_t c) const { return not_p_of(at(args.input, c)); }
  DLOPS_HOST_DEVICE Focal focal(int64_t c) const { return focal_of(at(args.input, c)); }
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
    at_max = row.at(tangent, row.argmax());
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
