// A convolution as a product of tiles, whose column matrix exists in shared memory alone.
#pragma once

#include <type_traits>
#include <variant>

#include "cuda/boxes.h"
#include "cuda/tiles.cuh"

namespace dlops::cuda {

// Where the outputs go, in any memory format: the first one, and the steps to the next.
struct OutputPlace {
  int64_t start, image, channel, row, col;
  DLOPS_DEVICE int64_t operator()(const OutputPixel& at) const {
    return start + at.n * image + at.oh * row + at.ow * col;
  }
};

// How outputs are written: one by one or, by way of shared memory, 16 bytes of a pixel's channels
// or of a plane's pixels at a time.
enum class Writes { single, channels, pixels };

// `outputs`: channels of a group; `pixels`: of a plane.
inline Writes writes_of(const OutputPlace& place, int64_t outputs, int64_t pixels, int64_t OW,
                        int64_t chunk, const void* output) {
  const auto whole = [&](auto... steps) { return ((steps % chunk == 0) && ...); };
  if (reinterpret_cast<uintptr_t>(output) % 16 != 0 || !whole(place.start, place.image))
    return Writes::single;
  if (place.channel == 1 && whole(outputs, place.row, place.col)) return Writes::channels;
  if (place.col == 1 && place.row == OW && whole(pixels, place.channel)) return Writes::pixels;
  return Writes::single;
}

// output (pixels x O) = columns (pixels x K) x weight^T (K x O) + bias, by tiles of kPixels x
// kOutputs. Multiply is WarpProducts, ThreadProducts or GroupProducts, which alone read boxes: then
// conv.C counts whole boxes of channels.
template <class scalar_t, int kPixels, int kOutputs, Copies copies,
          template <class, int, int> class Multiply = WarpProducts>
struct Conv2dTiles : Tile<scalar_t> {
  using T = Tile<scalar_t>;
  using Room = TileRoom<scalar_t, kPixels, kOutputs>;
  static constexpr int kBlocks = Room::kBlocks, kStages = Room::kStages;
  using Products = Multiply<scalar_t, kPixels, kOutputs>;
  static constexpr int M = Products::M;
  static constexpr Copies kCopies = copies;
  static constexpr bool gathers = copies == Copies::gathered, by_boxes = copies == Copies::boxes;
  static constexpr int kPixelRows = kPixels / 32, kWeightRows = kOutputs / 32;  // a thread copies
  static constexpr int kStageBytes = (kPixels + kOutputs) * T::kRowBytes;
  static constexpr int kTapBytes = gathers ? kMostTaps * static_cast<int>(sizeof(Tap)) : 0;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + (by_boxes ? Room::kBarrierBytes : kTapBytes);

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
  Writes writes;
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
  DLOPS_DEVICE void copy(Block& block, const Windows& windows, unsigned char* tile, const Tap* taps,
                         int thread, const scalar_t* weights, int outputs, int step) const {
    const int chunk = thread % T::kChunks, row = thread / T::kChunks;
    const int k = step * T::kRow + chunk * T::kChunk;
    if constexpr (gathers) {
      DLOPS_UNROLL
      for (int i = 0; i < kPixelRows; ++i)
        gather(chunk_at(tile, row + i * 32, chunk), conv, windows.rows[i], taps + k);
    } else {
      const Cell cell(conv, k);
      DLOPS_UNROLL
      for (int i = 0; i < kPixelRows; ++i)
        block.template copy<16>(chunk_at(tile, row + i * 32, chunk),
                                windows.rows[i].start + cell.offset,
                                k < weight_row && windows.rows[i].inside(conv, cell));
    }
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
          Products::template start<false>(
              block, group, sums, [&](int row) { return tile + row * T::kRowBytes + bytes; },
              [&](int column) { return tile + (kPixels + column) * T::kRowBytes + bytes; });
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

  // Calls f(which, row, output, value) for each result of a thread, rows and outputs counted from
  // the tile's first. The bias joins the sums before they are rounded.
  template <class F>
  DLOPS_DEVICE void for_each_result(const typename Products::Sums& sums, int thread,
                                    int first_output, int group, const F& f) const {
    const int warp = thread / 32;
    const int first_row = Products::first_row(warp), first = Products::first_column(warp);
    sums.for_each(thread % 32, [&](int which, int row, int column, typename T::sum_t sum) {
      const int o = first + column;
      if (first_output + o >= conv.O) return;
      if (bias != nullptr)
        sum += static_cast<typename T::sum_t>(
            bias[static_cast<int64_t>(group) * conv.O + first_output + o]);
      f(which, first_row + row, o, static_cast<scalar_t>(sum));
    });
  }

  // One by one.
  DLOPS_DEVICE void write(const typename Products::Sums& sums, int thread, int64_t first_pixel,
                          int first_output, int group) const {
    const int64_t pixel = first_pixel + Products::first_row(thread / 32) + thread % 32 / 4;
    int64_t to[M * 2];
    DLOPS_UNROLL
    for (int i = 0; i < M * 2; ++i) {
      const int64_t own = pixel + Products::Sums::row_of(i);
      to[i] = own < conv.pixels() ? place(OutputPixel(conv, own)) : -1;
    }
    for_each_result(sums, thread, first_output, group, [&](int which, int, int o, scalar_t value) {
      if (to[which] < 0) return;
      const int64_t channel = static_cast<int64_t>(group) * conv.O + first_output;
      output[to[which] + (channel + o) * place.channel] = value;
    });
  }

  // A line of results in shared memory; 16 bytes more, so that those of a warp lie in all banks.
  static constexpr int line_bytes(int numbers) {
    return numbers * static_cast<int>(sizeof(scalar_t)) + 16;
  }
  static_assert(kPixels * line_bytes(kOutputs) <= kSharedBytes);
  static_assert(kOutputs * line_bytes(kPixels) <= kSharedBytes);
  struct alignas(16) Chunk {
    unsigned char bytes[16];
  };

  template <class Block, class S>
  DLOPS_DEVICE void write_chunks(Block& block, unsigned char* shared, S& sums, int64_t first_pixel,
                                 int first_output, int group) const {
    const bool of_channels = writes == Writes::channels;
    const int line = of_channels ? line_bytes(kOutputs) : line_bytes(kPixels);
    block.sync();  // the last stage is no longer read
    block.threads([&](int thread) {
      for_each_result(sums[thread], thread, first_output, group,
                      [&](int, int row, int o, scalar_t value) {
                        const int at = of_channels ? row : o, number = of_channels ? o : row;
                        reinterpret_cast<scalar_t*>(shared + at * line)[number] = value;
                      });
    });
    block.sync();
    block.threads([&](int thread) {
      const int chunks = (of_channels ? kOutputs : kPixels) / T::kChunk;
      for (int i = thread; i < kPixels * kOutputs / T::kChunk; i += T::kThreads) {
        const int at = i / chunks, number = i % chunks * T::kChunk;
        const int64_t pixel = first_pixel + (of_channels ? at : number);
        const int o = first_output + (of_channels ? number : at);
        if (pixel >= conv.pixels() || o >= conv.O) continue;
        const int64_t channel = static_cast<int64_t>(group) * conv.O + o;
        scalar_t* const to = output + place(OutputPixel(conv, pixel)) + channel * place.channel;
        *reinterpret_cast<Chunk*>(to) =
            *reinterpret_cast<const Chunk*>(shared + at * line + number * sizeof(scalar_t));
      }
    });
    if constexpr (by_boxes) block.publish();  // that it was read, to the next tile's boxes
  }

  // All stages, but of boxes.
  template <class Block, class F, class G>
  DLOPS_DEVICE void copy_and_multiply(Block& block, unsigned char* shared, int64_t first_pixel,
                                      int first_output, int group, const F& stage,
                                      const G& multiply_stage) const {
    const scalar_t* weights =
        weight + (static_cast<int64_t>(group) * conv.O + first_output) * weight_row;
    const int steps = static_cast<int>(tiles_of(weight_row, T::kRow));
    Tap* const taps = reinterpret_cast<Tap*>(shared + kStages * kStageBytes);
    typename Block::template PerThread<Windows> windows;
    block.threads([&](int thread) {
      for (int i = 0; i < kPixelRows; ++i)
        windows[thread].rows[i] = Window<scalar_t>(conv, first_pixel + thread / T::kChunks + i * 32,
                                                   conv.pixels(), group);
      if constexpr (gathers)
        for (int k = thread; k < steps * T::kRow; k += T::kThreads) taps[k] = Tap(conv, k);
    });
    if constexpr (gathers) block.sync();
    run_stages<Products, kStages>(
        block, steps,
        [&](int64_t step) {
          block.threads([&](int thread) {
            copy(block, windows[thread], stage(step), taps, thread, weights, conv.O - first_output,
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
      return shared + static_cast<int>(step) % kStages * kStageBytes;
    };
    typename Block::template PerThread<typename Products::Fragments> fragments;
    typename Block::template PerThread<typename Products::Sums> sums;
    block.threads([&](int thread) { sums[thread] = {}; });
    const auto multiply_stage = [&](int64_t step) {
      multiply(block, stage(step), fragments, sums);
    };
    if constexpr (by_boxes) {
      const OutputPixel at(conv, first_pixel);
      run_stages_of_boxes<kStages>(
          block, reinterpret_cast<uint64_t*>(shared + kStages * kStageBytes),
          conv.column_rows() / T::kRow, kStageBytes,
          [&](int64_t step, uint64_t* barrier) {
            copy_boxes(block, barrier, stage(step), at, first_output, group,
                       static_cast<int>(step));
          },
          multiply_stage);
    } else {
      copy_and_multiply(block, shared, first_pixel, first_output, group, stage, multiply_stage);
    }
    if constexpr (Products::kByGroups) block.settle(sums);
    if (writes != Writes::single)
      return write_chunks(block, shared, sums, first_pixel, first_output, group);
    block.threads(
        [&](int thread) { write(sums[thread], thread, first_pixel, first_output, group); });
  }
};

}  // namespace dlops::cuda
