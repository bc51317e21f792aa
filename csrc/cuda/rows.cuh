// Rows worked on by teams of threads, whatever suits the rows' length. A functor f(row, team)
// splits the row among the team's members and combines what they have through team.reduce, always
// in the same order; it returns the row's part in a sum, 0 where there is none.
#pragma once

#include "common/cuda_utils.cuh"
#include "cuda/sum.cuh"

namespace dlops::cuda {

struct RowShape {
  int64_t rows, length;
  int64_t stride;  // from one element of a row to the next
  int64_t share;   // elements that a member of a team holds in registers (row_share.cuh)
};

}  // namespace dlops::cuda

#if defined(__CUDACC__)
#include <cub/block/block_reduce.cuh>
#include <cub/util_ptx.cuh>
#include <cub/warp/warp_reduce.cuh>

namespace dlops::cuda {

// Each team says where its threads stand in a block: in which of the block's rows, as which member;
// and whether the rows of a block step together, so that each must take part in every reduction.

struct ThreadTeam {
  static constexpr int size = 1;
  static constexpr int rows = kThreads;
  static constexpr bool together = false;
  __device__ static int row() { return static_cast<int>(threadIdx.x); }
  __device__ static int rank() { return 0; }
  template <class T, class Op>
  __device__ static T reduce(T value, const Op&) {
    return value;
  }
};

// `lanes` neighbours of a warp.
template <int lanes>
struct LanesTeam {
  static constexpr int size = lanes;
  static constexpr int rows = kThreads / lanes;
  static constexpr bool together = false;
  __device__ static int row() { return static_cast<int>(threadIdx.x) / lanes; }
  __device__ static int rank() { return static_cast<int>(threadIdx.x) % lanes; }
  // The result is known to every member; likewise below.
  template <class T, class Op>
  __device__ static T reduce(T value, const Op& op) {
    using Reduce = cub::WarpReduce<T, lanes>;
    __shared__ typename Reduce::TempStorage storage[rows];
    const T total = Reduce(storage[row()]).Reduce(value, op);
    // Of these lanes alone: the warp's others may be elsewhere, at an ignored row.
    const unsigned mask = cub::WarpMask<lanes>(threadIdx.x % 32 / lanes);
    return cub::ShuffleIndex<lanes>(total, 0, mask);
  }
};

struct BlockTeam {
  static constexpr int size = kThreads;
  static constexpr int rows = 1;
  static constexpr bool together = false;
  __device__ static int row() { return 0; }
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

// One lane of each of the block's warps. A warp's lanes stand at neighbouring rows, whose elements
// are neighbours in memory where a row's own are not.
struct SliceTeam {
  static constexpr int size = kThreads / 32;
  static constexpr int rows = 32;
  static constexpr bool together = true;
  __device__ static int row() { return static_cast<int>(threadIdx.x) % 32; }
  __device__ static int rank() { return static_cast<int>(threadIdx.x) / 32; }
  template <class T, class Op>
  __device__ static T reduce(T value, const Op& op) {
    __shared__ T values[size][rows];
    values[rank()][row()] = value;
    __syncthreads();
    T total = values[0][row()];
    for (int i = 1; i < size; ++i) total = op(total, values[i][row()]);
    __syncthreads();  // the next call writes to the same memory
    return total;
  }
};

// Calls g(team) with the kind of team that suits the rows.
template <class G>
void with_team(const RowShape& shape, const G& g) {
  // Apart, neighbouring threads read neighbouring rows, one each while the registers hold it.
  if (shape.stride > 1) return shape.length <= shape.share ? g(ThreadTeam()) : g(SliceTeam());
  if (shape.length <= 16) return g(ThreadTeam());  // short rows would leave lanes idle
  if (shape.length <= 8 * shape.share) return g(LanesTeam<8>());
  if (shape.length <= 32 * shape.share) return g(LanesTeam<32>());
  return g(BlockTeam());
}

template <class Team>
unsigned blocks_for_rows(int64_t rows, int64_t max_blocks) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((rows + Team::rows - 1) / Team::rows, 1, max_blocks));
}

// Calls f(row, whether it is one at all) for the rows of this thread's team. Those that step
// together with others go on with the last row where they have none.
template <class Team, class F>
__device__ void for_own_rows(int64_t rows, const F& f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * Team::rows;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * Team::rows; first < rows; first += step) {
    const int64_t row = first + Team::row();
    if (row < rows) {
      f(row, true);
    } else if (Team::together) {
      f(rows - 1, false);
    }
  }
}

// One kernel, whether the sums are asked for or not, so that what f writes has the same bits.
template <class Team, class F>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const int64_t rows, const F f, double* const partials) {
  double sum = 0;
  for_own_rows<Team>(rows, [&](int64_t row, bool counts) {
    const auto value = f(row, Team());
    if (counts && Team::rank() == 0) sum += static_cast<double>(value);
  });
  if (partials == nullptr) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Calls f(row, team) for every row, in no order.
template <class F>
void for_each_row(const RowShape& shape, const F& f, int64_t max_blocks = kMaxBlocks) {
  if (shape.rows == 0) return;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_team(shape, [&](auto team) {
    using Team = decltype(team);
    const unsigned blocks = blocks_for_rows<Team>(shape.rows, max_blocks);
    rows_kernel<Team><<<blocks, kThreads, 0, stream>>>(shape.rows, f, nullptr);
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same, and then finish(the sum of what f returns) on the device, with the same bits on every
// run.
template <class F, class G>
void sum_rows(const RowShape& shape, const F& f, const G& finish,
              const at::TensorOptions& options) {
  constexpr int64_t kMost = 4096;  // which the last block can add up in no time
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_team(shape, [&](auto team) {
    using Team = decltype(team);
    const unsigned blocks = blocks_for_rows<Team>(shape.rows, kMost);
    const at::Tensor partials = at::empty({blocks}, options.dtype(at::kDouble));
    auto* to = partials.mutable_data_ptr<double>();
    rows_kernel<Team><<<blocks, kThreads, 0, stream>>>(shape.rows, f, to);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    final_sum(blocks, to, finish);
  });
}

}  // namespace dlops::cuda
#endif
