// Images of any strides as (images, pixels, groups, padded channels): what tiles copy by 16 bytes.
// By tiles or, of few channels, by pixels.
#pragma once

#include "cuda/divider.h"
#include "cuda/tiles.cuh"
#include "cuda/write_at_once.cuh"

namespace dlops::cuda {

// Tiles of kSide pixels by kSide channels go through shared memory: neighbouring threads read
// neighbouring pixels, up to 16 bytes at a time where these lie together, and write neighbouring
// channels.
template <class scalar_t>
struct ChannelsLastTiles {
  static constexpr int kThreads = 256, kBlocks = 4, kSide = 64;
  static constexpr int kRow = kSide + (sizeof(scalar_t) == 2 ? 2 : 1);  // apart by a bank
  static constexpr int kSharedBytes = kSide * kRow * static_cast<int>(sizeof(scalar_t));
  static constexpr int kChunk = 16 / sizeof(scalar_t), kChunks = kSide / kChunk;

  const scalar_t* input;
  int64_t image, channel, row, col;  // steps in memory, in elements
  int64_t images, pixels;
  int W, channels, padded;  // channels of a group, and with the zeros after them
  int64_t places;           // groups * padded, whole chunks
  int together;             // pixels of a plane from a multiple of as many on: 16 or 8 bytes, or 1
  scalar_t* output;

  struct alignas(16) Chunk {
    scalar_t values[kChunk];
  };

  DLOPS_HOST_DEVICE int64_t count() const {
    return images * tiles_of(pixels, kSide) * tiles_of(places, kSide);
  }

  // What is at one of `places`, zeros after a group's channels.
  template <class V>
  DLOPS_DEVICE V read(const scalar_t* pixel, int64_t place) const {
    const int64_t group = divide(place, padded);
    const int64_t c = place - group * padded;
    return c < channels ? *reinterpret_cast<const V*>(pixel + (group * channels + c) * channel)
                        : V{};
  }

  template <int width>
  DLOPS_DEVICE void read_pixels(scalar_t* side, int thread, const scalar_t* first_of_image,
                                int64_t first_pixel, int64_t first_place) const {
    struct alignas(width * sizeof(scalar_t)) Pixels {
      scalar_t values[width];
    };
    DLOPS_UNROLL
    for (int i = thread; i < kSide * kSide / width; i += kThreads) {
      const int c = i / (kSide / width), at = i % (kSide / width) * width;
      if (first_place + c >= places || first_pixel + at >= pixels) continue;
      const auto some = read<Pixels>(first_of_image + first_pixel + at, first_place + c);
      DLOPS_UNROLL
      for (int j = 0; j < width; ++j) side[c * kRow + at + j] = some.values[j];
    }
  }

  template <class Block>
  DLOPS_DEVICE void operator()(Block& block, unsigned char* shared, int64_t tile) const {
    scalar_t* const side = reinterpret_cast<scalar_t*>(shared);
    const int64_t across = tiles_of(places, kSide), down = tiles_of(pixels, kSide);
    const int64_t first_place = tile % across * kSide;
    const int64_t first_pixel = tile / across % down * kSide;
    const int64_t n = tile / across / down;
    block.threads([&](int thread) {
      const scalar_t* const first = input + n * image;
      if (together == kChunk)
        return read_pixels<kChunk>(side, thread, first, first_pixel, first_place);
      if (together > 1)
        return read_pixels<(kChunk > 2 ? kChunk / 2 : 1)>(side, thread, first, first_pixel,
                                                          first_place);
      const int64_t at = first_pixel + thread % kSide;
      if (at >= pixels) return;
      const int64_t h = divide(at, W);
      const scalar_t* const pixel = first + h * row + (at - h * W) * col;
      for (int c = thread / kSide; c < kSide && first_place + c < places; c += kThreads / kSide)
        side[c * kRow + thread % kSide] = read<scalar_t>(pixel, first_place + c);
    });
    block.sync();
    block.threads([&](int thread) {
      const int chunk = thread % kChunks;
      const int64_t place = first_place + chunk * kChunk;
      if (place >= places) return;
      for (int i = thread / kChunks; i < kSide; i += kThreads / kChunks) {
        if (first_pixel + i >= pixels) return;
        Chunk values;
        DLOPS_UNROLL
        for (int j = 0; j < kChunk; ++j) values.values[j] = side[(chunk * kChunk + j) * kRow + i];
        write_at_once(output + (n * pixels + first_pixel + i) * places + place, values);
      }
    });
  }
};

// One chunk of one pixel per index: neighbouring threads read neighbouring pixels of a plane and
// write what lies together, without a detour. Of one group.
template <class scalar_t>
struct ChannelsLastPixels {
  static constexpr int kChunk = 16 / sizeof(scalar_t);
  static constexpr int kMostChunks = 2;  // of a pixel: of more, tiles read longer rows

  const scalar_t* input;
  int64_t image, channel, row, col;  // steps in memory, in elements
  Divider chunks, W, H;
  int channels;
  scalar_t* output;

  struct alignas(16) Chunk {
    scalar_t values[kChunk];
  };

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    // Each split leaves the remainder in place of what it divides.
    int64_t chunk = i;
    int64_t w = chunks.split(chunk);
    int64_t h = W.split(w);
    const int64_t n = H.split(h);
    const scalar_t* const pixel = input + n * image + h * row + w * col;
    Chunk values;
    DLOPS_UNROLL
    for (int j = 0; j < kChunk; ++j) {
      const int64_t c = chunk * kChunk + j;
      values.values[j] = c < channels ? pixel[c * channel] : scalar_t(0);
    }
    write_at_once(output + i * kChunk, values);
  }
};

}  // namespace dlops::cuda
