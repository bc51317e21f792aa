// Boxes as the driver describes them to the TMA.
#include "cuda/boxes.h"

#if defined(__CUDACC__)

#include <c10/cuda/CUDAException.h>
#include <cuda_runtime_api.h>

namespace dlops::cuda {
namespace {

// The driver's function: the library is not linked with, for machines without one.
template <class F>
F* driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  constexpr unsigned kVersion = 12000;  // the first that had them
#if CUDART_VERSION >= 12050
  C10_CUDA_CHECK(
      cudaGetDriverEntryPointByVersion(name, &function, kVersion, cudaEnableDefault, &found));
#else
  static_cast<void>(kVersion);
  C10_CUDA_CHECK(cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &found));
#endif
  TORCH_CHECK(found == cudaDriverEntryPointSuccess, "this CUDA driver has no ", name,
              "; DLOPS_CUDA_CONV2D=implicit_gemm_wgmma needs none");
  return reinterpret_cast<F*>(function);
}

void check(CUresult result, const char* what) {
  TORCH_CHECK(result == CUDA_SUCCESS, "the CUDA driver refused ", what, " (CUresult ",
              static_cast<int>(result), ")");
}

CUtensorMapDataType dtype(BoxNumbers numbers) {
  switch (numbers) {
    case BoxNumbers::bfloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case BoxNumbers::float16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
  }
}

cuuint64_t bytes(int64_t elements, BoxNumbers numbers) {
  return static_cast<cuuint64_t>(elements) * static_cast<cuuint64_t>(bytes_of(numbers));
}
cuuint32_t row_of(BoxNumbers numbers) {
  return static_cast<cuuint32_t>(kBoxBytes / bytes_of(numbers));
}
cuuint64_t size(int64_t elements) { return static_cast<cuuint64_t>(elements); }

}  // namespace

BoxMap map_rows(const BoxesOfRows& boxes) {
  static auto* const encode =
      driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  const std::array<cuuint64_t, 3> sizes = {size(boxes.columns), size(boxes.planes),
                                           size(boxes.rows)};
  const std::array<cuuint64_t, 2> strides = {bytes(boxes.plane, boxes.numbers),
                                             bytes(boxes.row, boxes.numbers)};
  const std::array<cuuint32_t, 3> box = {row_of(boxes.numbers), 1,
                                         static_cast<cuuint32_t>(boxes.box_rows)};
  const std::array<cuuint32_t, 3> steps = {1, 1, 1};
  BoxMap result;
  check(encode(&result.map, dtype(boxes.numbers), 3, const_cast<void*>(boxes.start), sizes.data(),
               strides.data(), box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "boxes of rows");
  return result;
}

BoxMap map_pixels(const BoxesOfPixels& boxes) {
  static auto* const encode =
      driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  const std::array<cuuint64_t, 4> sizes = {size(boxes.C), size(boxes.W), size(boxes.H),
                                           size(boxes.N)};
  const std::array<cuuint64_t, 3> strides = {bytes(boxes.pixel, boxes.numbers),
                                             bytes(boxes.pixel * boxes.W, boxes.numbers),
                                             bytes(boxes.pixel * boxes.W * boxes.H, boxes.numbers)};
  const std::array<int, 2> first = {static_cast<int>(-boxes.pad_left),
                                    static_cast<int>(-boxes.pad_top)};
  const std::array<int, 2> last = {static_cast<int>(boxes.right()),
                                   static_cast<int>(boxes.below())};
  const std::array<cuuint32_t, 4> steps = {1, static_cast<cuuint32_t>(boxes.stride_w),
                                           static_cast<cuuint32_t>(boxes.stride_h), 1};
  BoxMap result;
  check(encode(&result.map, dtype(boxes.numbers), 4, const_cast<void*>(boxes.start), sizes.data(),
               strides.data(), first.data(), last.data(), row_of(boxes.numbers),
               static_cast<cuuint32_t>(boxes.box_pixels), steps.data(),
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        "boxes of pixels");
  return result;
}

}  // namespace dlops::cuda

#endif
