// What tiles have in common: the convolution as they see it, the positions that an index stands
// for, and their stages.
//
// A tile's rows lie in shared memory as 128 bytes, in chunks of 16 whose places are permuted from
// row to row, so that neither the copies nor the reads of several rows meet in a bank. Several
// stages of tiles arrive while one is multiplied (products.cuh).
#pragma once

#include <cstdint>

#include "cuda/block.cuh"
#include "cuda/products.cuh"

namespace dlops::cuda {

// A convolution per group, small enough for 32-bit positions within an image, of images whose
// channels are neighbours. C and O are those of one group.
template <class scalar_t>
struct TileConv2d {
  const scalar_t* input;
  int64_t image, group, row, col;  // steps in memory, in elements
  int64_t images;
  int H, W, C, groups;
  int O, R, S, OH, OW;
  int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;

  DLOPS_DEVICE int column_rows() const { return R * S * C; }
  DLOPS_HOST_DEVICE int64_t pixels() const { return images * OH * OW; }
};

// a / b, in 32 bits where that is enough: a division of 64 takes a hundred instructions.
DLOPS_DEVICE int64_t divide(int64_t a, int b) {
  return a >> 32 == 0 ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b))
                      : a / b;
}

DLOPS_HOST_DEVICE constexpr int64_t tiles_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// An output pixel.
struct OutputPixel {
  int64_t n;
  int oh, ow;

  OutputPixel() = default;
  template <class Conv>
  DLOPS_DEVICE OutputPixel(const Conv& conv, int64_t pixel) {
    const int64_t row = divide(pixel, conv.OW);
    n = divide(row, conv.OH);
    oh = static_cast<int>(row - n * conv.OH);
    ow = static_cast<int>(pixel - row * conv.OW);
  }
  // So many pixels on as `step` is from the first one: without a division.
  template <class Conv>
  DLOPS_DEVICE void advance(const Conv& conv, const OutputPixel& step) {
    ow += step.ow;
    oh += step.oh;
    n += step.n;
    if (ow >= conv.OW) {
      ow -= conv.OW;
      ++oh;
    }
    if (oh >= conv.OH) {
      oh -= conv.OH;
      ++n;
    }
  }
};

// The first cell of an output pixel's window: its row and column, and where it is in memory.
template <class scalar_t>
struct Window {
  const scalar_t* start;
  int ih, iw;

  Window() = default;
  DLOPS_DEVICE Window(const TileConv2d<scalar_t>& conv, const OutputPixel& at, int group) {
    ih = at.oh * conv.stride_h - conv.pad_top;
    iw = at.ow * conv.stride_w - conv.pad_left;
    start = conv.input + at.n * conv.image + ih * conv.row + iw * conv.col + group * conv.group;
  }
  // Of no pixel: outside, whatever the cell.
  DLOPS_DEVICE static Window outside(const TileConv2d<scalar_t>& conv) {
    Window window;
    window.start = conv.input;
    window.ih = window.iw = -(1 << 30);
    return window;
  }
  template <class Cell>
  DLOPS_DEVICE bool inside(const TileConv2d<scalar_t>& conv, const Cell& cell) const {
    return static_cast<unsigned>(ih + cell.dh) < static_cast<unsigned>(conv.H) &&
           static_cast<unsigned>(iw + cell.dw) < static_cast<unsigned>(conv.W);
  }
};

// A kernel cell and a channel, a row of the column matrix: rows, columns and elements of memory
// from the first.
struct Cell {
  int dh, dw;
  int64_t offset;

  Cell() = default;
  template <class scalar_t>
  DLOPS_DEVICE Cell(const TileConv2d<scalar_t>& conv, int k) {
    const int tap = k / conv.C, c = k - tap * conv.C;
    dh = tap / conv.S * conv.dilation_h;
    dw = tap % conv.S * conv.dilation_w;
    offset = dh * conv.row + dw * conv.col + c;
  }
};

// How columns come to shared memory: by 16 bytes of neighbouring channels, or by boxes (boxes.h),
// the TMA's.
enum class Copies { chunks, boxes };

// The stages of a product, in their order: copy(step) starts to copy one, multiply(step) multiplies
// it.
template <class Products, int stages, class Block, class F, class G>
DLOPS_DEVICE void run_stages(Block& block, int64_t steps, const F& copy, const G& multiply) {
  const auto copy_stage = [&](int64_t step) {
    if (step < steps) copy(step);
    block.commit();
  };
  for (int step = 0; step < stages - 1; ++step) copy_stage(step);
  for (int64_t step = 0; step < steps; ++step) {
    block.template wait<stages - 2>();
    if constexpr (Products::kByGroups) {
      block.finish_products();
      block.publish();
    }
    block.sync();  // this stage is there for all, and the one before is no longer read
    if constexpr (Products::kByGroups) {
      block.open_products();
      multiply(step);
      block.close_products();
      copy_stage(step + stages - 1);
    } else {
      copy_stage(step + stages - 1);
      multiply(step);
    }
  }
  if constexpr (Products::kByGroups) block.finish_products();
}

// The same of stages of boxes, `bytes` each: copy(step, barrier) is called in one thread. The
// products of one stage are waited for while those of the next are worked out.
template <int stages, class Block, class F, class G>
DLOPS_DEVICE void run_stages_of_boxes(Block& block, uint64_t* barriers, int64_t steps, int bytes,
                                      const F& copy, const G& multiply) {
  const auto copy_stage = [&](int64_t step) {
    if (step >= steps) return;
    uint64_t* const barrier = barriers + step % stages;
    block.expect(barrier, bytes);
    copy(step, barrier);
  };
  block.one([&] { block.open_barriers(barriers, stages); });
  block.sync();  // the barriers are there for all
  block.one([&] {
    for (int step = 0; step < stages; ++step) copy_stage(step);
  });
  for (int64_t step = 0; step < steps; ++step) {
    block.wait_for_phase(barriers + step % stages, static_cast<int>(step / stages % 2));
    block.open_products();
    multiply(step);
    block.close_products();
    if (step == 0) continue;
    block.template finish_products<1>();
    block.sync();  // the stage before is no longer read
    block.one([&] { copy_stage(step - 1 + stages); });
  }
  block.finish_products();
  block.sync();  // nobody waits any more
  block.one([&] { block.close_barriers(barriers, stages); });
}

}  // namespace dlops::cuda
