// AMX: eight tiles of at most 16 rows of 64 bytes, in registers of their own, and the product that
// adds up pairs of bfloat16 numbers in float32. The instructions are written out, so that they need
// no option of the compiler; tests play them where a machine has none.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>

namespace dlops::cpu {

// Rows and bytes in a row of each tile, as ldtilecfg reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t tile_bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    bytes[tile] = static_cast<uint16_t>(tile_bytes);
  }
};

#if defined(DLOPS_PLAYED_TILES)
}  // namespace dlops::cpu
#include "played_tiles.h"
namespace dlops::cpu {
#elif defined(__x86_64__)

// All tiles are zeros afterwards.
inline void configure_tiles(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
}
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Rows `stride` bytes apart.
template <int tile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(tile) : "memory");
}
// sum[i][j] += the sum over pairs p of a[i][p] * b[p][j], a pair each.
template <int sum, int a, int b>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

#else  // never called: has_tiles() says that there are none

inline void configure_tiles(const TileShapes&) { TORCH_INTERNAL_ASSERT(false, "no tiles"); }
inline void release_tiles() {}
template <int tile>
inline void zero_tile() {}
template <int tile>
inline void load_tile(const void*, int64_t) {}
template <int tile>
inline void store_tile(void*, int64_t) {}
template <int sum, int a, int b>
inline void multiply_tiles() {}

#endif

}  // namespace dlops::cpu
