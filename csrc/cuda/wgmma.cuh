// Hopper's products of four warps at once (wgmma), whose factors come straight from shared memory.
// For sm_90a alone: elsewhere they trap, and nothing calls them.
#pragma once

#include <cstdint>

#include "common/cuda_utils.cuh"

namespace dlops::cuda {

// Where a factor lies in shared memory, as the instruction wants to know it: in rows of 128 bytes
// whose chunks of 16 are permuted by their address (the swizzle of 128 bytes), eight rows after
// eight; `leading` bytes after one another come the blocks of 64 elements of a factor that is
// transposed.
__device__ __forceinline__ uint64_t shared_matrix(const void* start, int leading) {
  const auto address = static_cast<uint64_t>(__cvta_generic_to_shared(start));
  constexpr uint64_t kEightRows = 1024, kSwizzle128 = uint64_t(1) << 62;
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading) >> 4 << 16 |
         kEightRows >> 4 << 32 | kSwizzle128;
}

#define DLOPS_FLOATS_8(f, i)                                                                  \
  "+f"(f[i]), "+f"(f[i + 1]), "+f"(f[i + 2]), "+f"(f[i + 3]), "+f"(f[i + 4]), "+f"(f[i + 5]), \
      "+f"(f[i + 6]), "+f"(f[i + 7])
#define DLOPS_FLOATS_32(f, i)                                                \
  DLOPS_FLOATS_8(f, i), DLOPS_FLOATS_8(f, i + 8), DLOPS_FLOATS_8(f, i + 16), \
      DLOPS_FLOATS_8(f, i + 24)

// `kind`: depth and types; `ways`: of 16-bit factors, which way they lie (%34 or %66, for both).
#define DLOPS_WGMMA_64(kind, ways)                                                                 \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64" kind                                          \
               " "                                                                                 \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
               "%32, %33, 1, 1, 1" ways ";"                                                        \
               : DLOPS_FLOATS_32(sums, 0)                                                          \
               : "l"(a), "l"(b), "n"(int(transposed)))

#define DLOPS_WGMMA_128(kind, ways)                                                                \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128" kind                                         \
               " "                                                                                 \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
               "%64, %65, 1, 1, 1" ways ";"                                                        \
               : DLOPS_FLOATS_32(sums, 0), DLOPS_FLOATS_32(sums, 32)                               \
               : "l"(a), "l"(b), "n"(int(transposed)))

// sums (64 x columns) += a (64 x 32 bytes) x b (32 bytes x columns), started: 16 bfloat16 or
// float16 numbers, or eight of TF32. `transposed`: a row of either factor's memory runs over its 64
// or `columns`, not over the numbers that are added up; 16-bit ones alone can. Lane l of warp w
// holds, in fours, columns 2 (l % 4) and the next of every eight, of rows 16 w + l / 4 and that
// + 8.
template <class scalar_t, int columns, bool transposed>
__device__ __forceinline__ void start_wgmma(float* sums, uint64_t a, uint64_t b) {
  static_assert(columns == 64 || columns == 128);
  static_assert(!transposed || sizeof(scalar_t) == 2);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
    if constexpr (columns == 64) DLOPS_WGMMA_64("k16.f32.bf16.bf16", ", %34, %34");
    if constexpr (columns == 128) DLOPS_WGMMA_128("k16.f32.bf16.bf16", ", %66, %66");
  } else if constexpr (std::is_same_v<scalar_t, c10::Half>) {
    if constexpr (columns == 64) DLOPS_WGMMA_64("k16.f32.f16.f16", ", %34, %34");
    if constexpr (columns == 128) DLOPS_WGMMA_128("k16.f32.f16.f16", ", %66, %66");
  } else {
    static_assert(std::is_same_v<scalar_t, float>);
    if constexpr (columns == 64) DLOPS_WGMMA_64("k8.f32.tf32.tf32", "");
    if constexpr (columns == 128) DLOPS_WGMMA_128("k8.f32.tf32.tf32", "");
  }
#else
  __trap();
#endif
}

#undef DLOPS_WGMMA_128
#undef DLOPS_WGMMA_64
#undef DLOPS_FLOATS_32
#undef DLOPS_FLOATS_8

// Between what wrote the sums, and products that add to them.
__device__ __forceinline__ void open_wgmma() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// Ends a batch of products; waits for all but the last `pending` batches.
__device__ __forceinline__ void close_wgmma() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
template <int pending>
__device__ __forceinline__ void wait_for_wgmma() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#endif
}
// Shows what the thread wrote to shared memory to the products that read it there.
__device__ __forceinline__ void publish_for_wgmma() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace dlops::cuda
