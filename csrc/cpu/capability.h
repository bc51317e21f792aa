// Which instruction set the vector kernels (csrc/cpu/simd/) run in. Each is compiled once per
// capability, from the same source; the widest one that the machine has is picked at run time.
#pragma once

namespace dlops::cpu {

enum Capability : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// As torch decides it, ATEN_CPU_CAPABILITY (default, avx2, avx512) included.
Capability capability();
const char* capability_name(Capability capability);

}  // namespace dlops::cpu

// The function pointer DLOPS_SIMD(fill_columns, float, float) is fill_columns<capability, float,
// float> for the machine's capability, or for the only one of this build.
#if defined(DLOPS_ONLY_CAPABILITY)
#define DLOPS_SIMD(function, ...)                                                        \
  (&function<static_cast<::dlops::cpu::Capability>(DLOPS_ONLY_CAPABILITY) __VA_OPT__(, ) \
                 __VA_ARGS__>)
#elif defined(__x86_64__)
#define DLOPS_SIMD(function, ...)                                    \
  (::dlops::cpu::capability() == ::dlops::cpu::kAvx512               \
       ? &function<::dlops::cpu::kAvx512 __VA_OPT__(, ) __VA_ARGS__> \
   : ::dlops::cpu::capability() == ::dlops::cpu::kAvx2               \
       ? &function<::dlops::cpu::kAvx2 __VA_OPT__(, ) __VA_ARGS__>   \
       : &function<::dlops::cpu::kBaseline __VA_OPT__(, ) __VA_ARGS__>)
#else
#define DLOPS_SIMD(function, ...) (&function<::dlops::cpu::kBaseline __VA_OPT__(, ) __VA_ARGS__>)
#endif
