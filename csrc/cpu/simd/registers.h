// Included by the kernels of one capability each, whose registers it describes.
#pragma once

#include <ATen/cpu/vec/vec.h>

namespace dlops::cpu {
namespace {

template <class T>
using Vec = at::vec::Vectorized<T>;

// Sums that are kept in registers at a time.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kSums = 16;
#else
constexpr int kSums = 8;
#endif

}  // namespace
}  // namespace dlops::cpu
