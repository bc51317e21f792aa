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

  // Up to which width they take less time than rows was measured with windows of 2x2 to 5x5, on
  // every capability. Rows share what overlapping windows have in common, which larger ones win by.
  bool serve() const {
    const int64_t widest = kWidest * (side_by_side(g_) ? 4 : 6) / 8;
    return g_.N * g_.C >= kLeast && g_.OW <= widest && inputs_ <= kLargest &&
           g_.cells() <= kLargestWindow;
  }

  void forward(const scalar_t* input, scalar_t* output, uint8_t* cells) const {
    const auto rows = DLOPS_SIMD(max_pool2d_rows_last, T, uint8_t);
    for_each_image([&](const Pool2dGeometry& image, int64_t first, const Turned& turned) {
      turn(input + first * inputs_, image.C, inputs_, turned.inputs);
      uint8_t* chosen = cells == nullptr ? nullptr : turned.cells;
      const int64_t next = first + image.C;
      Fetch fetch(input + next * inputs_, std::min(image.C, g_.N * g_.C - next) * inputs_, g_.OH);
      for (int64_t oh = 0; oh < g_.OH; ++oh, fetch.some())
        rows(image, oh, oh + 1, turned.inputs, turned.outputs, chosen);
      turn(turned.outputs, outputs_, image.C, output + first * outputs_);
      if (cells != nullptr) turn(chosen, outputs_, image.C, cells + first * outputs_);
    });
  }

  void scatter(const scalar_t* grad_output, const uint8_t* cells, scalar_t* grad_input) const {
    const bool pairs = side_by_side(g_);
    const auto rows = pairs ? DLOPS_SIMD(max_pool2d_scatter_pairs_last, T)
                            : DLOPS_SIMD(max_pool2d_scatter_rows_last, T, uint8_t);
    for_each_image([&](const Pool2dGeometry& image, int64_t first, const Turned& turned) {
      turn(grad_output + first * outputs_, image.C, outputs_, turned.outputs);
      turn(cells + first * outputs_, image.C, outputs_, turned.cells);
      const int64_t steps = pairs ? g_.OH : g_.H;
      Fetch fetch(grad_input + first * inputs_, image.C * inputs_, steps);
      for (int64_t row = 0; row < steps; ++row, fetch.some())
        rows(image, row, row + 1, turned.outputs, turned.cells, turned.inputs);
      turn(turned.inputs, inputs_, image.C, grad_input + first * inputs_);
    });
  }

 private:
  static constexpr int64_t kWidest = 64 / static_cast<int64_t>(sizeof(T));  // the widest vector's
  static constexpr int64_t kLeast = 16, kMost = 64;                         // planes of an image
  static constexpr int64_t kLargest = 1024;                                 // elements of a plane
  static constexpr int64_t kLargestWindow = 25;

  // The next planes that are read or written are fetched while an image's rows are pooled: turning
  // them would wait for many short runs of memory.
  class Fetch {
   public:
    Fetch(const scalar_t* from, int64_t count, int64_t steps)
        : next_(reinterpret_cast<const char*>(from)),
          end_(reinterpret_cast<const char*>(from + count)),
          step_((end_ - next_ + steps - 1) / steps) {}
    void some() {
      const char* const until = next_ + std::min(step_, end_ - next_);
      for (; next_ < until; next_ += std::min<int64_t>(64, until - next_))
        __builtin_prefetch(next_, 0, 2);
    }

   private:
    const char* next_;
    const char* end_;
    int64_t step_;
  };

  // An image's working memory: gradients of both in backward.
  struct Turned {
    T* inputs;
    T* outputs;
    uint8_t* cells;
  };

  template <class from_t, class to_t>
  static void turn(const from_t* from, int64_t rows, int64_t cols, to_t* to) {
    DLOPS_SIMD(transpose, from_t, to_t)(from, cols, rows, cols, to, rows);
  }

  // Calls f(geometry, first plane, working memory) in parallel. A plane's results are the same in
  // whichever image.
  template <class F>
  void for_each_image(const F& f) const {
    const int64_t planes = g_.N * g_.C;
    const int64_t each =
        std::clamp(planes / at::get_num_threads() / kLeast * kLeast, kLeast, kMost);
    const int64_t bytes = Scratch::size<T>(inputs_ * each) + Scratch::size<T>(outputs_ * each) +
                          Scratch::size<uint8_t>(outputs_ * each);
    const int64_t together = grain(each * outputs_ * g_.cells(), kVisitsPerThread);
    at::parallel_for(0, (planes + each - 1) / each, together, [&](int64_t begin, int64_t end) {
      Scratch scratch(bytes);
      const Turned turned{scratch.take<T>(inputs_ * each), scratch.take<T>(outputs_ * each),
                          scratch.take<uint8_t>(outputs_ * each)};
      Pool2dGeometry image = g_;
      image.N = 1;
      for (int64_t i = begin; i < end; ++i) {
        image.C = std::min(each, planes - i * each);
        f(image, i * each, turned);
      }
    });
  }

  Pool2dGeometry g_;
  int64_t inputs_, outputs_;
};

}  // namespace dlops::cpu
