// One number in another type.
#pragma once

#include <type_traits>

namespace dlops::cpu {
namespace {  // compiled once per instruction set, so nothing here may be shared

// BFloat16 and Half are made from float alone.
template <class to_t, class from_t>
to_t rounded(from_t value) {
  if constexpr (std::is_class_v<to_t> && std::is_same_v<from_t, double>) {
    return static_cast<to_t>(static_cast<float>(value));
  } else {
    return static_cast<to_t>(value);
  }
}

}  // namespace
}  // namespace dlops::cpu
