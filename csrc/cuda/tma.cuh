// Hopper's copies of whole boxes (the TMA) and the barriers in shared memory that count their
// bytes. For sm_90 and later: elsewhere they trap, and nothing calls them.
#pragma once

#include <cstdint>

#include "cuda/boxes.h"

namespace dlops::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DLOPS_TMA(...) asm volatile(__VA_ARGS__)
#else
#define DLOPS_TMA(...) __trap()
#endif

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// By one thread, before the others come to know of the barrier, and after they are done with it.
__device__ __forceinline__ void open_tma_barrier(uint64_t* barrier) {
  DLOPS_TMA("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void publish_tma_barriers() {
  DLOPS_TMA("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" :: : "memory");
}
__device__ __forceinline__ void close_tma_barrier(uint64_t* barrier) {
  DLOPS_TMA("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Begins the barrier's next phase, which ends when so many bytes have come.
__device__ __forceinline__ void expect_tma(uint64_t* barrier, int bytes) {
  DLOPS_TMA("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
            "r"(bytes) : "memory");
}

// Whether the last phase of this parity is over; waits a while before it says no.
__device__ __forceinline__ bool tma_is_over(uint64_t* barrier, int parity) {
  unsigned over = 0;
  DLOPS_TMA(
      "{\n\t.reg .pred over;\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, over;\n\t}" : "=r"(over) : "r"(shared_address(barrier)),
      "r"(parity) : "memory");
  return over != 0;
}

__device__ __forceinline__ void start_tma_rows(void* shared, const BoxMap& map, uint64_t* barrier,
                                               int c, int plane, int row) {
  DLOPS_TMA(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map.map), "r"(shared_address(barrier)), "r"(c), "r"(plane), "r"(row) : "memory");
}

// From channel c of the window whose first cell is (h, w), at the cell (dh, dw) from there.
__device__ __forceinline__ void start_tma_pixels(void* shared, const BoxMap& map, uint64_t* barrier,
                                                 int c, int n, int h, int w, int dh, int dw) {
  DLOPS_TMA(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(shared_address(shared)),
      "l"(&map.map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n),
      "h"(static_cast<uint16_t>(dw)), "h"(static_cast<uint16_t>(dh)) : "memory");
}

#undef DLOPS_TMA

}  // namespace dlops::cuda
