// The channels of one pixel of a channels_last image, some vectors of them at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/lanes.h"

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// Calls f(first channel, vectors side by side as a constant, how many of their channels there are).
template <int64_t lanes, class F>
C10_ALWAYS_INLINE void for_each_channel_block(int64_t channels, const F& f) {
  int64_t c = 0;
  for (; c + 4 * lanes <= channels; c += 4 * lanes) f(c, Constant<4>(), 4 * lanes);
  for (; c + 2 * lanes <= channels; c += 2 * lanes) f(c, Constant<2>(), 2 * lanes);
  for (; c < channels; c += lanes) f(c, Constant<1>(), std::min(lanes, channels - c));
}

// Vector `b` of `blocks`, which have `count` channels; zeros in the lanes of others.
template <class T, int64_t lanes, int64_t blocks, class from_t>
C10_ALWAYS_INLINE Vector<T, lanes> load_block(const from_t* from, int64_t b, int64_t count) {
  return blocks > 1 ? load<T, lanes>(from + b * lanes) : load_part<T, lanes>(from, count);
}

}  // namespace
}  // namespace dlops::cpu
