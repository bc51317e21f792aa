// Boxes of a tensor that Hopper's TMA brings to shared memory by itself: rows of 128 bytes, whose
// chunks of 16 are permuted as in tiles.cuh, with zeros for all that lies outside.
#pragma once

#include <array>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda.h>
#endif

namespace dlops::cuda {

constexpr int kBoxBytes = 128;  // of a row of a box

// float32 numbers are rounded to TF32 as they come.
enum class BoxNumbers { bfloat16, float16, tf32 };
constexpr int bytes_of(BoxNumbers numbers) { return numbers == BoxNumbers::tf32 ? 4 : 2; }

// Rows of numbers, several planes of them side by side: box (c, plane, row) has 128 bytes of
// `box_rows` rows of one plane, from number c and row on. Steps in elements, multiples of 16 bytes.
struct BoxesOfRows {
  BoxNumbers numbers;
  const void* start;
  int64_t columns, planes, rows;
  int64_t plane, row;  // steps
  int box_rows;
};

// The columns of a convolution as the im2col mode has them: 128 bytes of channels of box_pixels
// output pixels at one kernel cell. Images (N, H, W, C) whose pixels follow one another at one
// step; OH x OW windows to an image, the first at -pad.
struct BoxesOfPixels {
  BoxNumbers numbers;
  const void* start;
  int64_t N, H, W, C;
  int64_t pixel;  // step in elements, a multiple of 16 bytes
  int64_t OH, OW, stride_h, stride_w, pad_top, pad_left;
  int box_pixels;

  // The last window of each axis, from the last row or column of the image on.
  int64_t below() const { return (OH - 1) * stride_h - pad_top - (H - 1); }
  int64_t right() const { return (OW - 1) * stride_w - pad_left - (W - 1); }
};

// Whether the driver's limits hold, for a kernel whose last row and column are so far from its
// first.
inline bool boxes_reach(const BoxesOfPixels& boxes, int64_t rows, int64_t columns) {
  const auto axis = [](int64_t pad, int64_t end, int64_t stride, int64_t reach) {
    return -pad >= -128 && -pad <= 127 && end >= -128 && end <= 127 && stride <= 8 && reach <= 255;
  };
  constexpr int64_t kMostImages = (int64_t(1) << 31) - 1, kMostBytes = (int64_t(1) << 40) - 1;
  return axis(boxes.pad_top, boxes.below(), boxes.stride_h, rows) &&
         axis(boxes.pad_left, boxes.right(), boxes.stride_w, columns) && boxes.N <= kMostImages &&
         boxes.pixel * boxes.W * boxes.H <= kMostBytes / bytes_of(boxes.numbers);
}

#if defined(__CUDACC__)

struct BoxMap {
  CUtensorMap map;
};

BoxMap map_rows(const BoxesOfRows& boxes);
BoxMap map_pixels(const BoxesOfPixels& boxes);

#endif

}  // namespace dlops::cuda
