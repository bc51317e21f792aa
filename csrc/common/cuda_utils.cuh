// What every CUDA op launches with: a functor called once per index, on the current stream, with
// 64-bit indices.
//
// Only this header, cuda/sum.cuh, cuda/rows.cuh and, for matrix products, cuda/block.cuh and what
// it includes know about blocks and threads. A plain C++ compiler takes their counterparts from
// host_launch.h and host_block.h, which the tests bring along: then the same functors and launchers
// run on the host, and are tested on machines that have no GPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "common/host_device.h"
#include "cuda/unroll.h"

#if defined(__CUDACC__)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#define DLOPS_CUDA_KEY CUDA  // the dispatch key that the ops of csrc/cuda register under
#else
#include "host_launch.h"
#endif

namespace dlops::cuda {

// Of a launch. Fewer where the kernel may find that there is nothing to do, so that it ends at
// once; some for each multiprocessor are enough to read and write as fast as the memory does.
constexpr int64_t kMaxBlocks = 1 << 30, kFewBlocks = 1024;

#if defined(__CUDACC__)

constexpr int kThreads = 256;

// Blocks of kThreads for `count` indices; the loop in the kernel takes what is left.
inline unsigned blocks_for(int64_t count, int64_t max_blocks) {
  return static_cast<unsigned>(std::min((count + kThreads - 1) / kThreads, max_blocks));
}

template <class F>
__global__ void __launch_bounds__(kThreads) for_each_kernel(const int64_t count, const F f) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step)
    f(i);
}

// Calls f(0) ... f(count - 1), in no order.
template <class F>
void for_each(int64_t count, const F& f, int64_t max_blocks = kMaxBlocks) {
  if (count == 0) return;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for_each_kernel<<<blocks_for(count, max_blocks), kThreads, 0, stream>>>(count, f);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

#endif

// The data of a tensor, or null where it is undefined or empty.
template <class scalar_t>
const scalar_t* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.const_data_ptr<scalar_t>() : nullptr;
}
template <class scalar_t>
scalar_t* mutable_data_or_null(const at::Tensor& tensor) {
  return tensor.defined() && tensor.numel() > 0 ? tensor.mutable_data_ptr<scalar_t>() : nullptr;
}

// Whether `width` neighbours of `channels` can be read and written at once in all these tensors.
inline bool are_aligned(int64_t channels, int64_t width,
                        std::initializer_list<const at::Tensor*> data) {
  return channels % width == 0 && std::ranges::all_of(data, [&](const at::Tensor* tensor) {
           const auto bytes = width * static_cast<int64_t>(tensor->element_size());
           return tensor->numel() == 0 ||
                  reinterpret_cast<intptr_t>(tensor->const_data_ptr()) % bytes == 0;
         });
}

// -------------------------------------------------------------------------------------- copies

// Moves data of any dtype: an element, or several neighbouring ones, as plain bits.
template <int bytes>
struct alignas(bytes) Bits {
  unsigned char bits[bytes];
};

// Calls f(Bits<bytes>()) for a size known at run time: 1, 2, 4, 8 or 16 bytes.
template <class F>
void with_bits(int64_t bytes, const F& f) {
  switch (bytes) {
    case 1:
      return f(Bits<1>());
    case 2:
      return f(Bits<2>());
    case 4:
      return f(Bits<4>());
    case 8:
      return f(Bits<8>());
    default:
      return f(Bits<16>());
  }
}

}  // namespace dlops::cuda
