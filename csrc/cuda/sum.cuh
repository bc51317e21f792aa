// A sum over any number of values with the same bits on every run: each block sums a fixed share of
// them, then one block sums what the others left, always in the same order. In double, so that its
// own rounding does not show.
#pragma once

#include "common/cuda_utils.cuh"

#if defined(__CUDACC__)
#include <ATen/ops/empty.h>

#include <cub/block/block_reduce.cuh>

namespace dlops::cuda {

// The sum over the block, known to thread 0.
__device__ inline double block_sum(double value) {
  using Reduce = cub::BlockReduce<double, kThreads>;
  __shared__ typename Reduce::TempStorage storage;
  return Reduce(storage).Sum(value);
}

template <class F>
__global__ void __launch_bounds__(kThreads)
    partial_sums_kernel(const int64_t count, const F f, double* const partials) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  double sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step)
    sum += static_cast<double>(f(i));
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <class F, class G>
__global__ void __launch_bounds__(kThreads)
    whole_sum_kernel(const int64_t count, const F f, const G finish) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += static_cast<double>(f(i));
  sum = block_sum(sum);
  if (threadIdx.x == 0) finish(sum);
}

struct PartialSum {
  const double* partials;
  __device__ double operator()(int64_t i) const { return partials[i]; }
};

// Calls finish(partials[0] + ... + partials[count - 1]) on the device.
template <class G>
void final_sum(int64_t count, const double* partials, const G& finish) {
  const auto stream = c10::cuda::getCurrentCUDAStream();
  whole_sum_kernel<<<1, kThreads, 0, stream>>>(count, PartialSum{partials}, finish);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls finish(f(0) + ... + f(count - 1)) on the device. `options` says on which.
template <class F, class G>
void sum(int64_t count, const F& f, const G& finish, const at::TensorOptions& options) {
  constexpr int64_t kMost = 1024, kPerThread = 4;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  // A few values are summed by one block before a second kernel could start.
  if (count <= kThreads * kPerThread) {
    whole_sum_kernel<<<1, kThreads, 0, stream>>>(count, f, finish);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const auto blocks = static_cast<unsigned>(
      std::min((count + kThreads * kPerThread - 1) / (kThreads * kPerThread), kMost));
  const at::Tensor partials = at::empty({blocks}, options.dtype(at::kDouble));
  auto* to = partials.mutable_data_ptr<double>();
  partial_sums_kernel<<<blocks, kThreads, 0, stream>>>(count, f, to);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  final_sum(blocks, to, finish);
}

}  // namespace dlops::cuda
#endif
