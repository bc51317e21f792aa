// Rows worked on by teams: one thread, one warp or one block for each row, whatever suits the row's
// length. A functor f(row, team) splits the row among the team's members and combines what they
// have through team.reduce, always in the same order.
#pragma once

#include "common/cuda_utils.cuh"

#if defined(__CUDACC__)
#include <cub/block/block_reduce.cuh>
#include <cub/util_ptx.cuh>
#include <cub/warp/warp_reduce.cuh>

namespace dlops::cuda {

struct ThreadTeam {
  static constexpr int size = 1;
  __device__ static int rank() { return 0; }
  template <class T, class Op>
  __device__ static T reduce(T value, const Op&) {
    return value;
  }
};

struct WarpTeam {
  static constexpr int size = 32;
  __device__ static int rank() { return static_cast<int>(threadIdx.x) % size; }
  // The result is known to every member; likewise below.
  template <class T, class Op>
  __device__ static T reduce(T value, const Op& op) {
    using Reduce = cub::WarpReduce<T, size>;
    __shared__ typename Reduce::TempStorage storage[kThreads / size];
    const T total = Reduce(storage[threadIdx.x / size]).Reduce(value, op);
    return cub::ShuffleIndex<size>(total, 0, 0xffffffff);
  }
};

struct BlockTeam {
  static constexpr int size = kThreads;
  __device__ static int rank() { return static_cast<int>(threadIdx.x); }
  template <class T, class Op>
  __device__ static T reduce(T value, const Op& op) {
    using Reduce = cub::BlockReduce<T, size>;
    __shared__ typename Reduce::TempStorage storage;
    __shared__ T result;
    const T total = Reduce(storage).Reduce(value, op);
    if (threadIdx.x == 0) result = total;
    __syncthreads();
    const T everyones = result;
    __syncthreads();  // the next call writes to the same memory
    return everyones;
  }
};

template <class Team, class F>
__global__ void __launch_bounds__(kThreads) for_each_row_kernel(const int64_t rows, const F f) {
  constexpr int64_t teams = kThreads / Team::size;  // in a block
  const int64_t step = gridDim.x * teams;
  for (int64_t row = blockIdx.x * teams + threadIdx.x / Team::size; row < rows; row += step)
    f(row, Team());
}

template <class Team, class F>
void launch_rows(int64_t rows, const F& f) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for_each_row_kernel<Team><<<blocks_for(rows * Team::size), kThreads, 0, stream>>>(rows, f);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls f(row, team) for rows of `length` elements, which lie `stride` apart.
template <class F>
void for_each_row(int64_t rows, int64_t length, int64_t stride, const F& f) {
  if (rows == 0) return;
  // Apart, neighbouring threads read neighbouring rows; short rows would leave a warp idle.
  if (stride > 1 || length <= 16) return launch_rows<ThreadTeam>(rows, f);
  if (length <= 2048) return launch_rows<WarpTeam>(rows, f);
  launch_rows<BlockTeam>(rows, f);
}

}  // namespace dlops::cuda
#endif
