// Tiles of the products that a convolution is, multiplied by the tensor cores (16-bit numbers, or
// float32 as TF32), whose column matrix exists in shared memory alone.
//
// What is read is channels_last. A tile's rows lie in shared memory as 128 bytes, in chunks of 16
// whose places are permuted from row to row, so that neither the copies nor the reads of eight rows
// meet in a bank. Several stages of tiles arrive while one is multiplied.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/block.cuh"

namespace dlops::cuda {

// A convolution as these kernels see it: per group, and small enough for 32-bit positions within an
// image. C and O are those of one group.
template <class scalar_t>
struct TensorCoreConv2d {
  const scalar_t* input;
  int64_t images;
  int H, W, C, groups;
  int O, R, S, OH, OW;
  int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;

  DLOPS_DEVICE int column_rows() const { return R * S * C; }
  DLOPS_DEVICE int64_t input_pixel() const { return static_cast<int64_t>(groups) * C; }
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

// An output pixel, and the input pixel under the first cell of its window.
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

// A kernel cell and a channel: a row of the column matrix.
struct Cell {
  int dh, dw, c;  // rows, columns and channels from the first

  template <class Conv>
  DLOPS_DEVICE Cell(const Conv& conv, int k) {
    const int tap = k / conv.C;
    c = k - tap * conv.C;
    dh = tap / conv.S * conv.dilation_h;
    dw = tap % conv.S * conv.dilation_w;
  }
  template <class Conv>
  DLOPS_DEVICE int64_t offset(const Conv& conv) const {
    return (static_cast<int64_t>(dh) * conv.W + dw) * conv.input_pixel() + c;
  }
};

// Whether a row or column lies in [0, size).
DLOPS_DEVICE bool inside(int at, int size) {
  return static_cast<unsigned>(at) < static_cast<unsigned>(size);
}

// What both kernels have in common: bytes, threads and stages.
template <class scalar_t>
struct Tile {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kBlocks = 2;  // side by side, so that one computes while the other waits
  static constexpr int kRowBytes = 128, kChunks = kRowBytes / 16;  // of 16 bytes
  static constexpr int kStages = 3;
  static constexpr int kChunk = 16 / sizeof(scalar_t);  // elements
  static constexpr int kRow = kChunks * kChunk;
};

// The sums of a tile of rows x columns, shared out among the warps: each has 32 columns of some
// rows, which it multiplies as products of 16 x 8.
template <class scalar_t, int rows, int columns>
struct WarpProducts {
  static constexpr int kAcross = columns / 32, kRows = rows * kAcross / Tile<scalar_t>::kWarps;
  static constexpr int M = kRows / 16, N = 4;
  static_assert(M >= 1 && M * 16 * Tile<scalar_t>::kWarps == rows * kAcross);
  DLOPS_DEVICE static int first_row(int warp) { return warp / kAcross * kRows; }
  DLOPS_DEVICE static int first_column(int warp) { return warp % kAcross * 32; }

  struct Fragments {
    uint32_t a[M][4], b[N][2];
  };
  struct Sums {
    float values[M][N][4];
  };

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

  // Calls f(which, row, column, sum) for the sums that a thread of the warp holds. `which` numbers
  // its rows, and is known to the compiler: what it indexes stays in registers.
  template <class F>
  DLOPS_DEVICE static void for_each(const Sums& sums, int lane, const F& f) {
    DLOPS_UNROLL
    for (int i = 0; i < M * N * 4; ++i) {
      const int m = i / (N * 4), n = i / 4 % N, place = i % 4;
      f(m * 2 + place / 2, m * 16 + place / 2 * 8 + lane / 4, n * 8 + lane % 4 * 2 + place % 2,
        sums.values[m][n][place]);
    }
  }
};

// ------------------------------------------------------------------------------- the convolution

// Where the outputs go, in any memory format: the first one, and the steps to the next.
struct OutputPlace {
  int64_t start, image, channel, row, col;
  DLOPS_DEVICE int64_t operator()(const OutputPixel& at) const {
    return start + at.n * image + at.oh * row + at.ow * col;
  }
};

// output (pixels x O) = columns (pixels x K) x weight^T (K x O) + bias, by tiles of kPixels x
// kOutputs. `copy_bytes` are copied at once: what the channels of a group are a multiple of.
template <class scalar_t, int kPixels, int kOutputs, int copy_bytes>
struct Conv2dTiles : Tile<scalar_t> {
  using T = Tile<scalar_t>;
  static constexpr int kSharedBytes = T::kStages * (kPixels + kOutputs) * T::kRowBytes;
  using Products = WarpProducts<scalar_t, kPixels, kOutputs>;
  static constexpr int M = Products::M, N = Products::N;
  static constexpr int kParts = 16 / copy_bytes, kPart = copy_bytes / sizeof(scalar_t);
  static constexpr int kPixelRows = kPixels / 32, kWeightRows = kOutputs / 32;  // a thread copies

  TensorCoreConv2d<scalar_t> conv;
  const scalar_t* weight;
  const scalar_t* bias;  // or null
  scalar_t* output;
  OutputPlace place;

  DLOPS_HOST_DEVICE int64_t output_tiles() const { return tiles_of(conv.O, kOutputs); }
  DLOPS_HOST_DEVICE int64_t count() const {
    return conv.groups * output_tiles() * tiles_of(conv.pixels(), kPixels);
  }

  // The windows whose columns a thread copies.
  struct Windows {
    const scalar_t* start[kPixelRows];
    int ih[kPixelRows], iw[kPixelRows];
  };

  DLOPS_DEVICE static unsigned char* chunk_at(unsigned char* tile, int row, int chunk) {
    return tile + row * T::kRowBytes + (chunk ^ (row & 7)) * 16;
  }

  DLOPS_DEVICE void start(Windows& windows, int row, int64_t first_pixel, int group) const {
    for (int i = 0; i < kPixelRows; ++i) {
      const int64_t pixel = first_pixel + row + i * 32;
      if (pixel >= conv.pixels()) {
        windows.start[i] = conv.input;
        windows.ih[i] = windows.iw[i] = -(1 << 30);  // outside, whatever the cell
        continue;
      }
      const OutputPixel at(conv, pixel);
      windows.ih[i] = at.oh * conv.stride_h - conv.pad_top;
      windows.iw[i] = at.ow * conv.stride_w - conv.pad_left;
      windows.start[i] =
          conv.input + group * conv.C +
          ((at.n * conv.H + windows.ih[i]) * conv.W + windows.iw[i]) * conv.input_pixel();
    }
  }

  // A thread's part of stage `step`: one chunk of some rows of both tiles.
  template <class Block>
  DLOPS_DEVICE void copy(Block& block, const Windows& windows, unsigned char* tile, int thread,
                         const scalar_t* weights, int outputs, int step) const {
    const int chunk = thread % T::kChunks, row = thread / T::kChunks;
    const int K = conv.column_rows();
    DLOPS_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int k = step * T::kRow + chunk * T::kChunk + part * kPart;
      const Cell cell(conv, k);
      const int64_t offset = cell.offset(conv);
      DLOPS_UNROLL
      for (int i = 0; i < kPixelRows; ++i)
        block.template copy<copy_bytes>(chunk_at(tile, row + i * 32, chunk) + part * copy_bytes,
                                        windows.start[i] + offset,
                                        k < K && inside(windows.ih[i] + cell.dh, conv.H) &&
                                            inside(windows.iw[i] + cell.dw, conv.W));
      DLOPS_UNROLL
      for (int i = 0; i < kWeightRows; ++i) {
        const int o = row + i * 32;
        block.template copy<copy_bytes>(chunk_at(tile, kPixels + o, chunk) + part * copy_bytes,
                                        weights + static_cast<int64_t>(o) * K + k,
                                        k < K && o < outputs);
      }
    }
  }

  // The products of one stage that a warp has to add.
  template <class Block, class F, class S>
  DLOPS_DEVICE static void multiply(Block& block, int warp, unsigned char* tile, F& fragments,
                                    S& sums) {
    const int pixel = Products::first_row(warp);
    const int output = kPixels + Products::first_column(warp);
    DLOPS_UNROLL
    for (int step = 0; step < T::kChunks / 2; ++step) {
      DLOPS_UNROLL
      for (int m = 0; m < M; ++m)
        block.load_matrices(
            warp, [&](int thread) { return fragments[thread].a[m]; },
            [&](int lane) {
              return chunk_at(tile, pixel + m * 16 + lane % 16, step * 2 + lane / 16);
            });
      DLOPS_UNROLL
      for (int n = 0; n < N; n += 2)
        block.load_matrices(
            warp, [&](int thread) { return &fragments[thread].b[n][0]; },
            [&](int lane) {
              return chunk_at(tile, output + n * 8 + lane / 16 * 8 + lane % 8,
                              step * 2 + lane / 8 % 2);
            });
      Products::add(block, warp, fragments, sums);
    }
  }

  // The bias joins the sums before they are rounded.
  DLOPS_DEVICE void store(const typename Products::Sums& sums, int thread, int64_t first_pixel,
                          int first_output, int group) const {
    const int warp = thread / 32, lane = thread % 32;
    const int64_t pixel = first_pixel + Products::first_row(warp) + lane / 4;
    int64_t to[M * 2];  // of rows lane / 4, and every eighth from there on
    DLOPS_UNROLL
    for (int i = 0; i < M * 2; ++i)
      to[i] = pixel + i * 8 < conv.pixels() ? place(OutputPixel(conv, pixel + i * 8)) : -1;
    Products::for_each(sums, lane, [&](int which, int, int column, float sum) {
      const int o = first_output + Products::first_column(warp) + column;
      if (to[which] < 0 || o >= conv.O) return;
      const int64_t channel = static_cast<int64_t>(group) * conv.O + o;
      if (bias != nullptr) sum += static_cast<float>(bias[channel]);
      output[to[which] + channel * place.channel] = static_cast<scalar_t>(sum);
    });
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
    const scalar_t* weights =
        weight + (static_cast<int64_t>(group) * conv.O + first_output) * conv.column_rows();
    const int steps = static_cast<int>(tiles_of(conv.column_rows(), T::kRow));
    const auto stage = [&](int step) {
      return shared + step % T::kStages * (kPixels + kOutputs) * T::kRowBytes;
    };

    typename Block::template PerThread<Windows> windows;
    typename Block::template PerThread<typename Products::Fragments> fragments;
    typename Block::template PerThread<typename Products::Sums> sums;
    block.threads([&](int thread) {
      sums[thread] = {};
      start(windows[thread], thread / T::kChunks, first_pixel, group);
    });
    const auto copy_stage = [&](int step) {
      if (step < steps)
        block.threads([&](int thread) {
          copy(block, windows[thread], stage(step), thread, weights, conv.O - first_output, step);
        });
      block.commit();
    };
    for (int step = 0; step < T::kStages - 1; ++step) copy_stage(step);
    for (int step = 0; step < steps; ++step) {
      block.template wait<T::kStages - 2>();
      block.sync();  // this stage is there for all, and the one before is no longer read
      copy_stage(step + T::kStages - 1);
      block.warps([&](int warp) { multiply(block, warp, stage(step), fragments, sums); });
    }
    block.threads(
        [&](int thread) { store(sums[thread], thread, first_pixel, first_output, group); });
  }
};

// -------------------------------------------------------------------- the gradient of the weight

// sums (parts, groups, O, K) = grad_output^T (O x pixels) x columns (pixels x K), where each part
// adds up `part_pixels` pixels, by tiles of kOutputs x kColumns.
template <class scalar_t, int kOutputs, int kColumns, int copy_bytes>
struct GradWeightTiles : Tile<scalar_t> {
  using T = Tile<scalar_t>;
  static constexpr int kBlocks = sizeof(scalar_t) == 4 && kOutputs == 128 ? 1 : 2;  // or it spills
  static constexpr int kPixels = 32;                                                // a stage
  // A stage holds panels of 32 pixels by 128 bytes.
  static constexpr int kPanelBytes = kPixels * T::kRowBytes;
  static constexpr int kOutputPanels = kOutputs / T::kRow, kColumnPanels = kColumns / T::kRow;
  static constexpr int kStageBytes = (kOutputPanels + kColumnPanels) * kPanelBytes;
  static constexpr int kSharedBytes = T::kStages * kStageBytes;
  using Products = WarpProducts<scalar_t, kOutputs, kColumns>;
  static constexpr int M = Products::M, N = Products::N;
  static constexpr int kParts = 16 / copy_bytes, kPart = copy_bytes / sizeof(scalar_t);
  static constexpr int kDepth = 32 / sizeof(scalar_t);  // pixels that one instruction adds up

  TensorCoreConv2d<scalar_t> conv;
  const scalar_t* grad_output;
  float* sums;
  int64_t part_pixels;  // a multiple of kPixels

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

  // Eight rows of one chunk (what a transposed read takes), or four rows of two (what reads of
  // single numbers take), lie in different banks.
  DLOPS_DEVICE static unsigned char* chunk_at(unsigned char* panels, int pixel, int chunk) {
    const int place = sizeof(scalar_t) == 2 ? pixel & 7 : pixel * 2 & 7;
    return panels + chunk / T::kChunks * kPanelBytes + pixel * T::kRowBytes +
           ((chunk % T::kChunks) ^ place) * 16;
  }

  template <class Block>
  DLOPS_DEVICE void copy_outputs(Block& block, unsigned char* panels, int thread,
                                 const Place& place, int64_t pixel) const {
    constexpr int chunks = kOutputPanels * T::kChunks, rows = T::kThreads / chunks;
    const int chunk = thread % chunks;
    const int64_t step = static_cast<int64_t>(conv.groups) * conv.O;  // to the next pixel
    DLOPS_UNROLL
    for (int row = thread / chunks; row < kPixels; row += rows) {
      DLOPS_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const int o = place.first_output + chunk * T::kChunk + part * kPart;
        block.template copy<copy_bytes>(
            chunk_at(panels, row, chunk) + part * copy_bytes,
            grad_output + (pixel + row) * step + static_cast<int64_t>(place.group) * conv.O + o,
            o < conv.O && pixel + row < place.end_pixel);
      }
    }
  }

  template <class Block>
  DLOPS_DEVICE void copy_columns(Block& block, unsigned char* panels, int thread,
                                 const Place& place, int64_t pixel) const {
    constexpr int chunks = kColumnPanels * T::kChunks, rows = T::kThreads / chunks;
    const int chunk = thread % chunks;
    const int K = conv.column_rows();
    DLOPS_UNROLL
    for (int part = 0; part < kParts; ++part) {
      const int k = place.first_column + chunk * T::kChunk + part * kPart;
      const Cell cell(conv, k);
      const int64_t offset = cell.offset(conv) + static_cast<int64_t>(place.group) * conv.C;
      DLOPS_UNROLL
      for (int row = thread / chunks; row < kPixels; row += rows) {
        const bool there = k < K && pixel + row < place.end_pixel;
        const OutputPixel at(conv, there ? pixel + row : 0);
        const int ih = at.oh * conv.stride_h - conv.pad_top;
        const int iw = at.ow * conv.stride_w - conv.pad_left;
        block.template copy<copy_bytes>(
            chunk_at(panels, row, chunk) + part * copy_bytes,
            conv.input + ((at.n * conv.H + ih) * conv.W + iw) * conv.input_pixel() + offset,
            there && inside(ih + cell.dh, conv.H) && inside(iw + cell.dw, conv.W));
      }
    }
  }

  // Two neighbouring fragments' worth of `chunk` and the next (eight 16-bit numbers each), of the
  // pixels that one instruction adds up: to(thread)[0 .. 3], first along the `first` direction.
  template <class Block, class F>
  DLOPS_DEVICE static void load(Block& block, int warp, unsigned char* panels, int pixel,
                                int element, bool pixels_first, const F& to) {
    if constexpr (sizeof(scalar_t) == 2) {
      block.load_transposed(warp, to, [&](int lane) {
        const int second = lane / 8 % 2, third = lane / 16;
        return chunk_at(panels, pixel + (pixels_first ? second : third) * 8 + lane % 8,
                        element / T::kChunk + (pixels_first ? third : second));
      });
    } else {
      block.lanes(warp, [&](int thread) {
        const int lane = thread % 32;
        DLOPS_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int second = i % 2, third = i / 2;
          const int at = element + (pixels_first ? third : second) * 8 + lane / 4;
          to(thread)[i] = *reinterpret_cast<const uint32_t*>(
              chunk_at(panels, pixel + (pixels_first ? second : third) * 4 + lane % 4,
                       at / T::kChunk) +
              at % T::kChunk * sizeof(scalar_t));
        }
      });
    }
  }

  template <class Block, class F, class S>
  DLOPS_DEVICE static void multiply(Block& block, int warp, unsigned char* panels, F& fragments,
                                    S& sums) {
    unsigned char* const columns = panels + kOutputPanels * kPanelBytes;
    const int output = Products::first_row(warp), column = Products::first_column(warp);
    DLOPS_UNROLL
    for (int pixel = 0; pixel < kPixels; pixel += kDepth) {
      DLOPS_UNROLL
      for (int m = 0; m < M; ++m)
        load(block, warp, panels, pixel, output + m * 16, false,
             [&](int thread) { return fragments[thread].a[m]; });
      DLOPS_UNROLL
      for (int n = 0; n < N; n += 2)
        load(block, warp, columns, pixel, column + n * 8, true,
             [&](int thread) { return &fragments[thread].b[n][0]; });
      Products::add(block, warp, fragments, sums);
    }
  }

  DLOPS_DEVICE void store(const typename Products::Sums& values, int thread, const Place& place,
                          int64_t part) const {
    const int warp = thread / 32;
    const int K = conv.column_rows();
    float* const to = sums + (part * conv.groups + place.group) * conv.O * K;
    const int first_output = place.first_output + Products::first_row(warp);
    const int first_column = place.first_column + Products::first_column(warp);
    Products::for_each(values, thread % 32, [&](int, int row, int column, float sum) {
      const int o = first_output + row, k = first_column + column;
      if (o < conv.O && k < K) to[static_cast<int64_t>(o) * K + k] = sum;
    });
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
    const auto copy_stage = [&](int64_t step) {
      if (step < steps)
        block.threads([&](int thread) {
          const int64_t pixel = place.first_pixel + step * kPixels;
          copy_outputs(block, stage(step), thread, place, pixel);
          copy_columns(block, stage(step) + kOutputPanels * kPanelBytes, thread, place, pixel);
        });
      block.commit();
    };
    for (int step = 0; step < T::kStages - 1; ++step) copy_stage(step);
    for (int64_t step = 0; step < steps; ++step) {
      block.template wait<T::kStages - 2>();
      block.sync();
      copy_stage(step + T::kStages - 1);
      block.warps([&](int warp) { multiply(block, warp, stage(step), fragments, values); });
    }
    block.threads([&](int thread) { store(values[thread], thread, place, part); });
  }
};

}  // namespace dlops::cuda
