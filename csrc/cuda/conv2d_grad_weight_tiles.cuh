// The gradient of the weight as a product of tiles, whose column matrix exists in shared memory
// alone.
#pragma once

#include <type_traits>
#include <variant>

#include "cuda/boxes.h"
#include "cuda/panels.cuh"
#include "cuda/tiles.cuh"

namespace dlops::cuda {

// Pixels of a stage.
template <class scalar_t>
constexpr int stage_pixels(Copies copies) {
  return copies == Copies::boxes ? 64 : sizeof(scalar_t) == 8 ? 16 : 32;
}

// sums (parts, groups, O, K) = grad_output^T (O x pixels) x columns (pixels x K), where each part
// adds up `part_pixels` pixels, by tiles of kOutputs x kColumns. grad_output's channels are
// neighbours in memory. Multiply and conv.C are as in conv2d_tiles.cuh.
//
// Groups of warps take 128 rows at least: of few outputs, the columns are the rows of the product.
constexpr bool columns_are_rows(int outputs, int columns) {
  return outputs < 128 && columns >= 128;
}

template <class scalar_t, int kOutputs, int kColumns, Copies copies,
          template <class, int, int> class Multiply>
using GradWeightPanels =
    Panels<scalar_t, columns_are_rows(kOutputs, kColumns) ? kColumns : kOutputs,
           columns_are_rows(kOutputs, kColumns) ? kOutputs : kColumns,
           stage_pixels<scalar_t>(copies), Multiply>;

template <class scalar_t, int kOutputs, int kColumns, Copies copies,
          template <class, int, int> class Multiply = WarpProducts>
struct GradWeightTiles : GradWeightPanels<scalar_t, kOutputs, kColumns, copies, Multiply> {
  using P = GradWeightPanels<scalar_t, kOutputs, kColumns, copies, Multiply>;
  using P::kPanelBytes, P::kStageBytes;
  static constexpr bool turned = columns_are_rows(kOutputs, kColumns);
  // Panels of either factor, and where they begin in a stage.
  static constexpr int kOutputPanels = turned ? P::kColumnPanels : P::kRowPanels;
  static constexpr int kColumnPanels = turned ? P::kRowPanels : P::kColumnPanels;
  static constexpr int kOutputsAt = turned ? kColumnPanels * kPanelBytes : 0;
  static constexpr int kColumnsAt = turned ? 0 : kOutputPanels * kPanelBytes;
  using typename P::Products, typename P::T;
  static constexpr Copies kCopies = copies;
  static constexpr bool by_boxes = copies == Copies::boxes;
  static constexpr int kPixels = P::kDepth;
  static constexpr int kSharedBytes = T::kStages * kStageBytes + (by_boxes ? T::kBarrierBytes : 0);

  static_assert(!by_boxes || Products::kByGroups);
  struct Boxes {
    BoxMap pixels, grad_output;  // a plane of grad_output's channels
  };

  TileConv2d<scalar_t> conv;
  const scalar_t* grad_output;
  int64_t grad_pixel, grad_group;  // steps in memory
  typename T::sum_t* sums;
  bool adds;            // to what is there
  int64_t part_pixels;  // a multiple of kPixels
  std::conditional_t<by_boxes, Boxes, std::monostate> boxes;

  DLOPS_HOST_DEVICE int64_t output_tiles() const { return tiles_of(conv.O, kOutputs); }
  DLOPS_HOST_DEVICE int64_t column_tiles() const {
    return tiles_of(static_cast<int64_t>(conv.R) * conv.S * conv.C, kColumns);
  }
  DLOPS_HOST_DEVICE int64_t parts() const { return tiles_of(conv.pixels(), part_pixels); }
  DLOPS_HOST_DEVICE int64_t count() const {
    return parts() * conv.groups * output_tiles() * column_tiles();
  }

  // The tile's place.
  struct Place {
    int first_output, first_column, group;
    int64_t first_pixel, end_pixel;
  };

  template <class Block>
  DLOPS_DEVICE void copy_outputs(Block& block, unsigned char* panels, int thread,
                                 const Place& place, int64_t pixel) const {
    P::template Part<kOutputPanels>::for_each(
        panels, thread, [&](unsigned char* to, int row, int element, int) {
          const int o = place.first_output + element;
          block.template copy<16>(
              to, grad_output + (pixel + row) * grad_pixel + place.group * grad_group + o,
              o < conv.O && pixel + row < place.end_pixel);
        });
  }

  // A thread's part of the columns: one cell, seen from some pixels, which go on from stage to
  // stage.
  struct Walk {
    using Part = typename P::template Part<kColumnPanels>;
    Cell cell;
    bool is_column;
    OutputPixel step, at[Part::kCount];

    Walk() = default;
    DLOPS_DEVICE Walk(const TileConv2d<scalar_t>& conv, int thread, const Place& place)
        : step(conv, kPixels) {
      const int k = place.first_column + Part::element(thread);
      cell = Cell(conv, k);
      is_column = k < conv.column_rows();
      DLOPS_UNROLL
      for (int i = 0; i < Part::kCount; ++i)
        at[i] = OutputPixel(conv, place.first_pixel + Part::row(thread, i));
    }
  };

  template <class Block>
  DLOPS_DEVICE void copy_columns(Block& block, unsigned char* panels, int thread,
                                 const Place& place, int64_t pixel, Walk& walk) const {
    Walk::Part::for_each(panels, thread, [&](unsigned char* to, int row, int, int i) {
      const Window<scalar_t> window(conv, walk.at[i], place.group);
      block.template copy<16>(
          to, window.start + walk.cell.offset,
          walk.is_column && pixel + row < place.end_pixel && window.inside(conv, walk.cell));
      walk.at[i].advance(conv, walk.step);
    });
  }

  // The boxes of a stage: what lies past the last pixel, or the last column, is zero.
  template <class Block>
  DLOPS_DEVICE void copy_boxes(Block& block, uint64_t* barrier, unsigned char* panels,
                               const Place& place, int64_t pixel) const {
    for (int i = 0; i < kOutputPanels; ++i)
      block.copy_rows(panels + kOutputsAt + i * kPanelBytes, boxes.grad_output, barrier,
                      static_cast<int>(place.group * grad_group) + place.first_output + i * T::kRow,
                      0, static_cast<int>(pixel));
    const OutputPixel at(conv, pixel);
    for (int i = 0; i < kColumnPanels; ++i) {
      const int k = place.first_column + i * T::kRow;
      const bool there = k < conv.column_rows();
      const int tap = there ? k / conv.C : 0, c = there ? k - tap * conv.C : conv.C;
      block.copy_pixels(panels + kColumnsAt + i * kPanelBytes, boxes.pixels, barrier,
                        (there ? place.group : conv.groups - 1) * conv.C + c,
                        static_cast<int>(at.n), at.oh * conv.stride_h - conv.pad_top,
                        at.ow * conv.stride_w - conv.pad_left, tap / conv.S * conv.dilation_h,
                        tap % conv.S * conv.dilation_w);
    }
  }

  DLOPS_DEVICE void store(const typename Products::Sums& values, int thread, const Place& place,
                          int64_t part) const {
    const int warp = thread / 32;
    const int K = conv.column_rows();
    typename T::sum_t* const to = sums + (part * conv.groups + place.group) * conv.O * K;
    const int first_row = Products::first_row(warp), first = Products::first_column(warp);
    const auto add = [&](int o, int k, typename T::sum_t sum) {
      if (o >= conv.O || k >= K) return;
      typename T::sum_t& total = to[static_cast<int64_t>(o) * K + k];
      total = adds ? total + sum : sum;
    };
    values.for_each_pair(thread % 32, [&](int row, int column, const typename T::sum_t* pair) {
      row += first_row;
      column += first;
      if constexpr (turned) {
        add(place.first_output + column, place.first_column + row, pair[0]);
        add(place.first_output + column + 1, place.first_column + row, pair[1]);
      } else {
        const int o = place.first_output + row, k = place.first_column + column;
        if (K % 2 != 0) {
          add(o, k, pair[0]);
          add(o, k + 1, pair[1]);
        } else if (o < conv.O && k < K) {  // both, at once
          Pair& total = *reinterpret_cast<Pair*>(to + static_cast<int64_t>(o) * K + k);
          const Pair before = adds ? total : Pair{};
          total = {before.first + pair[0], before.second + pair[1]};
        }
      }
    });
  }
  struct alignas(2 * sizeof(typename T::sum_t)) Pair {
    typename T::sum_t first, second;
  };

  // All stages, but of boxes.
  template <class Block, class F, class G>
  DLOPS_DEVICE void copy_and_multiply(Block& block, const Place& place, int64_t steps,
                                      const F& stage, const G& multiply_stage) const {
    typename Block::template PerThread<Walk> walks;
    block.threads([&](int thread) { walks[thread] = Walk(conv, thread, place); });
    run_stages<Products, T::kStages>(
        block, steps,
        [&](int64_t step) {
          const int64_t pixel = place.first_pixel + step * kPixels;
          block.threads([&](int thread) {
            copy_outputs(block, stage(step) + kOutputsAt, thread, place, pixel);
            copy_columns(block, stage(step) + kColumnsAt, thread, place, pixel, walks[thread]);
          });
        },
        multiply_stage);
  }

  template <class Block>
  DLOPS_DEVICE void operator()(Block& block, unsigned char* shared, int64_t tile) const {
    const int64_t outputs = output_tiles(), columns = column_tiles();
    Place place;
    place.first_column = static_cast<int>(tile % columns) * kColumns;
    tile /= columns;
    place.first_output = static_cast<int>(tile % outputs) * kOutputs;
    tile /= outputs;
    place.group = static_cast<int>(tile % conv.groups);
    const int64_t part = tile / conv.groups;
    place.first_pixel = part * part_pixels;
    const int64_t end = place.first_pixel + part_pixels;
    place.end_pixel = end < conv.pixels() ? end : conv.pixels();
    const int64_t steps = tiles_of(place.end_pixel - place.first_pixel, kPixels);
    const auto stage = [&](int64_t step) {
      return shared + static_cast<int>(step % T::kStages) * kStageBytes;
    };
    typename Block::template PerThread<typename Products::Fragments> fragments;
    typename Block::template PerThread<typename Products::Sums> values;
    block.threads([&](int thread) { values[thread] = {}; });
    if constexpr (Products::kByGroups)
      block.settle(values);  // or they are zeroed among the products
    const auto multiply_stage = [&](int64_t step) {
      P::multiply(block, stage(step), fragments, values);
    };
    if constexpr (by_boxes) {
      run_stages_of_boxes<T::kStages>(
          block, reinterpret_cast<uint64_t*>(shared + T::kStages * kStageBytes), steps, kStageBytes,
          [&](int64_t step, uint64_t* barrier) {
            copy_boxes(block, barrier, stage(step), place, place.first_pixel + step * kPixels);
          },
          multiply_stage);
    } else {
      copy_and_multiply(block, place, steps, stage, multiply_stage);
    }
    if constexpr (Products::kByGroups) block.settle(values);
    block.threads([&](int thread) { store(values[thread], thread, place, part); });
  }
};

}  // namespace dlops::cuda
