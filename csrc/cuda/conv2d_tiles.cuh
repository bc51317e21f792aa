// A convolution as a product of tiles, whose column matrix exists in shared memory alone.
#pragma once

#include <cstdint>
#include <type_traits>
#include <variant>

#include "cuda/boxes.h"
#include "cuda/lines.cuh"
#include "cuda/tiles.cuh"

namespace dlops::cuda {

// Where the outputs go, in any memory format: the first one, and the steps to the next.
struct OutputPlace {
  int64_t start, image, channel, row, col;
  DLOPS_DEVICE int64_t operator()(const OutputPixel& at) const {
    return start + at.n * image + at.oh * row + at.ow * col;
  }
};

// How outputs lie in memory: a pixel's channels together or a plane's pixels; how many at a time
// (lines.cuh); and whether the pixels of an image, or all, follow one another at one step, so that
// fewer positions have to be divided.
struct OutputOrder {
  bool channels_together;
  int together;
  bool even_in_images, even;
};

// `outputs`: channels of a group; `pixels`: of a plane, whose rows have OW; `chunk`: elements of 16
// bytes.
inline OutputOrder order_of(const OutputPlace& place, int64_t outputs, int64_t pixels, int64_t OW,
                            int64_t chunk, const void* output) {
  const bool channels_together = place.channel == 1;
  const bool even_in_images = place.row == OW * place.col && pixels < int64_t(1) << 31;
  const auto fits = [&](int64_t numbers) {
    const auto are_multiples = [&](auto... steps) { return ((steps % numbers == 0) && ...); };
    const auto bytes = static_cast<uintptr_t>(numbers * 16 / chunk);
    return reinterpret_cast<uintptr_t>(output) % bytes == 0 &&
           are_multiples(place.start, place.image) &&
           (channels_together
                ? are_multiples(outputs, place.row, place.col)
                : place.col == 1 && place.row == OW && are_multiples(pixels, place.channel));
  };
  const int64_t together = fits(chunk) ? chunk : chunk > 2 && fits(chunk / 2) ? chunk / 2 : 1;
  return {channels_together, static_cast<int>(together), even_in_images,
          even_in_images && place.image == pixels * place.col};
}

// output (pixels x O) = columns (pixels x K) x weight^T (K x O) + bias, by tiles of kPixels x
// kOutputs. Multiply is WarpProducts, ThreadProducts or GroupProducts, which alone read boxes: then
// conv.C counts whole boxes of channels.
template <class scalar_t, int kPixels, int kOutputs, Copies copies,
          template <class, int, int> class Multiply = WarpProducts>
struct Conv2dTiles : Tile<scalar_t> {
  using T = Tile<scalar_t>;
  using Products = Multiply<scalar_t, kPixels, kOutputs>;
  static constexpr Copies kCopies = copies;
  static constexpr bool by_boxes = copies == Copies::boxes;
  static constexpr int kPixelRows = kPixels / 32, kWeightRows = kOutputs / 32;  // a thread copies
  static constexpr int kStageBytes = (kPixels + kOutputs) * T::kRowBytes;
  static constexpr int kSharedBytes = T::kStages * kStageBytes + (by_boxes ? T::kBarrierBytes : 0);

  static_assert(!by_boxes || Products::kByGroups);
  struct Boxes {
    BoxMap pixels, weights;  // planes of weights are the kernel's cells
  };

  TileConv2d<scalar_t> conv;
  const scalar_t* weight;  // (groups, O, weight_row)
  int weight_row;          // K, filled up to whole chunks with zeros
  const scalar_t* bias;    // or null
  scalar_t* output;
  OutputPlace place;
  OutputOrder order;
  std::conditional_t<by_boxes, Boxes, std::monostate> boxes;

  DLOPS_HOST_DEVICE int64_t output_tiles() const { return tiles_of(conv.O, kOutputs); }
  DLOPS_HOST_DEVICE int64_t count() const {
    return conv.groups * output_tiles() * tiles_of(conv.pixels(), kPixels);
  }

  // Those whose columns a thread copies.
  struct Windows {
    Window<scalar_t> rows[kPixelRows];
  };

  // One chunk of eight rows (what products of warps take) or, of float64, two of four rows lie in
  // different banks.
  DLOPS_DEVICE static unsigned char* chunk_at(unsigned char* tile, int row, int chunk) {
    const int place = sizeof(scalar_t) == 8 ? row * 2 & 7 : row & 7;
    return tile + row * T::kRowBytes + (chunk ^ place) * 16;
  }

  // A thread's part of stage `step`: one chunk of some rows of both tiles.
  template <class Block>
  DLOPS_DEVICE void copy(Block& block, const Windows& windows, unsigned char* tile, int thread,
                         const scalar_t* weights, int outputs, int step) const {
    const int chunk = thread % T::kChunks, row = thread / T::kChunks;
    const int k = step * T::kRow + chunk * T::kChunk;
    const Cell cell(conv, k);
    DLOPS_UNROLL
    for (int i = 0; i < kPixelRows; ++i)
      block.template copy<16>(chunk_at(tile, row + i * 32, chunk),
                              windows.rows[i].start + cell.offset,
                              k < weight_row && windows.rows[i].inside(conv, cell));
    DLOPS_UNROLL
    for (int i = 0; i < kWeightRows; ++i) {
      const int o = row + i * 32;
      block.template copy<16>(chunk_at(tile, kPixels + o, chunk),
                              weights + static_cast<int64_t>(o) * weight_row + k,
                              k < weight_row && o < outputs);
    }
  }

  // Stage `step`: the boxes of one kernel cell.
  template <class Block>
  DLOPS_DEVICE void copy_boxes(Block& block, uint64_t* barrier, unsigned char* tile,
                               const OutputPixel& at, int first_output, int group, int step) const {
    const int tap = step * T::kRow / conv.C, c = step * T::kRow - tap * conv.C;
    block.copy_pixels(tile, boxes.pixels, barrier, group * conv.C + c, static_cast<int>(at.n),
                      at.oh * conv.stride_h - conv.pad_top, at.ow * conv.stride_w - conv.pad_left,
                      tap / conv.S * conv.dilation_h, tap % conv.S * conv.dilation_w);
    block.copy_rows(tile + kPixels * T::kRowBytes, boxes.weights, barrier, c, tap,
                    group * conv.O + first_output);
  }

  template <class Block, class F, class S>
  DLOPS_DEVICE static void multiply(Block& block, unsigned char* tile, F& fragments, S& sums) {
    if constexpr (Products::kByGroups) {
      block.groups([&](int group) {
        DLOPS_UNROLL
        for (int bytes = 0; bytes < T::kRowBytes; bytes += 32)
          Products::template start<false>(block, group, sums,
                                          tile + group * 64 * T::kRowBytes + bytes,
                                          tile + kPixels * T::kRowBytes + bytes);
      });
    } else {
      block.warps([&](int warp) {
        const int pixel = Products::first_row(warp);
        const int output = kPixels + Products::first_column(warp);
        Products::multiply_rows(
            block, warp, [&](int row, int chunk) { return chunk_at(tile, pixel + row, chunk); },
            [&](int row, int chunk) { return chunk_at(tile, output + row, chunk); }, fragments,
            sums);
      });
    }
  }

  template <class Block, class S>
  DLOPS_DEVICE void write(Block& block, unsigned char* shared, S& sums, int64_t first_pixel,
                          int first_output, int group) const {
    block.sync();  // the last stage is no longer read
    order.channels_together
        ? write_lines<true>(block, shared, sums, first_pixel, first_output, group)
        : write_lines<false>(block, shared, sums, first_pixel, first_output, group);
    if constexpr (by_boxes) block.publish();  // that they were read, to the next tile's boxes
  }

  DLOPS_DEVICE int64_t place_of(int64_t pixel) const {
    if (order.even) return place.start + pixel * place.col;
    if (!order.even_in_images) return place(OutputPixel(conv, pixel));
    const int plane = conv.OH * conv.OW;
    const int64_t n = divide(pixel, plane);
    return place.start + n * place.image + (pixel - n * plane) * place.col;
  }

  // Lines of a pixel's outputs or, of planes, of an output's pixels.
  template <bool of_pixels, class Block, class S>
  DLOPS_DEVICE void write_lines(Block& block, unsigned char* shared, S& sums, int64_t first_pixel,
                                int first_output, int group) const {
    using L = Lines<scalar_t, of_pixels ? kPixels : kOutputs, of_pixels ? kOutputs : kPixels>;
    static_assert(L::kBytes <= T::kStages * kStageBytes);
    using sum_t = typename T::sum_t;
    const int64_t first_channel = static_cast<int64_t>(group) * conv.O + first_output;
    const int outputs = conv.O - first_output;
    block.threads([&](int thread) {
      const int warp = thread / 32, lane = thread % 32;
      const int first_row = Products::first_row(warp), first = Products::first_column(warp);
      if (bias != nullptr)  // it joins the sums before they are rounded
        sums[thread].add_to_columns(lane, [&](int column) {
          const int o = first + column;  // those past the last are not written
          return static_cast<sum_t>(bias[first_channel + (o < outputs ? o : outputs - 1)]);
        });
      sums[thread].for_each_pair(lane, [&](int row, int column, const sum_t* pair) {
        const int pixel = first_row + row, o = first + column;
        const auto even = static_cast<scalar_t>(pair[0]), odd = static_cast<scalar_t>(pair[1]);
        if constexpr (of_pixels) {
          L::put(shared, pixel, o, even, odd);
        } else {
          L::at(shared, o, pixel) = even;
          L::at(shared, o + 1, pixel) = odd;
        }
      });
    });
    L::write(block, shared, order.together, [&](int line, int number) -> scalar_t* {
      const int64_t pixel = first_pixel + (of_pixels ? line : number);
      const int o = of_pixels ? number : line;
      if (pixel >= conv.pixels() || o >= outputs) return nullptr;
      return output + place_of(pixel) + (first_channel + o) * place.channel;
    });
  }

  // All stages, but of boxes.
  template <class Block, class F, class G>
  DLOPS_DEVICE void copy_and_multiply(Block& block, int64_t first_pixel, int first_output,
                                      int group, const F& stage, const G& multiply_stage) const {
    const scalar_t* weights =
        weight + (static_cast<int64_t>(group) * conv.O + first_output) * weight_row;
    const int steps = static_cast<int>(tiles_of(weight_row, T::kRow));
    typename Block::template PerThread<Windows> windows;
    block.threads([&](int thread) {
      const int64_t first = first_pixel + thread / T::kChunks;
      const OutputPixel step(conv, 32);
      OutputPixel at(conv, first);
      DLOPS_UNROLL
      for (int i = 0; i < kPixelRows; ++i) {
        windows[thread].rows[i] = first + i * 32 < conv.pixels() ? Window<scalar_t>(conv, at, group)
                                                                 : Window<scalar_t>::outside(conv);
        at.advance(conv, step);
      }
    });
    run_stages<Products, T::kStages>(
        block, steps,
        [&](int64_t step) {
          block.threads([&](int thread) {
            copy(block, windows[thread], stage(step), thread, weights, conv.O - first_output,
                 static_cast<int>(step));
          });
        },
        multiply_stage);
  }

  template <class Block>
  DLOPS_DEVICE void operator()(Block& block, unsigned char* shared, int64_t tile) const {
    // Tiles of the same pixels follow one another, so that these are read from memory once.
    const int tiles = static_cast<int>(output_tiles());
    const int64_t groups_and_pixels = divide(tile, tiles);
    const int first_output = static_cast<int>(tile - groups_and_pixels * tiles) * kOutputs;
    const int64_t pixel_tile = divide(groups_and_pixels, conv.groups);
    const int group = static_cast<int>(groups_and_pixels - pixel_tile * conv.groups);
    const int64_t first_pixel = pixel_tile * kPixels;
    const auto stage = [&](int64_t step) {
      return shared + static_cast<int>(step) % T::kStages * kStageBytes;
    };
    typename Block::template PerThread<typename Products::Fragments> fragments;
    typename Block::template PerThread<typename Products::Sums> sums;
    block.threads([&](int thread) { sums[thread] = {}; });
    if constexpr (Products::kByGroups) block.settle(sums);  // or they are zeroed among the products
    const auto multiply_stage = [&](int64_t step) {
      multiply(block, stage(step), fragments, sums);
    };
    if constexpr (by_boxes) {
      const OutputPixel at(conv, first_pixel);
      run_stages_of_boxes<T::kStages>(
          block, reinterpret_cast<uint64_t*>(shared + T::kStages * kStageBytes),
          conv.column_rows() / T::kRow, kStageBytes,
          [&](int64_t step, uint64_t* barrier) {
            copy_boxes(block, barrier, stage(step), at, first_output, group,
                       static_cast<int>(step));
          },
          multiply_stage);
    } else {
      copy_and_multiply(block, first_pixel, first_output, group, stage, multiply_stage);
    }
    if constexpr (Products::kByGroups) block.settle(sums);
    write(block, shared, sums, first_pixel, first_output, group);
  }
};

}  // namespace dlops::cuda
