// Images as the tiles that Winograd's algorithm transforms (simd/conv2d_winograd.h).
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "cpu/conv2d_strip_copies.h"

namespace dlops::cpu {

// The step from position to position for `count` numbers of each: one line of the cache more, so
// that the positions of a tile do not all stand in the same places of the cache, and that a product
// may read a vector from wherever the last row of a position has an element.
inline int64_t position_step(int64_t count) { return ceil_div(count, 16) * 16 + 16; }

// How the tiles of a batch are shared out: some rows of them, of one image or of several.
struct TileCut {
  int64_t images = 1, rows;
  // Of so many tiles at a time at most, or one row.
  TileCut(int64_t batch, int64_t tiles_h, int64_t tiles_w, int64_t most) {
    const int64_t image = tiles_h * tiles_w;
    if (image > most) {
      rows = std::clamp<int64_t>(most / tiles_w, 1, tiles_h);
      rows = ceil_div(tiles_h, ceil_div(tiles_h, rows));  // evenly
    } else {
      rows = tiles_h;
      images = std::clamp<int64_t>(most / image, 1, batch);
    }
  }
};

// An image's tiles of size x size pixels, a row of them each two rows of pixels on, from pad_top
// rows and pad_left columns before the image on.
template <int64_t size, class scalar_t>
class Tiles {
 public:
  Tiles(const ImageView<scalar_t>& images, int64_t pad_top, int64_t pad_left, int64_t tiles_w)
      : images_(images), pad_top_(pad_top), pad_left_(pad_left), tiles_w_(tiles_w) {}

  // What read() needs for `rows` rows of tiles of so many channels.
  int64_t strip_size(int64_t rows, int64_t channels) const {
    return in_place() ? 0 : std::min(images_.H, 2 * rows + size - 2) * images_.W * channels;
  }
  // Calls transform(pixels) for rows of tiles of image n, with the places of each tile's pixels,
  // row by row, whose `channels` stand side by side. Outside of the image they are `zeros`.
  template <class Transform>
  void read(int64_t n, Interval channels, Interval rows, float* strip, const float* zeros,
            const Transform& transform) const {
    const int64_t begin = std::clamp<int64_t>(2 * rows.begin - pad_top_, 0, images_.H);
    const int64_t end = std::clamp<int64_t>(2 * rows.end + size - 2 - pad_top_, begin, images_.H);
    const int64_t step = in_place() ? images_.channels : length(channels);
    const float* const first = pixels_of(n, channels, {begin, end}, strip);
    const int64_t row = images_.W * step;
    std::array<const float*, size * size> pixels;
    for (int64_t y = rows.begin; y < rows.end; ++y) {
      const int64_t h = 2 * y - pad_top_;
      for (int64_t x = 0; x < tiles_w_; ++x) {
        const int64_t w = 2 * x - pad_left_;
        const float* const corner = first + (h - begin) * row + w * step;
        const bool whole = h >= 0 && h + size <= images_.H && w >= 0 && w + size <= images_.W;
        for (int64_t i = 0; i < size; ++i) {
          for (int64_t j = 0; j < size; ++j) {
            const bool inside =
                whole || (h + i >= 0 && h + i < images_.H && w + j >= 0 && w + j < images_.W);
            pixels[static_cast<size_t>(size * i + j)] =
                inside ? corner + i * row + j * step : zeros;
          }
        }
        transform(pixels.data());
      }
    }
  }

 private:
  bool in_place() const { return images_.last && std::is_same_v<scalar_t, float>; }
  // Rows of an image where they are, or else in the strip.
  const float* pixels_of(int64_t n, Interval channels, Interval rows, float* strip) const {
    if constexpr (std::is_same_v<scalar_t, float>)
      if (images_.last) return images_.at(n, channels.begin, rows.begin, 0);
    fill_strip(images_, n, channels, rows, {0, images_.W}, strip);
    return strip;
  }
  ImageView<scalar_t> images_;
  int64_t pad_top_, pad_left_, tiles_w_;
};

}  // namespace dlops::cpu
