// AMX as its manual has it, for machines without it: in place of the instructions of cpu/tiles.h.
// What the machine would refuse ends the program.
#pragma once

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

inline float played_number(const unsigned char* bfloat16) {
  unsigned char bytes[4] = {0, 0, bfloat16[0], bfloat16[1]};
  float value;
  std::memcpy(&value, bytes, sizeof(value));
  return value;
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
  for (int i = 0; i < shapes.rows[sum]; ++i) {
    for (int j = 0; j < shapes.bytes[sum] / 4; ++j) {
      float total;
      std::memcpy(&total, played.rows[sum][i] + j * 4, 4);
      for (int pair = 0; pair < shapes.rows[b]; ++pair)
        for (int half = 0; half < 2; ++half)
          total += played_number(played.rows[a][i] + pair * 4 + half * 2) *
                   played_number(played.rows[b][pair] + j * 4 + half * 2);
      std::memcpy(played.rows[sum][i] + j * 4, &total, 4);
    }
  }
}

}  // namespace dlops::cpu
