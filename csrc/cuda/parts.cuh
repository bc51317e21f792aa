// Sums made in many parts, side by side, and few enough that a thread each leaves most of a device
// idle: the parts are shared out, and each share is added up by a thread of its own.
#pragma once

#include "common/cuda_utils.cuh"
#include "conv2d_math.h"
#include "cuda/divider.h"

namespace dlops::cuda {

// Up to so many parts are not worth a launch. Fewer in tests, whose parts are few.
#if !defined(DLOPS_FEW_PARTS)
#define DLOPS_FEW_PARTS 16
#endif
constexpr int64_t kFewParts = DLOPS_FEW_PARTS;

// One sum of one share per index; it takes the place of the share's first part.
template <class T>
struct AddShare {
  int64_t parts, share;  // parts in all, and of a share
  Divider count;         // sums of a part
  T* sums;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    int64_t place = i;
    const int64_t first = count.split(place) * share;  // leaves the remainder in place of i
    const int64_t end = first + share < parts ? first + share : parts;
    T* const to = sums + first * count.divisor() + place;
    T sum = *to;
    for (int64_t part = 1; part < end - first; ++part) sum += to[part * count.divisor()];
    *to = sum;
  }
};

// Parts that are left, and the step from one to the next.
struct Parts {
  int64_t count, step;
};

// Adds up shares of sums (parts, count). The order of every sum depends on the number of parts
// alone.
template <class T>
Parts add_shares(T* sums, int64_t parts, int64_t count) {
  if (parts <= kFewParts) return {parts, count};
  int64_t share = 1;
  while (share * share < parts) ++share;
  const int64_t shares = ceil_div(parts, share);
  for_each(shares * count, AddShare<T>{parts, share, Divider(count), sums});
  return {shares, share * count};
}

}  // namespace dlops::cuda
