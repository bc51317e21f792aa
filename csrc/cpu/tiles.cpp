// Whether products go through AMX (cpu/tiles.h).
#include <ATen/cpu/Utils.h>
#include <c10/util/Exception.h>

#include <optional>

#include "cpu/capability.h"
#include "cpu/environment.h"
#include "cpu/matmul_tiles.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dlops::cpu {
namespace {

// Whether the machine has AMX with bfloat16, and Linux lets the process use it.
bool has_tiles() {
#if defined(DLOPS_PLAYED_TILES)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBFloat16 = 1U << 22, kTiles = 1U << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBFloat16) != 0 &&
         (d & kTiles) != 0 && at::cpu::init_amx();
#else
  return false;
#endif
}

enum class Tiles { none, of_bfloat16, of_float32_too };

Tiles find_tiles() {
  const std::optional<bool> asked = switch_of(
      "DLOPS_CPU_AMX", "unset (bfloat16 alone), 0 (nothing) or 1 (float32 at 'high' too)");
  if (!asked.has_value()) {
#if defined(DLOPS_PLAYED_TILES)
    return Tiles::none;
#else
    return capability() == kAvx512 && has_tiles() ? Tiles::of_bfloat16 : Tiles::none;
#endif
  }
  if (!*asked) return Tiles::none;
  TORCH_CHECK(has_tiles(),
              "DLOPS_CPU_AMX=1 needs a CPU with AMX for bfloat16 (amx_tile and "
              "amx_bf16 in /proc/cpuinfo), on Linux 5.16 or later; this machine offers none");
  return Tiles::of_float32_too;
}

Tiles tiles() {
  static const Tiles found = find_tiles();
  return found;
}

}  // namespace

bool takes_tiles() { return tiles() != Tiles::none; }
bool splits_float32() { return tiles() == Tiles::of_float32_too; }

}  // namespace dlops::cpu
