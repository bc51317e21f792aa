#include "cuda/capture.h"

#include "common/cuda_utils.cuh"

namespace dlops::cuda {

#if defined(__CUDACC__)
uint64_t capture(int device) {
  const auto stream = c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device));
  auto status = cudaStreamCaptureStatusNone;
  unsigned long long number = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &number));
  return status == cudaStreamCaptureStatusActive ? number : 0;
}
#else
uint64_t capture(int) { return 0; }
#endif

}  // namespace dlops::cuda
