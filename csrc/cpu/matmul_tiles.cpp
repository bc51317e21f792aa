#include "cpu/matmul_tiles.h"

#include <algorithm>
#include <cstring>

#include "cpu/tiles.h"

namespace dlops::cpu {
namespace {

using c10::BFloat16;

// Of a tile: rows, 32-bit numbers in a row, and terms, two to such a number.
constexpr int64_t kRows = 16, kColumns = 16, kTermsOfTile = 32;

struct Product {
  int64_t k;
  const Factors<BFloat16>* factors;
  int64_t count;
  FactorStrides strides;
  float* c;
  int64_t ldc;
  Addend<float> before;
  int64_t step;  // terms of a tile, but of the last one: all about as many
};

// A block of C: two tiles of rows by two of columns, of which the second ones may be empty.
struct Block {
  int64_t i, j, rows, columns;
};

// Tiles 0 to 3 hold the sums, row by row, 4 and 5 rows of A, 6 and 7 columns of B.
TileShapes shapes_of(const Block& block, int64_t step) {
  TileShapes shapes;
  for (int half = 0; half < 2; ++half) {
    const int64_t rows = std::clamp<int64_t>(block.rows - half * kRows, 0, kRows);
    const int64_t columns = std::clamp<int64_t>(block.columns - half * kColumns, 0, kColumns);
    if (rows > 0) shapes.set(4 + half, rows, step * 2);
    if (columns > 0) shapes.set(6 + half, step / 2, columns * 4);
    for (int other = 0; other < 2; ++other) {
      const int64_t width = std::clamp<int64_t>(block.columns - other * kColumns, 0, kColumns);
      if (rows > 0 && width > 0) shapes.set(2 * half + other, rows, width * 4);
    }
  }
  return shapes;
}

// Adds the product of the tiles of A at `a`, rows `lda` apart, and of B at `b`, its pairs of rows
// `ldb` numbers apart.
template <bool two_rows, bool two_columns>
void add_tiles(const BFloat16* a, int64_t lda, const BFloat16* b, int64_t ldb) {
  load_tile<4>(a, lda * 2);
  load_tile<6>(b, ldb * 4);
  multiply_tiles<0, 4, 6>();
  if constexpr (two_columns) {
    load_tile<7>(b + kColumns * 2, ldb * 4);
    multiply_tiles<1, 4, 7>();
  }
  if constexpr (two_rows) {
    load_tile<5>(a + kRows * lda, lda * 2);
    multiply_tiles<2, 5, 6>();
    if constexpr (two_columns) multiply_tiles<3, 5, 7>();
  }
}

// The last terms, fewer than a tile has: filled up with zeros.
template <bool two_rows, bool two_columns>
void add_rest(const Block& block, int64_t terms, int64_t step, const BFloat16* a, int64_t lda,
              const BFloat16* b, int64_t ldb) {
  alignas(64) BFloat16 rows[2 * kRows][kTermsOfTile];
  alignas(64) BFloat16 columns[kTermsOfTile / 2][2 * kColumns * 2];
  const auto bytes = [](int64_t count) { return static_cast<size_t>(count) * sizeof(BFloat16); };
  for (int64_t i = 0; i < block.rows; ++i) {
    std::memcpy(rows[i], a + i * lda, bytes(terms));
    std::memset(rows[i] + terms, 0, bytes(step - terms));
  }
  for (int64_t p = 0; p < step / 2; ++p) {
    if (p < terms / 2) {
      std::memcpy(columns[p], b + p * 2 * ldb, bytes(block.columns * 2));
    } else {
      std::memset(columns[p], 0, bytes(block.columns * 2));
    }
  }
  add_tiles<two_rows, two_columns>(rows[0], kTermsOfTile, columns[0], 2 * kColumns);
}

template <bool two_rows, bool two_columns, class F>
void for_each_sum(const F& f) {
  f.template operator()<0>(0, 0);
  if constexpr (two_columns) f.template operator()<1>(0, kColumns);
  if constexpr (two_rows) f.template operator()<2>(kRows, 0);
  if constexpr (two_rows && two_columns) f.template operator()<3>(kRows, kColumns);
}

template <bool two_rows, bool two_columns>
void multiply_block(const Product& p, const Block& block) {
  const Addend<float>& before = p.before;
  for_each_sum<two_rows, two_columns>([&]<int tile>(int64_t row, int64_t column) {
    if (before.data == nullptr) {
      zero_tile<tile>();
    } else {
      load_tile<tile>(before.data + (block.i + row) * before.ld + block.j + column, before.ld * 4);
    }
  });
  const int64_t lda = p.strides.lda, ldb = p.strides.ldb;
  for (int64_t f = 0; f < p.count; ++f) {
    const BFloat16* a = p.factors[f].a + p.strides.shift + block.i * lda;
    const BFloat16* b = p.factors[f].b + block.j * 2;
    int64_t term = 0;
    for (; term + p.step <= p.k; term += p.step)
      add_tiles<two_rows, two_columns>(a + term, lda, b + term * ldb, ldb);
    if (term < p.k)
      add_rest<two_rows, two_columns>(block, p.k - term, p.step, a + term, lda, b + term * ldb,
                                      ldb);
  }
  for_each_sum<two_rows, two_columns>([&]<int tile>(int64_t row, int64_t column) {
    store_tile<tile>(p.c + (block.i + row) * p.ldc + block.j + column, p.ldc * 4);
  });
}

void multiply_block(const Product& p, const Block& block) {
  if (block.rows > kRows) {
    block.columns > kColumns ? multiply_block<true, true>(p, block)
                             : multiply_block<true, false>(p, block);
  } else {
    block.columns > kColumns ? multiply_block<false, true>(p, block)
                             : multiply_block<false, false>(p, block);
  }
}

}  // namespace

void matmul_of_tiles(int64_t m, int64_t n, int64_t k, const Factors<BFloat16>* factors,
                     int64_t count, const FactorStrides& strides, float* c, int64_t ldc,
                     Addend<float> before) {
  const int64_t tiles = std::max<int64_t>(1, (k + kTermsOfTile - 1) / kTermsOfTile);
  const int64_t step = std::max<int64_t>(2, ((k + tiles - 1) / tiles + 1) / 2 * 2);
  const Product product{k, factors, count, strides, c, ldc, before, step};
  int64_t rows = 0, columns = 0;  // that the tiles are configured for
  for (int64_t j = 0; j < n; j += 2 * kColumns) {
    for (int64_t i = 0; i < m; i += 2 * kRows) {
      const Block block{i, j, std::min(2 * kRows, m - i), std::min(2 * kColumns, n - j)};
      if (block.rows != rows || block.columns != columns) configure_tiles(shapes_of(block, step));
      rows = block.rows;
      columns = block.columns;
      multiply_block(product, block);
    }
  }
  release_tiles();
}

}  // namespace dlops::cpu
