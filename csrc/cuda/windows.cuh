// The sliding windows that reach a given input row or column: what a gradient gathers from. Free of
// torch, host and device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dlops::cuda {

// Calls f(o, k) in rising order of o for every output position o in [0, count) whose window covers
// `position` with its cell k, where window o starts at o * stride and has cells `dilation` apart.
// `position` counts from the start of the padding.
template <class F>
DLOPS_HOST_DEVICE void for_each_window(int64_t position, int64_t kernel, int64_t stride,
                                       int64_t dilation, int64_t count, const F& f) {
  const int64_t reach = dilation * (kernel - 1);
  const int64_t first = position > reach ? (position - reach + stride - 1) / stride : 0;
  const int64_t last = position / stride;
  for (int64_t o = first; o <= last && o < count; ++o) {
    const int64_t offset = position - o * stride;
    if (offset % dilation == 0) f(o, offset / dilation);
  }
}

// A plane of an image tensor: the pixels of one channel, as offsets into the tensor's memory.
struct Plane {
  int64_t base, step;

  DLOPS_HOST_DEVICE Plane(int64_t n, int64_t c, int64_t channels, int64_t pixels,
                          bool channels_last)
      : base(channels_last ? n * pixels * channels + c : (n * channels + c) * pixels),
        step(channels_last ? channels : 1) {}
  DLOPS_HOST_DEVICE int64_t operator[](int64_t pixel) const { return base + pixel * step; }
};

// Image, channel and pixel of the i-th element in memory.
struct Position {
  int64_t n, c, pixel;

  DLOPS_HOST_DEVICE Position(int64_t i, int64_t channels, int64_t pixels, bool channels_last) {
    if (channels_last) {
      c = i % channels;
      pixel = i / channels % pixels;
    } else {
      pixel = i % pixels;
      c = i / pixels % channels;
    }
    n = i / pixels / channels;
  }
};

}  // namespace dlops::cuda
