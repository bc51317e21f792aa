// Images of any strides as (images, pixels, groups, padded channels): what tiles copy by 16 bytes.
#pragma once

#include "cuda/tiles.cuh"

namespace dlops::cuda {

// Tiles of kSide pixels by kSide channels go through shared memory: neighbouring threads read
// neighbouring pixels, and write neighbouring channels.
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
  scalar_t* output;

  DLOPS_HOST_DEVICE int64_t count() const {
    return images * tiles_of(pixels, kSide) * tiles_of(places, kSide);
  }

  // The element of one of `places`, which is 0 after a group's channels.
  DLOPS_DEVICE scalar_t read(const scalar_t* pixel, int64_t place) const {
    const int64_t group = divide(place, padded);
    const int64_t c = place - group * padded;
    return c < channels ? pixel[(group * channels + c) * channel] : scalar_t(0);
  }

  template <class Block>
  DLOPS_DEVICE void operator()(Block& block, unsigned char* shared, int64_t tile) const {
    struct alignas(16) Chunk {
      scalar_t values[kChunk];
    };
    scalar_t* const side = reinterpret_cast<scalar_t*>(shared);
    const int64_t across = tiles_of(places, kSide), down = tiles_of(pixels, kSide);
    const int64_t first_place = tile % across * kSide;
    const int64_t first_pixel = tile / across % down * kSide;
    const int64_t n = tile / across / down;
    block.threads([&](int thread) {
      const int64_t at = first_pixel + thread % kSide;
      if (at >= pixels) return;
      const int64_t h = divide(at, W);
      const scalar_t* const pixel = input + n * image + h * row + (at - h * W) * col;
      for (int c = thread / kSide; c < kSide && first_place + c < places; c += kThreads / kSide)
        side[c * kRow + thread % kSide] = read(pixel, first_place + c);
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
        *reinterpret_cast<Chunk*>(output + (n * pixels + first_pixel + i) * places + place) =
            values;
      }
    });
  }
};

}  // namespace dlops::cuda
