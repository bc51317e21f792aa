// AMX as its manual has it, for machines without it: in place of the instructions of cpu/tiles.h.
// What the machine would refuse ends the program.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace dlops::cpu {

struct PlayedTiles {
  TileShapes shapes;
  bool configured = false;
  unsigned char rows[8][16][64];
};
inline thread_local PlayedTiles played;

inline void demand(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "tiles: %s\n", what);
  std::abort();
}

inline void configure_tiles(const TileShapes& shapes) {
  demand(shapes.palette == 1 && shapes.start_row == 0, "palette");
  for (int tile = 0; tile < 16; ++tile) {
    const bool used = shapes.rows[tile] > 0 || shapes.bytes[tile] > 0;
    demand(!used || (tile < 8 && shapes.rows[tile] > 0 && shapes.rows[tile] <= 16 &&
                     shapes.bytes[tile] > 0 && shapes.bytes[tile] <= 64),
           "a shape");
  }
  played.shapes = shapes;
  played.configured = true;
  std::memset(played.rows, 0, sizeof(played.rows));
}
inline void release_tiles() { played.configured = false; }

inline void demand_tile(int tile) {
  demand(played.configured && played.shapes.rows[tile] > 0, "a tile without a shape");
}

template <int tile>
void zero_tile() {
  demand_tile(tile);
  std::memset(played.rows[tile], 0, sizeof(played.rows[tile]));
}
template <int tile>
void load_tile(const void* from, int64_t stride) {
  zero_tile<tile>();
  for (int row = 0; row < played.shapes.rows[tile]; ++row)
    std::memcpy(played.rows[tile][row], static_cast<const char*>(from) + row * stride,
                played.shapes.bytes[tile]);
}
template <int tile>
void store_tile(void* to, int64_t stride) {
  demand_tile(tile);
  for (int row = 0; row < played.shapes.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, played.rows[tile][row],
                played.shapes.bytes[tile]);
}

// The instruction takes numbers that are not normal for zeros, and gives zeros for them.
inline float flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0F, x) : x;
}

// The bfloat16 numbers of a tile, in float32.
inline void read_numbers(int tile, float (&to)[16][32]) {
  for (int row = 0; row < played.shapes.rows[tile]; ++row) {
    uint16_t numbers[32];
    std::memcpy(numbers, played.rows[tile][row], sizeof(numbers));
    for (int i = 0; i < 32; ++i) {
      const uint32_t bits = static_cast<uint32_t>(numbers[i]) << 16;
      std::memcpy(&to[row][i], &bits, sizeof(bits));
      to[row][i] = flushed(to[row][i]);
    }
  }
}

template <int sum, int a, int b>
void multiply_tiles() {
  demand_tile(sum);
  demand_tile(a);
  demand_tile(b);
  const TileShapes& shapes = played.shapes;
  demand(shapes.rows[sum] == shapes.rows[a] && shapes.bytes[sum] == shapes.bytes[b] &&
             shapes.bytes[a] == shapes.rows[b] * 4 && shapes.bytes[b] % 4 == 0,
         "shapes that do not fit together");
  float left[16][32], right[16][32];
  read_numbers(a, left);
  read_numbers(b, right);
  for (int i = 0; i < shapes.rows[sum]; ++i) {
    float chains[2][16] = {}, totals[16];  // of the pairs' first numbers and of their second ones
    for (int pair = 0; pair < shapes.rows[b]; ++pair)
      for (int half = 0; half < 2; ++half)
        for (int j = 0; j < shapes.bytes[sum] / 4; ++j)
          chains[half][j] = flushed(
              std::fma(left[i][pair * 2 + half], right[pair][j * 2 + half], chains[half][j]));
    std::memcpy(totals, played.rows[sum][i], sizeof(totals));
    for (int j = 0; j < shapes.bytes[sum] / 4; ++j)
      totals[j] = flushed(flushed(totals[j]) + flushed(chains[0][j] + chains[1][j]));
    std::memcpy(played.rows[sum][i], totals, sizeof(totals));
  }
}

}  // namespace dlops::cpu
