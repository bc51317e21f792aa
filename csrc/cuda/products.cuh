// How a tile's products are added up: by warps (mma.sync), by groups of warps (wgmma), or by every
// thread for itself (multiply-adds: float32 with all its digits).
//
// Factors lie in shared memory as tiles.cuh says. Either their rows run over what is added
// up (multiply_rows), or what is added up are the rows (multiply_columns).
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>
#include <type_traits>

#include "cuda/block.cuh"

namespace dlops::cuda {

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
  using sum_t = at::opmath_type<scalar_t>;
};

// The sums that a thread holds: M by N products of 16 x 8.
template <class sum_t, int M, int N>
struct ThreadSums {
  sum_t values[M][N][4];

  // Calls f(row, column, sums) for each two of one row, rows and columns counted from the warp's
  // first.
  template <class F>
  DLOPS_DEVICE void for_each_pair(int lane, const F& f) const {
    DLOPS_UNROLL
    for (int i = 0; i < M * N * 2; ++i) {
      const int m = i / (N * 2), n = i / 2 % N, half = i % 2;
      f(m * 16 + half * 8 + lane / 4, n * 8 + lane % 4 * 2, values[m][n] + half * 2);
    }
  }
  // Adds value_of(row) or value_of(column) to the sums of each, all of which are read ahead.
  template <class F>
  DLOPS_DEVICE void add_to_rows(int lane, const F& value_of) {
    sum_t added[M][2];
    DLOPS_UNROLL
    for (int i = 0; i < M * 2; ++i) added[i / 2][i % 2] = value_of(i * 8 + lane / 4);
    DLOPS_UNROLL
    for (int m = 0; m < M; ++m) DLOPS_UNROLL
    for (int i = 0; i < N * 4; ++i) values[m][i / 4][i % 4] += added[m][i % 4 / 2];
  }
  template <class F>
  DLOPS_DEVICE void add_to_columns(int lane, const F& value_of) {
    sum_t added[N][2];
    DLOPS_UNROLL
    for (int i = 0; i < N * 2; ++i)
      added[i / 2][i % 2] = value_of(i / 2 * 8 + lane % 4 * 2 + i % 2);
    DLOPS_UNROLL
    for (int m = 0; m < M; ++m) DLOPS_UNROLL
    for (int i = 0; i < N * 4; ++i) values[m][i / 4][i % 4] += added[i / 4][i % 2];
  }
};

// The sums of a tile of rows x columns, shared out among the warps: each has 32 columns of some
// rows.
template <class scalar_t, int rows, int columns>
struct WarpShare {
  using T = Tile<scalar_t>;
  static constexpr int kAcross = columns / 32, kRows = rows * kAcross / T::kWarps;
  static constexpr int M = kRows / 16, N = 4;
  static constexpr bool kByGroups = false;
  static_assert(M >= 1 && M * 16 * T::kWarps == rows * kAcross);
  DLOPS_DEVICE static int first_row(int warp) { return warp / kAcross * kRows; }
  DLOPS_DEVICE static int first_column(int warp) { return warp % kAcross * 32; }
  using Sums = ThreadSums<typename T::sum_t, M, N>;
};

// By products of 16 x 8, a warp's. at(row, chunk) are addresses of 16 bytes, at(row, element) of
// one number.
template <class scalar_t, int rows, int columns>
struct WarpProducts : WarpShare<scalar_t, rows, columns> {
  using Share = WarpShare<scalar_t, rows, columns>;
  using T = typename Share::T;
  using Share::M, Share::N;
  static constexpr int kDepth = 32 / sizeof(scalar_t);  // numbers that one product adds up

  // What a product takes of a thread: 16 bytes of a, 8 of b.
  using word_t = std::conditional_t<sizeof(scalar_t) == 8, double, uint32_t>;
  struct Fragments {
    word_t a[M][16 / sizeof(word_t)], b[N][8 / sizeof(word_t)];
  };

  // The products of a stage: rows a_at(row, chunk) and b_at(column, chunk), counted from the
  // warp's first.
  template <class Block, class A, class B, class F, class S>
  DLOPS_DEVICE static void multiply_rows(Block& block, int warp, const A& a_at, const B& b_at,
                                         F& fragments, S& sums) {
    DLOPS_UNROLL
    for (int chunk = 0; chunk < T::kChunks; chunk += 2) {
      DLOPS_UNROLL
      for (int m = 0; m < M; ++m)
        load_rows<true>(
            block, warp, chunk, [&](int row, int at) { return a_at(m * 16 + row, at); },
            [&](int thread) { return fragments[thread].a[m]; });
      DLOPS_UNROLL
      for (int n = 0; n < N; n += 2)
        load_rows<false>(
            block, warp, chunk, [&](int row, int at) { return b_at(n * 8 + row, at); },
            [&](int thread) { return &fragments[thread].b[n][0]; });
      add(block, warp, fragments, sums);
    }
  }

  // The same of `depth` rows that are added up: a_at(row, element), b_at(row, element).
  template <int depth, class Block, class A, class B, class F, class S>
  DLOPS_DEVICE static void multiply_columns(Block& block, int warp, const A& a_at, const B& b_at,
                                            F& fragments, S& sums) {
    DLOPS_UNROLL
    for (int row = 0; row < depth; row += kDepth) {
      DLOPS_UNROLL
      for (int m = 0; m < M; ++m)
        load_columns<true>(
            block, warp, [&](int k, int at) { return a_at(row + k, m * 16 + at); },
            [&](int thread) { return fragments[thread].a[m]; });
      DLOPS_UNROLL
      for (int n = 0; n < N; n += 2)
        load_columns<false>(
            block, warp, [&](int k, int at) { return b_at(row + k, n * 8 + at); },
            [&](int thread) { return &fragments[thread].b[n][0]; });
      add(block, warp, fragments, sums);
    }
  }

 private:
  // Sixteen rows of 32 bytes, as one `a` or as two `b`: to(thread)[...].
  template <bool is_a, class Block, class F, class G>
  DLOPS_DEVICE static void load_rows(Block& block, int warp, int chunk, const F& at, const G& to) {
    if constexpr (sizeof(scalar_t) == 8) {
      block.lanes(warp, [&](int thread) {
        const int lane = thread % 32;
        DLOPS_UNROLL
        for (int i = 0; i < 2; ++i)
          to(thread)[i] =
              reinterpret_cast<const double*>(at(i * 8 + lane / 4, chunk + lane % 4 / 2))[lane % 2];
      });
    } else {
      block.load_matrices(warp, to, [&](int lane) {
        const int second = lane / 8 % 2, third = lane / 16;
        return at((is_a ? second : third) * 8 + lane % 8, chunk + (is_a ? third : second));
      });
    }
  }

  // Sixteen elements of the rows that one product adds up, as one `a` or as two `b`.
  template <bool is_a, class Block, class F, class G>
  DLOPS_DEVICE static void load_columns(Block& block, int warp, const F& at, const G& to) {
    if constexpr (sizeof(scalar_t) == 2) {
      block.load_transposed(warp, to, [&](int lane) {
        const int second = lane / 8 % 2, third = lane / 16;
        return at((is_a ? third : second) * 8 + lane % 8, (is_a ? second : third) * 8);
      });
    } else {
      block.lanes(warp, [&](int thread) {
        const int lane = thread % 32;
        DLOPS_UNROLL
        for (int i = 0; i < 16 / static_cast<int>(sizeof(scalar_t)); ++i) {
          // Of float64 one row follows another; of float32 two of four rows each.
          const int second = sizeof(scalar_t) == 8 ? i : (is_a ? i % 2 : i / 2);
          const int half = sizeof(scalar_t) == 8 ? 0 : (is_a ? i / 2 : i % 2);
          to(thread)[i] =
              *reinterpret_cast<const word_t*>(at(half * 4 + lane % 4, second * 8 + lane / 4));
        }
      });
    }
  }

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

// By multiply-adds. A thread has the sums that a product of a warp would give it, and reads every
// factor of these: those of its warp's rows and columns are read by four or eight threads at once.
template <class scalar_t, int rows, int columns>
struct ThreadProducts : WarpShare<scalar_t, rows, columns> {
  using Share = WarpShare<scalar_t, rows, columns>;
  using T = typename Share::T;
  using Share::M, Share::N;
  struct Fragments {};
  struct alignas(2 * sizeof(scalar_t)) Pair {
    scalar_t values[2];
  };

  template <class Block, class A, class B, class F, class S>
  DLOPS_DEVICE static void multiply_rows(Block& block, int warp, const A& a_at, const B& b_at, F&,
                                         S& sums) {
    // Pairs, for which there are registers beside the sums.
    const auto pair_of = [](const unsigned char* chunk, int k) {
      return reinterpret_cast<const Pair*>(chunk)[k % T::kChunk / 2];
    };
    block.lanes(warp, [&](int thread) {
      const int lane = thread % 32;
      for (int k = 0; k < T::kRow; k += 2) {
        Pair b[N * 2];
        DLOPS_UNROLL
        for (int j = 0; j < N * 2; ++j)
          b[j] = pair_of(b_at(j / 2 * 8 + lane % 4 * 2 + j % 2, k / T::kChunk), k);
        DLOPS_UNROLL
        for (int i = 0; i < M * 2; ++i) {
          const Pair a = pair_of(a_at(i * 8 + lane / 4, k / T::kChunk), k);
          add(a.values[0], i, sums[thread], [&](int j) { return b[j].values[0]; });
          add(a.values[1], i, sums[thread], [&](int j) { return b[j].values[1]; });
        }
      }
    });
  }

  template <int depth, class Block, class A, class B, class F, class S>
  DLOPS_DEVICE static void multiply_columns(Block& block, int warp, const A& a_at, const B& b_at,
                                            F&, S& sums) {
    block.lanes(warp, [&](int thread) {
      const int lane = thread % 32;
      for (int row = 0; row < depth; ++row) {
        Pair b[N];
        DLOPS_UNROLL
        for (int n = 0; n < N; ++n)
          b[n] = *reinterpret_cast<const Pair*>(b_at(row, n * 8 + lane % 4 * 2));
        DLOPS_UNROLL
        for (int i = 0; i < M * 2; ++i) {
          const scalar_t a = *reinterpret_cast<const scalar_t*>(a_at(row, i * 8 + lane / 4));
          add(a, i, sums[thread], [&](int j) { return b[j / 2].values[j % 2]; });
        }
      }
    });
  }

 private:
  // Row i of the thread's sums += a x b_of(column).
  template <class Sums, class F>
  DLOPS_DEVICE static void add(scalar_t a, int i, Sums& sums, const F& b_of) {
    DLOPS_UNROLL
    for (int j = 0; j < N * 2; ++j) sums.values[i / 2][j / 2][i % 2 * 2 + j % 2] += a * b_of(j);
  }
};

// By groups of four warps (wgmma): each of the two has half the rows, a warp 16 of them, and every
// column.
template <class scalar_t, int rows, int columns>
struct GroupProducts {
  static constexpr int M = 1, N = columns / 8;
  static constexpr bool kByGroups = true;
  static_assert(rows == 128 && Tile<scalar_t>::kThreads == 256);
  DLOPS_DEVICE static int first_row(int warp) { return warp * 16; }
  DLOPS_DEVICE static int first_column(int) { return 0; }

  struct Fragments {};  // the factors stay in shared memory
  using Sums = ThreadSums<float, M, N>;

  // Starts a product of 32 bytes each.
  template <bool transposed, class Block, class S>
  DLOPS_DEVICE static void start(Block& block, int group, S& sums, const unsigned char* a,
                                 const unsigned char* b, int leading = 0) {
    block.template start_product<scalar_t, columns, transposed>(
        group, [&](int thread) { return &sums[thread].values[0][0][0]; }, a, b, leading);
  }
};

}  // namespace dlops::cuda
