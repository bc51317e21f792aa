// The weights of a depthwise convolution, as its kernels read them.
#pragma once

#include <cstdint>

#include "cuda/divider.h"
#include "cuda/windows.cuh"

namespace dlops::cuda {

// The weight as (R, S, O), and which of its channels the values of a pack belong to.
template <class scalar_t, class Packs>
struct DepthwiseWeight {
  using Values = typename Packs::template Values<scalar_t>;
  const scalar_t* data;
  Divider channels;  // O

  struct Channels {
    int64_t of[Packs::width];
  };
  DLOPS_HOST_DEVICE Channels channels_of(const Pack& at) const {
    Channels result{};
    for (int j = 0; j < Packs::width; ++j) {
      result.of[j] = Packs::channels_last ? at.channel + j : at.image + j;
      if (!Packs::channels_last) channels.split(result.of[j]);  // leaves the remainder
    }
    return result;
  }
  DLOPS_HOST_DEVICE Values load(const Channels& at, int64_t tap) const {
    const scalar_t* const from = data + tap * channels.divisor();
    if constexpr (Packs::channels_last) {
      return *reinterpret_cast<const Values*>(from + at.of[0]);
    } else {
      Values values;
      for (int j = 0; j < Packs::width; ++j) values.of[j] = from[at.of[j]];
      return values;
    }
  }
};

}  // namespace dlops::cuda
