// Environment variables that choose between ways of working something out.
#pragma once

#include <c10/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string_view>

namespace dlops::cpu {

// A variable that is 1 or 0, or unset. `meanings`: of the three, for who sets another value.
inline std::optional<bool> switch_of(const char* name, const char* meanings) {
  const char* const asked = std::getenv(name);
  if (asked == nullptr) return std::nullopt;
  const std::string_view value = asked;
  TORCH_CHECK_VALUE(value == "0" || value == "1", name, " must be ", meanings, ", got ", value);
  return value == "1";
}

}  // namespace dlops::cpu
