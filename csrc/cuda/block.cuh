// A block of threads that works in phases: what every thread does, what every warp does together,
// and the barriers in between, on tiles that arrive in shared memory while the block computes.
//
// But for wgmma.cuh and tma.cuh nothing else in the kernels of matrix products knows of threadIdx
// or of instructions. A plain C++ compiler takes the block of host_block.h, whose threads take
// turns and whose copies arrive when they like, so that the kernels run under the op tests without
// a GPU.
#pragma once

#include "common/cuda_utils.cuh"

#if defined(__CUDACC__)
#include "cuda/tma.cuh"
#include "cuda/wgmma.cuh"

#define DLOPS_DEVICE __device__ __forceinline__

namespace dlops::cuda {

class Block {
 public:
  // A value that each thread has of its own, in registers.
  template <class T>
  struct PerThread {
    T own;
    DLOPS_DEVICE T& operator[](int) { return own; }
  };

  // Calls f(thread) in every thread.
  template <class F>
  DLOPS_DEVICE void threads(const F& f) const {
    f(static_cast<int>(threadIdx.x));
  }
  // Calls f(warp) in every warp, for what its threads do together.
  template <class F>
  DLOPS_DEVICE void warps(const F& f) const {
    f(static_cast<int>(threadIdx.x) / 32);
  }
  // Calls f(group) in every four warps, for what these do together.
  template <class F>
  DLOPS_DEVICE void groups(const F& f) const {
    f(static_cast<int>(threadIdx.x) / 128);
  }
  // Calls f(thread) in the threads of this warp.
  template <class F>
  DLOPS_DEVICE void lanes(int, const F& f) const {
    f(static_cast<int>(threadIdx.x));
  }
  DLOPS_DEVICE void sync() const { __syncthreads(); }

  // Starts to copy to shared memory, or to fill with zeros where the source is not `valid`.
  template <int bytes>
  DLOPS_DEVICE void copy(void* shared, const void* global, bool valid) const {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int count = valid ? bytes : 0;
    if constexpr (bytes == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                   "r"(count)
                   : "memory");
    } else if constexpr (bytes >= 4) {
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global),
                   "n"(bytes), "r"(count)
                   : "memory");
    } else {  // less than the instruction takes: at once
      *static_cast<uint16_t*>(shared) = valid ? *static_cast<const uint16_t*>(global) : uint16_t(0);
    }
  }
  // Ends a batch of copies.
  DLOPS_DEVICE void commit() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Waits for the thread's own copies but those of the last `pending` batches.
  template <int pending>
  DLOPS_DEVICE void wait() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
  }

  // Four matrices of 8 rows of 16 bytes. Lane l says where row l % 8 of matrix l / 8 is, and gets
  // the four bytes l % 4 of row l / 4 of each matrix: to(thread)[0 .. 3].
  template <class F, class G>
  DLOPS_DEVICE void load_matrices(int, const F& to, const G& from) const {
    uint32_t* const r = to(static_cast<int>(threadIdx.x));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(own_address(from))
                 : "memory");
  }
  // The same of 16-bit elements, each matrix transposed.
  template <class F, class G>
  DLOPS_DEVICE void load_transposed(int, const F& to, const G& from) const {
    uint32_t* const r = to(static_cast<int>(threadIdx.x));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(own_address(from))
                 : "memory");
  }

  // sums (16 x 8) += a (16 rows of 32 bytes) x b^T (8 rows of 32 bytes), in float32 or float64.
  // Lane l holds of a the four bytes l % 4 of rows l / 4 and l / 4 + 8, for the first and then for
  // the last 16 bytes of the rows, or the float64 l % 4 of both rows; of b likewise those of row l
  // / 4; and of sums columns 2 (l % 4) and the next of rows l / 4 and l / 4 + 8.
  template <class scalar_t, class C, class A, class B>
  DLOPS_DEVICE void multiply_add(int, const C& sums, const A& a_of, const B& b_of) const {
    const int thread = static_cast<int>(threadIdx.x);
    auto* const c = sums(thread);
    const auto* const a = a_of(thread);
    const auto* const b = b_of(thread);
    if constexpr (std::is_same_v<scalar_t, double>) {
      DLOPS_UNROLL
      for (int i = 0; i < 2; ++i)
        asm volatile(
            "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+d"(c[i * 2]), "+d"(c[i * 2 + 1])
            : "d"(a[i]), "d"(b[0]));
    } else if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else if constexpr (std::is_same_v<scalar_t, c10::Half>) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      static_assert(std::is_same_v<scalar_t, float>);
      asm volatile(
          "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(to_tf32(a[0])), "r"(to_tf32(a[1])), "r"(to_tf32(a[2])), "r"(to_tf32(a[3])),
            "r"(to_tf32(b[0])), "r"(to_tf32(b[1])));
    }
  }

  // sums (64 x columns) += a (64 x 32 bytes) x b (32 bytes x columns), by a group of warps: started
  // here, and there after finish_products(). float32 must be TF32 already. Both factors lie in rows
  // of 128 bytes, permuted as chunk ^ row % 8 in memory aligned to 1024 bytes. A row runs over the
  // numbers that are added up or, `transposed` (16-bit numbers), over 64 of the others, where the
  // next 64 follow after `leading` bytes. A thread holds the sums that multiply_add gives it, of
  // its warp's 16 rows and each eight columns.
  template <class scalar_t, int columns, bool transposed, class C>
  DLOPS_DEVICE void start_product(int, const C& sums, const unsigned char* a,
                                  const unsigned char* b, int leading) const {
    start_wgmma<scalar_t, columns, transposed>(
        sums(static_cast<int>(threadIdx.x)), shared_matrix(a, leading), shared_matrix(b, leading));
  }
  // Around the products of one stage.
  DLOPS_DEVICE void open_products() const { open_wgmma(); }
  DLOPS_DEVICE void close_products() const { close_wgmma(); }
  // Waits until the products are there, but those of the last `pending` stages.
  template <int pending = 0>
  DLOPS_DEVICE void finish_products() const {
    wait_for_wgmma<pending>();
  }
  // Between the sums of products and what else writes or reads them: not earlier or later, whatever
  // the compiler knows of registers that change behind its back.
  template <class T>
  DLOPS_DEVICE void settle(PerThread<T>& sums) const {
    DLOPS_UNROLL
    for (auto& row : sums.own.values) DLOPS_UNROLL
    for (auto& product : row) DLOPS_UNROLL
    for (float& sum : product) asm volatile("" : "+f"(sum)::"memory");
  }
  // Shows products what the thread wrote to shared memory, or what was copied for it.
  DLOPS_DEVICE void publish() const { publish_for_wgmma(); }

  // Calls f() in one thread.
  template <class F>
  DLOPS_DEVICE void one(const F& f) const {
    if (threadIdx.x == 0) f();
    __syncwarp();
  }
  // Barriers in shared memory, each of which goes through phases that end when as many bytes have
  // come as were expected. Opened, closed and told what to expect by one thread.
  DLOPS_DEVICE void open_barriers(uint64_t* barriers, int count) const {
    for (int i = 0; i < count; ++i) open_tma_barrier(barriers + i);
    publish_tma_barriers();
  }
  DLOPS_DEVICE void close_barriers(uint64_t* barriers, int count) const {
    for (int i = 0; i < count; ++i) close_tma_barrier(barriers + i);
  }
  DLOPS_DEVICE void expect(uint64_t* barrier, int bytes) const { expect_tma(barrier, bytes); }
  // Start to copy a box, by one thread.
  DLOPS_DEVICE void copy_rows(void* shared, const BoxMap& map, uint64_t* barrier, int c, int plane,
                              int row) const {
    start_tma_rows(shared, map, barrier, c, plane, row);
  }
  DLOPS_DEVICE void copy_pixels(void* shared, const BoxMap& map, uint64_t* barrier, int c, int n,
                                int h, int w, int dh, int dw) const {
    start_tma_pixels(shared, map, barrier, c, n, h, w, dh, dw);
  }
  // Waits for the end of a phase: the first, third, ... have parity 0. Every thread.
  DLOPS_DEVICE void wait_for_phase(uint64_t* barrier, int parity) const {
    while (!tma_is_over(barrier, parity)) {
    }
    __syncwarp();
  }

 private:
  template <class G>
  DLOPS_DEVICE static unsigned own_address(const G& from) {
    return static_cast<unsigned>(
        __cvta_generic_to_shared(from(static_cast<int>(threadIdx.x) % 32)));
  }
  // To the nearest: the instruction itself would cut the digits off.
  DLOPS_DEVICE static uint32_t to_tf32(uint32_t number) {
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(__uint_as_float(number)));
    return result;
  }
};

template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kBlocks) for_each_tile_kernel(
    const __grid_constant__ Tiles tiles) {  // in place, where the TMA reads maps
  extern __shared__ __align__(1024) unsigned char shared[];
  Block block;
  for (int64_t tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    block.sync();  // until every warp is done with the last tile's memory
    tiles(block, shared, tile);
  }
}

// Calls tiles(block, shared memory, i) with i = 0 ... tiles.count() - 1, one block for each.
template <class Tiles>
void for_each_tile(const Tiles& tiles) {
  if (tiles.count() == 0) return;
  const auto kernel = for_each_tile_kernel<Tiles>;
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      Tiles::kSharedBytes));
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles.count(), 1 << 30));
  kernel<<<blocks, Tiles::kThreads, Tiles::kSharedBytes, c10::cuda::getCurrentCUDAStream()>>>(
      tiles);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace dlops::cuda

#else
#define DLOPS_DEVICE inline
#endif
