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

template <class G>
__global__ void __launch_bounds__(kThreads)
    final_sum_kernel(const unsigned count, const double* const partials, const G finish) {
  double sum = 0;
  for (unsigned i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) finish(sum);
}

// Calls finish(f(0) + ... + f(count - 1)) on the device. `options` says on which.
template <class F, class G>
void sum(int64_t count, const F& f, const G& finish, const at::TensorOptions& options) {
  constexpr int64_t kMaxBlocks = 1024, kPerThread = 4;
  const unsigned blocks = static_cast<unsigned>(std::clamp<int64_t>(
      (count + kThreads * kPerThread - 1) / (kThreads * kPerThread), 1, kMaxBlocks));
  const at::Tensor partials = at::empty({blocks}, options.dtype(at::kDouble));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  partial_sums_kernel<<<blocks, kThreads, 0, stream>>>(count, f,
                                                       partials.mutable_data_ptr<double>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  final_sum_kernel<<<1, kThreads, 0, stream>>>(blocks, partials.const_data_ptr<double>(), finish);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace dlops::cuda
#endif
