// Divisions in loops over rows, pixels and products.
#pragma once

#include <cstdint>

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// a / b for a >= 0 and b > 0. On CPUs in wide use (Intel's before Ice Lake) a 64-bit division takes
// as long as the vector work on a short row, one of 32 bits a fraction of it.
inline int64_t quotient(int64_t a, int64_t b) {
  if (b == 1) return a;
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

}  // namespace
}  // namespace dlops::cpu
