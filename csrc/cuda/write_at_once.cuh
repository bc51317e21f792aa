// Several neighbouring numbers in one store. Free of torch.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/host_device.h"
#include "cuda/unroll.h"

namespace dlops::cuda {

// Writes values that lie together in global memory at once, where the address is a multiple of
// their size (or of 16): left to itself, nvcc writes some structs that are in registers member by
// member.
template <class Values>
DLOPS_HOST_DEVICE void write_at_once(void* to, const Values& values) {
#if defined(__CUDA_ARCH__)
  constexpr int bytes = static_cast<int>(sizeof(Values));
  static_assert(bytes % 16 == 0 || bytes == 8 || bytes == 4 || bytes == 2 || bytes == 1);
  static_assert(alignof(Values) >= (bytes < 16 ? bytes : 16));
  if constexpr (bytes >= 8) {
    using word_t = std::conditional_t<bytes == 8, uint2, uint4>;
    DLOPS_UNROLL
    for (int i = 0; i < bytes / static_cast<int>(sizeof(word_t)); ++i) {
      word_t word;
      memcpy(&word, reinterpret_cast<const word_t*>(&values) + i, sizeof(word_t));
      void* const place = static_cast<word_t*>(to) + i;
      if constexpr (bytes == 8) {
        asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(place), "r"(word.x), "r"(word.y)
                     : "memory");
      } else {
        asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(word.x),
                     "r"(word.y), "r"(word.z), "r"(word.w)
                     : "memory");
      }
    }
  } else if constexpr (bytes == 4) {
    uint32_t word;
    memcpy(&word, &values, bytes);
    *static_cast<uint32_t*>(to) = word;
  } else {
    *static_cast<Values*>(to) = values;
  }
#else
  std::memcpy(to, &values, sizeof(Values));
#endif
}

}  // namespace dlops::cuda
