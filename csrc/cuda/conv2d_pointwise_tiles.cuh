// A 1 x 1 convolution of images whose planes are contiguous, as a product of tiles: no image is
// turned round.
#pragma once

#include "cuda/lines.cuh"
#include "cuda/panels.cuh"
#include "cuda/tiles.cuh"

namespace dlops::cuda {

// Images of planes: the steps to the next image, group and channel, whose pixels lie together.
template <class scalar_t>
struct Planes {
  scalar_t* start;
  int64_t image, group, channel;
};

// output (O x pixels) of each image and group = weight^T (O x C) x image (C x pixels) + bias, by
// tiles of kOutputs x kPixels. Pixels are a multiple of what 16 bytes hold.
template <class scalar_t, int kOutputs, int kPixels,
          template <class, int, int> class Multiply = WarpProducts>
struct PointwiseTiles
    : Panels<scalar_t, kOutputs, kPixels, sizeof(scalar_t) == 8 ? 16 : 32, Multiply> {
  using P = Panels<scalar_t, kOutputs, kPixels, sizeof(scalar_t) == 8 ? 16 : 32, Multiply>;
  using typename P::Products, typename P::T;
  static constexpr int kSharedBytes = T::kStages * P::kStageBytes;

  int64_t images;
  int groups, C, O;  // of one group
  int64_t pixels;
  Planes<const scalar_t> input;
  const scalar_t* weight;  // (groups, C, weight_row)
  int weight_row;          // O, filled up to whole chunks
  const scalar_t* bias;    // or null
  Planes<scalar_t> output;

  DLOPS_HOST_DEVICE int64_t output_tiles() const { return tiles_of(O, kOutputs); }
  DLOPS_HOST_DEVICE int64_t pixel_tiles() const { return tiles_of(pixels, kPixels); }
  DLOPS_HOST_DEVICE int64_t count() const {
    return images * groups * pixel_tiles() * output_tiles();
  }

  // The tile's place: its image and group, the first of its numbers in memory, and where it begins.
  struct Place {
    const scalar_t* input;
    const scalar_t* weight;
    scalar_t* output;
    int group, first_output;
    int64_t first_pixel;
  };
  // Tiles of the same pixels follow one another, so that these are read from memory once.
  DLOPS_DEVICE Place place_of(int64_t tile) const {
    const int tiles = static_cast<int>(output_tiles());
    const int64_t across = divide(tile, tiles);
    const int64_t image_and_group = across / pixel_tiles();
    const int64_t n = divide(image_and_group, groups);
    Place place;
    place.first_output = static_cast<int>(tile - across * tiles) * kOutputs;
    place.first_pixel = (across - image_and_group * pixel_tiles()) * kPixels;
    place.group = static_cast<int>(image_and_group - n * groups);
    place.input = input.start + n * input.image + place.group * input.group + place.first_pixel;
    place.weight = weight + static_cast<int64_t>(place.group) * C * weight_row + place.first_output;
    place.output = output.start + n * output.image + place.group * output.group;
    return place;
  }

  // A thread's part of a stage, which begins at channel c.
  template <class Block>
  DLOPS_DEVICE void copy(Block& block, unsigned char* panels, int thread, const Place& place,
                         int c) const {
    P::template Part<P::kRowPanels>::for_each(
        panels, thread, [&](unsigned char* to, int row, int o, int) {
          block.template copy<16>(to, place.weight + static_cast<int64_t>(c + row) * weight_row + o,
                                  c + row < C && place.first_output + o < weight_row);
        });
    P::template Part<P::kColumnPanels>::for_each(
        panels + P::kRowPanels * P::kPanelBytes, thread,
        [&](unsigned char* to, int row, int pixel, int) {
          block.template copy<16>(to, place.input + (c + row) * input.channel + pixel,
                                  c + row < C && place.first_pixel + pixel < pixels);
        });
  }

  template <class Block, class S>
  DLOPS_DEVICE void write(Block& block, unsigned char* shared, S& sums, const Place& place) const {
    using L = Lines<scalar_t, kOutputs, kPixels>;
    using sum_t = typename T::sum_t;
    static_assert(L::kBytes <= kSharedBytes);
    const int outputs = O - place.first_output;
    const int64_t first_channel = static_cast<int64_t>(place.group) * O + place.first_output;
    block.sync();  // the last stage is no longer read
    block.threads([&](int thread) {
      const int warp = thread / 32;
      const int first = Products::first_row(warp), first_column = Products::first_column(warp);
      if (bias != nullptr)
        sums[thread].add_to_rows(thread % 32, [&](int row) {
          const int o = first + row;  // those past the last are not written
          return static_cast<sum_t>(bias[first_channel + (o < outputs ? o : outputs - 1)]);
        });
      sums[thread].for_each_pair(thread % 32, [&](int row, int column, const sum_t* pair) {
        L::put(shared, first + row, first_column + column, static_cast<scalar_t>(pair[0]),
               static_cast<scalar_t>(pair[1]));
      });
    });
    L::write(block, shared, T::kChunk, [&](int o, int pixel) -> scalar_t* {
      if (o >= outputs || place.first_pixel + pixel >= pixels) return nullptr;
      return place.output + (place.first_output + o) * output.channel + place.first_pixel + pixel;
    });
  }

  template <class Block>
  DLOPS_DEVICE void operator()(Block& block, unsigned char* shared, int64_t tile) const {
    const Place place = place_of(tile);
    const auto stage = [&](int64_t step) {
      return shared + static_cast<int>(step) % T::kStages * P::kStageBytes;
    };
    typename Block::template PerThread<typename Products::Fragments> fragments;
    typename Block::template PerThread<typename Products::Sums> sums;
    block.threads([&](int thread) { sums[thread] = {}; });
    if constexpr (Products::kByGroups) block.settle(sums);  // or they are zeroed among the products
    run_stages<Products, T::kStages>(
        block, tiles_of(C, P::kDepth),
        [&](int64_t step) {
          block.threads([&](int thread) {
            copy(block, stage(step), thread, place, static_cast<int>(step) * P::kDepth);
          });
        },
        [&](int64_t step) { P::multiply(block, stage(step), fragments, sums); });
    if constexpr (Products::kByGroups) block.settle(sums);
    write(block, shared, sums, place);
  }
};

}  // namespace dlops::cuda
