// What tiles multiplied by the tensor cores have in common (16-bit numbers, or float32 as TF32):
// the convolution as they see it, the positions that an index stands for, and a warp's share of the
// sums.
//
// A tile's rows lie in shared memory as 128 bytes, in chunks of 16 whose places are permuted from
// row to row, so that neither the copies nor the reads of eight rows meet in a bank. Several stages
// of tiles arrive while one is multiplied.
#pragma once

#include <cstdint>

#include "cuda/block.cuh"

namespace dlops::cuda {

// A convolution per group, small enough for 32-bit positions within an image, of images of any
// strides. C and O are those of one group.
template <class scalar_t>
struct TensorCoreConv2d {
  const scalar_t* input;
  int64_t image, group, channel, row, col;  // steps in memory, in elements
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

  template <class Conv>
  DLOPS_DEVICE OutputPixel(const Conv& conv, int64_t pixel) {
    const int64_t row = divide(pixel, conv.OW);
    n = divide(row, conv.OH);
    oh = static_cast<int>(row - n * conv.OH);
    ow = static_cast<int>(pixel - row * conv.OW);
  }
};

// The first cell of an output pixel's window: its row and column, and where it is in memory.
template <class scalar_t>
struct Window {
  const scalar_t* start;
  int ih, iw;

  Window() = default;
  DLOPS_DEVICE Window(const TensorCoreConv2d<scalar_t>& conv, int64_t pixel, int64_t end,
                      int group) {
    if (pixel >= end) {
      start = conv.input;
      ih = iw = -(1 << 30);  // outside, whatever the cell
      return;
    }
    const OutputPixel at(conv, pixel);
    ih = at.oh * conv.stride_h - conv.pad_top;
    iw = at.ow * conv.stride_w - conv.pad_left;
    start = conv.input + at.n * conv.image + ih * conv.row + iw * conv.col + group * conv.group;
  }
  template <class Cell>
  DLOPS_DEVICE bool inside(const TensorCoreConv2d<scalar_t>& conv, const Cell& cell) const {
    return static_cast<unsigned>(ih + cell.dh) < static_cast<unsigned>(conv.H) &&
           static_cast<unsigned>(iw + cell.dw) < static_cast<unsigned>(conv.W);
  }
};

// A kernel cell and a channel, a row of the column matrix: rows, columns and elements of memory
// from the first.
struct Cell {
  int dh, dw;
  int64_t offset;

  template <class scalar_t>
  DLOPS_DEVICE Cell(const TensorCoreConv2d<scalar_t>& conv, int k) {
    const int tap = k / conv.C, c = k - tap * conv.C;
    dh = tap / conv.S * conv.dilation_h;
    dw = tap % conv.S * conv.dilation_w;
    offset = dh * conv.row + dw * conv.col + c * conv.channel;
  }
};

// The same worked out ahead, for the paths that read element by element: at most so many, with
// which two blocks of 128 x 64 sums still share sm_80's memory.
constexpr int kMostTaps = 384;
struct alignas(16) Tap {
  int dh, dw, offset, unused;

  template <class scalar_t>
  DLOPS_DEVICE Tap(const TensorCoreConv2d<scalar_t>& conv, int k) : dh(1 << 29), dw(0), offset(0) {
    if (k >= conv.column_rows()) return;  // outside, whatever the window
    const Cell cell(conv, k);
    dh = cell.dh;
    dw = cell.dw;
    offset = static_cast<int>(cell.offset);
  }
};

// 16 bytes of a row of the column matrix: those cells of one window.
template <class scalar_t>
DLOPS_DEVICE void gather(unsigned char* chunk, const TensorCoreConv2d<scalar_t>& conv,
                         const Window<scalar_t>& window, const Tap* taps) {
  constexpr int count = 16 / sizeof(scalar_t);
  struct alignas(16) Chunk {
    scalar_t values[count];
  } cells;
  DLOPS_UNROLL
  for (int i = 0; i < count; ++i)
    cells.values[i] = window.inside(conv, taps[i]) ? window.start[taps[i].offset] : scalar_t(0);
  *reinterpret_cast<Chunk*>(chunk) = cells;
}

// How columns come to shared memory: by 16 bytes, where channels are neighbours and fill them;
// looked up among the taps and gathered one by one, in first layers; or by boxes (boxes.h), the
// TMA's.
enum class Copies { chunks, gathered, boxes };

// Bytes, threads and stages of every tile.
template <class scalar_t>
struct Tile {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kBlocks = 2;  // side by side, so that one computes while the other waits
  static constexpr int kRowBytes = 128, kChunks = kRowBytes / 16;  // of 16 bytes
  static constexpr int kStages = 3;
  static constexpr int kBarrierBytes = kStages * 8;
  static constexpr int kChunk = 16 / sizeof(scalar_t);  // elements
  static constexpr int kRow = kChunks * kChunk;
};

// The sums that a thread holds: M by N products of 16 x 8.
template <int M, int N>
struct ThreadSums {
  float values[M][N][4];

  // Calls f(which, row, column, sum) for each, rows and columns counted from the warp's first.
  // `which` numbers the thread's rows, and is known to the compiler: what it indexes stays in
  // registers.
  template <class F>
  DLOPS_DEVICE void for_each(int lane, const F& f) const {
    DLOPS_UNROLL
    for (int i = 0; i < M * N * 4; ++i) {
      const int m = i / (N * 4), n = i / 4 % N, place = i % 4;
      f(m * 2 + place / 2, m * 16 + place / 2 * 8 + lane / 4, n * 8 + lane % 4 * 2 + place % 2,
        values[m][n][place]);
    }
  }
};

// The sums of a tile of rows x columns, shared out among the warps: each has 32 columns of some
// rows, which it multiplies as products of 16 x 8.
template <class scalar_t, int rows, int columns>
struct WarpProducts {
  static constexpr int kAcross = columns / 32, kRows = rows * kAcross / Tile<scalar_t>::kWarps;
  static constexpr int M = kRows / 16, N = 4;
  static constexpr bool kByGroups = false;
  static_assert(M >= 1 && M * 16 * Tile<scalar_t>::kWarps == rows * kAcross);
  DLOPS_DEVICE static int first_row(int warp) { return warp / kAcross * kRows; }
  DLOPS_DEVICE static int first_column(int warp) { return warp % kAcross * 32; }

  struct Fragments {
    uint32_t a[M][4], b[N][2];
  };
  using Sums = ThreadSums<M, N>;

  template <class Block, class F, class S>
  DLOPS_DEVICE static void add(Block& block, int warp, F& fragments, S& sums) {
    DLOPS_UNROLL
    for (int i = 0; i < M * N; ++i) {
      const int m = i / N, n = i % N;
      block.template multiply_add<scalar_t>(
          warp, [&](int thread) { return sums[thread].values[m][n]; },
          [&](int thread) { return fragments[thread].a[m]; },
          [&](int thread) { return fragments[thread].b[n]; });
    }
  }
};

// The same shared out among two groups of four warps (wgmma): each has half the rows, a warp 16 of
// them, and every column.
template <class scalar_t, int rows, int columns>
struct GroupProducts {
  static constexpr int M = 1, N = columns / 8;
  static constexpr bool kByGroups = true;
  static_assert(rows == 128 && Tile<scalar_t>::kThreads == 256);
  DLOPS_DEVICE static int first_row(int warp) { return warp * 16; }
  DLOPS_DEVICE static int first_column(int) { return 0; }

  struct Fragments {};  // the factors stay in shared memory
  using Sums = ThreadSums<M, N>;

  // Starts a product of 32 bytes each.
  template <bool transposed, class Block, class S>
  DLOPS_DEVICE static void start(Block& block, int group, S& sums, const unsigned char* a,
                                 const unsigned char* b, int leading = 0) {
    block.template start_product<scalar_t, columns, transposed>(
        group, [&](int thread) { return &sums[thread].values[0][0][0]; }, a, b, leading);
  }
};

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
