// Positions in image tensors and the sliding windows that reach them: what kernels that work on one
// pixel per index start with. Free of torch, host and device.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cuda/divider.h"
#include "cuda/write_at_once.cuh"

namespace dlops::cuda {

// One axis of sliding windows: window o in [0, count) starts at o * stride and has `kernel` cells
// that are `dilation` apart. Positions count from the start of the padding.
class WindowAxis {
 public:
  WindowAxis(int64_t kernel, int64_t stride, int64_t dilation, int64_t count)
      : count_(count), reach_(dilation * (kernel - 1)), stride_(stride), dilation_(dilation) {}

  // Calls f(o, k) in rising order of o for every window o that covers `position`, with its cell k.
  template <class F>
  DLOPS_HOST_DEVICE void for_each_window(int64_t position, const F& f) const {
    const int64_t stride = stride_.divisor();
    const int64_t first = position > reach_ ? stride_(position - reach_ + stride - 1) : 0;
    const int64_t last = stride_(position);
    for (int64_t o = first; o <= last && o < count_; ++o) {
      int64_t offset = position - o * stride;
      const int64_t k = dilation_.split(offset);
      if (offset == 0) f(o, k);
    }
  }

 private:
  int64_t count_, reach_;
  Divider stride_, dilation_;
};

// Some values of an image tensor that share a pixel, and with it all arithmetic on positions:
// `width` neighbouring channels where these are neighbours in memory (channels_last), else the same
// pixel of `width` neighbouring planes.
struct Pack {
  int64_t image, channel;  // channels_last: an image and its first channel; else the first plane, 0
  int64_t row, col;
  int count;  // of planes: fewer than `width` in the last pack
};

template <int width_, bool channels_last_>
class Packs {
 public:
  static constexpr int width = width_;
  static constexpr bool channels_last = channels_last_;

  Packs(int64_t N, int64_t C, int64_t H, int64_t W)
      : planes_(N * C), channels_(C), groups_(channels_last ? C / width : 1), cols_(W), rows_(H) {}

  int64_t count() const {
    const int64_t pixels = cols_.divisor() * rows_.divisor();
    return channels_last ? planes_ / width * pixels : (planes_ + width - 1) / width * pixels;
  }
  DLOPS_HOST_DEVICE Pack operator[](int64_t i) const {
    Pack at;
    int64_t group = 0;
    if constexpr (channels_last) {
      const int64_t pixels = groups_.split(i);
      group = i;
      i = pixels;
    }
    const int64_t rows = cols_.split(i);
    at.col = i;
    at.row = rows;
    at.image = rows_.split(at.row);
    at.channel = group * width;
    at.count = width;
    if constexpr (!channels_last) {
      at.image *= width;
      if (planes_ - at.image < width) at.count = static_cast<int>(planes_ - at.image);
    }
    return at;
  }

  // Of any tensor with the same images and channels and `pixels` pixels: where the pack's values of
  // pixel 0 start, and the distance to the next pixel's and to the next value.
  DLOPS_HOST_DEVICE int64_t start(const Pack& at, int64_t pixels) const {
    return channels_last ? at.image * pixels * channels_ + at.channel : at.image * pixels;
  }
  DLOPS_HOST_DEVICE int64_t pixel_step() const { return channels_last ? channels_ : 1; }

  template <class T>
  struct alignas(channels_last ? width * sizeof(T) : alignof(T)) Values {
    T of[width];
  };
  // The values at `from`; those of planes that are not there stay as they are.
  template <class T>
  DLOPS_HOST_DEVICE void load(Values<T>& values, const T* from, const Pack& at,
                              int64_t pixels) const {
    if constexpr (channels_last) {
      values = *reinterpret_cast<const Values<T>*>(from);
    } else {
      for (int j = 0; j < width; ++j)
        if (j < at.count) values.of[j] = from[j * pixels];
    }
  }
  template <class T>
  DLOPS_HOST_DEVICE void store(const Values<T>& values, T* to, const Pack& at,
                               int64_t pixels) const {
    if constexpr (channels_last) {
      write_at_once(to, values);
    } else {
      for (int j = 0; j < width; ++j)
        if (j < at.count) to[j * pixels] = values.of[j];
    }
  }

 private:
  int64_t planes_, channels_;
  Divider groups_, cols_, rows_;
};

}  // namespace dlops::cuda
