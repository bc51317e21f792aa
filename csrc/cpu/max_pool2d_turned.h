// Max pooling of small contiguous planes, whose rows would leave most of a vector's lanes empty:
// some planes at a time are turned round, so that lanes are planes, and pooled as an image of
// that many channels.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "cpu/capability.h"
#include "cpu/grain.h"
#include "cpu/scratch.h"
#include "cpu/simd/max_pool2d.h"
#include "cpu/simd/transpose.h"
#include "max_pool2d_math.h"

namespace dlops::cpu {

template <class scalar_t>
class TurnedPlanes {
  using T = at::opmath_type<scalar_t>;  // as exact, and compared without conversion

 public:
  explicit TurnedPlanes(const Pool2dGeometry& g)
      : g_(g), inputs_(g.H * g.W), outputs_(g.OH * g.OW) {}

  // Up to which width they take less time than rows was measured.
  static bool serves(const Pool2dGeometry& g) {
    const int64_t widest = kLanes * (side_by_side(g) ? 4 : 5) / 8;
    return g.N * g.C >= kLeast && g.OW <= widest && g.H * g.W <= kLargest;
  }

  void forward(const scalar_t* input, scalar_t* output, uint8_t* cells) const {
    const auto rows = DLOPS_SIMD(max_pool2d_rows_last, T, uint8_t);
    for_each_image([&](const Pool2dGeometry& image, int64_t first, const Parts& parts) {
      turn(input + first * inputs_, image.C, inputs_, parts.input);
      uint8_t* chosen = cells == nullptr ? nullptr : parts.cells;
      // The planes that come next.
      Fetch<false> fetch(input + (first + image.C) * inputs_, image.C * inputs_, g_.OH);
      for (int64_t oh = 0; oh < g_.OH; ++oh, fetch.some())
        rows(image, oh, oh + 1, parts.input, parts.output, chosen);
      turn(parts.output, outputs_, image.C, output + first * outputs_);
      if (cells != nullptr) turn(chosen, outputs_, image.C, cells + first * outputs_);
    });
  }

  void scatter(const scalar_t* grad_output, const uint8_t* cells, scalar_t* grad_input) const {
    const bool pairs = side_by_side(g_);
    const auto rows = pairs ? DLOPS_SIMD(max_pool2d_scatter_pairs_last, T)
                            : DLOPS_SIMD(max_pool2d_scatter_rows_last, T, uint8_t);
    for_each_image([&](const Pool2dGeometry& image, int64_t first, const Parts& parts) {
      turn(grad_output + first * outputs_, image.C, outputs_, parts.output);
      turn(cells + first * outputs_, image.C, outputs_, parts.cells);
      const int64_t steps = pairs ? g_.OH : g_.H;
      Fetch<true> fetch(grad_input + first * inputs_, image.C * inputs_, steps);
      for (int64_t row = 0; row < steps; ++row, fetch.some())
        rows(image, row, row + 1, parts.output, parts.cells, parts.input);
      turn(parts.input, inputs_, image.C, grad_input + first * inputs_);
    });
  }

 private:
  static constexpr int64_t kLanes = 64 / static_cast<int64_t>(sizeof(T));
  static constexpr int64_t kLeast = 16, kMost = 64;  // planes of an image
  static constexpr int64_t kLargest = 1024;          // elements of a plane

  // Memory that is fetched, for reading or for writing, while an image's rows are pooled: turning
  // it would wait for many short runs of it.
  template <bool write>
  class Fetch {
   public:
    Fetch(const scalar_t* from, int64_t count, int64_t steps)
        : next_(reinterpret_cast<const char*>(from)),
          bytes_((count * static_cast<int64_t>(sizeof(scalar_t)) + steps - 1) / steps) {}
    void some() {
      for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(next_ + i, write, 2);
      next_ += bytes_;
    }

   private:
    const char* next_;
    int64_t bytes_;
  };

  struct Parts {
    T* input;
    T* output;
    uint8_t* cells;
  };

  template <class from_t, class to_t>
  static void turn(const from_t* from, int64_t rows, int64_t cols, to_t* to) {
    DLOPS_SIMD(transpose, from_t, to_t)(from, cols, rows, cols, to, rows);
  }

  template <class F>
  void for_each_image(const F& f) const {
    const int64_t planes = g_.N * g_.C;
    const int64_t each = std::clamp(planes / at::get_num_threads() / 16 * 16, kLeast, kMost);
    const int64_t bytes = Scratch::size<T>(inputs_ * each) + Scratch::size<T>(outputs_ * each) +
                          Scratch::size<uint8_t>(outputs_ * each);
    const int64_t images = grain(each * outputs_ * g_.cells(), kVisitsPerThread);
    at::parallel_for(0, (planes + each - 1) / each, images, [&](int64_t begin, int64_t end) {
      Scratch scratch(bytes);
      const Parts parts{scratch.take<T>(inputs_ * each), scratch.take<T>(outputs_ * each),
                        scratch.take<uint8_t>(outputs_ * each)};
      Pool2dGeometry image = g_;
      image.N = 1;
      for (int64_t i = begin; i < end; ++i) {
        image.C = std::min(each, planes - i * each);
        f(image, i * each, parts);
      }
    });
  }

  Pool2dGeometry g_;
  int64_t inputs_, outputs_;
};

}  // namespace dlops::cpu
