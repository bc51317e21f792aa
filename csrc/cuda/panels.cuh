// Factors whose rows are what is added up, in shared memory as panels of `kDepth` rows by 128
// bytes: first those of one factor, kRows numbers to a row, then those of the other, kColumns.
#pragma once

#include "cuda/tiles.cuh"

namespace dlops::cuda {

template <class scalar_t, int kRows, int kColumns, int kDepth_,
          template <class, int, int> class Multiply>
struct Panels : Tile<scalar_t> {
  using T = Tile<scalar_t>;
  using Products = Multiply<scalar_t, kRows, kColumns>;
  static constexpr int kDepth = kDepth_;  // rows of a stage
  static constexpr int kPanelBytes = kDepth * T::kRowBytes;
  static constexpr int kRowPanels = kRows / T::kRow, kColumnPanels = kColumns / T::kRow;
  static constexpr int kStageBytes = (kRowPanels + kColumnPanels) * kPanelBytes;
  // Or it spills.
  static constexpr int kBlocks = sizeof(scalar_t) == 4 && kRows == 128 ? 1 : T::kBlocks;

  // Eight rows of one chunk (what a transposed read takes), or four rows of two (what reads of
  // single numbers take), lie in different banks.
  DLOPS_DEVICE static unsigned char* chunk_at(unsigned char* panels, int row, int chunk) {
    const int place = sizeof(scalar_t) == 2 ? row & 7 : row * 2 & 7;
    return panels + chunk / T::kChunks * kPanelBytes + row * T::kRowBytes +
           ((chunk % T::kChunks) ^ place) * 16;
  }
  DLOPS_DEVICE static unsigned char* element_at(unsigned char* panels, int row, int element) {
    return chunk_at(panels, row, element / T::kChunk) +
           element % T::kChunk * static_cast<int>(sizeof(scalar_t));
  }
  // A thread's part of a factor's panels: one chunk, of so many rows that lie so far apart.
  template <int panels>
  struct Part {
    static constexpr int kChunks = panels * T::kChunks, kApart = T::kThreads / kChunks;
    static constexpr int kCount = kDepth / kApart;
    static_assert(kCount * kApart == kDepth);
    DLOPS_DEVICE static int element(int thread) { return thread % kChunks * T::kChunk; }
    DLOPS_DEVICE static int row(int thread, int i) { return thread / kChunks + i * kApart; }

    // Calls f(place, row, element, i) for the i-th of the rows.
    template <class F>
    DLOPS_DEVICE static void for_each(unsigned char* to, int thread, const F& f) {
      DLOPS_UNROLL
      for (int i = 0; i < kCount; ++i)
        f(chunk_at(to, row(thread, i), thread % kChunks), row(thread, i), element(thread), i);
    }
  };

  // The products of one stage.
  template <class Block, class F, class S>
  DLOPS_DEVICE static void multiply(Block& block, unsigned char* panels, F& fragments, S& sums) {
    unsigned char* const columns = panels + kRowPanels * kPanelBytes;
    if constexpr (Products::kByGroups) {
      constexpr int step = 32 / sizeof(scalar_t);  // rows that one instruction adds up
      block.groups([&](int group) {
        DLOPS_UNROLL
        for (int row = 0; row < kDepth; row += step)
          Products::template start<true>(block, group, sums,
                                         panels + group * kPanelBytes + row * T::kRowBytes,
                                         columns + row * T::kRowBytes, kPanelBytes);
      });
    } else {
      block.warps([&](int warp) {
        const int first = Products::first_row(warp), column = Products::first_column(warp);
        Products::template multiply_columns<kDepth>(
            block, warp, [&](int row, int i) { return element_at(panels, row, first + i); },
            [&](int row, int i) { return element_at(columns, row, column + i); }, fragments, sums);
      });
    }
  }
};

}  // namespace dlops::cuda
