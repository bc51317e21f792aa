// The geometry and the rules of 2-D max pooling, free of torch, shared by the CPU and CUDA kernels.
//
// Rules, as in torch: the first of equal maxima (in row-major order of the window) wins, a NaN
// beats every number, the last NaN wins over earlier ones, and padding never wins, not even over
// -inf. A window cell (r, s) is numbered r * kernel_w + s, of the kernel that the caller gave.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dlops {

struct Pool2dGeometry {
  int64_t N, C, H, W;
  int64_t OH, OW;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;
  // How cells are numbered: the first one's number, and the step from a kernel row to the next.
  int64_t first_cell, cell_step;

  DLOPS_HOST_DEVICE int64_t cells() const { return kernel_h * kernel_w; }
  DLOPS_HOST_DEVICE int64_t input_row(int64_t oh, int64_t r) const {
    return oh * stride_h - pad_h + r * dilation_h;
  }
  DLOPS_HOST_DEVICE int64_t input_col(int64_t ow, int64_t s) const {
    return ow * stride_w - pad_w + s * dilation_w;
  }
  DLOPS_HOST_DEVICE int64_t cell_number(int64_t r, int64_t s) const {
    return first_cell + r * cell_step + s;
  }
  // Position in the H x W plane of window cell `cell` of output pixel (oh, ow).
  DLOPS_HOST_DEVICE int64_t plane_index(int64_t oh, int64_t ow, int64_t cell) const {
    return input_row(oh, cell / kernel_w) * W + input_col(ow, cell % kernel_w);
  }
};

// Up to this many window cells, a cell's number is saved in one byte.
constexpr int64_t kMaxByteCells = 256;

// The smallest kernel offset k >= 0 for which start + k * dilation is not negative.
DLOPS_HOST_DEVICE int64_t first_offset_inside(int64_t start, int64_t dilation) {
  return start >= 0 ? 0 : dilation == 1 ? -start : (-start + dilation - 1) / dilation;
}

// The number of kernel offsets k < kernel for which start + k * dilation < size.
DLOPS_HOST_DEVICE int64_t offsets_before(int64_t start, int64_t dilation, int64_t kernel,
                                         int64_t size) {
  if (start >= size) return 0;
  // A division takes longer than the window of one output.
  const int64_t left = size - start;
  const int64_t count = dilation == 1 ? left : (left + dilation - 1) / dilation;
  return count < kernel ? count : kernel;
}

// The same windows without the kernel's rows and columns that lie in the padding for every output:
// a kernel may be far larger than the image.
inline Pool2dGeometry without_padding_cells(Pool2dGeometry g) {
  const auto trim = [](int64_t outputs, int64_t size, int64_t stride, int64_t dilation,
                       int64_t& padding, int64_t& kernel) {
    const int64_t first = first_offset_inside((outputs - 1) * stride - padding, dilation);
    const int64_t end = offsets_before(-padding, dilation, kernel, size);
    // At least one stays: a window of padding alone has a result too.
    const int64_t skipped = first < kernel ? first : kernel - 1;
    padding -= skipped * dilation;
    kernel = end > skipped ? end - skipped : 1;
    return skipped;
  };
  const int64_t r = trim(g.OH, g.H, g.stride_h, g.dilation_h, g.pad_h, g.kernel_h);
  const int64_t s = trim(g.OW, g.W, g.stride_w, g.dilation_w, g.pad_w, g.kernel_w);
  g.first_cell = g.cell_number(r, s);
  return g;
}

// Whether `value` replaces the best value so far.
template <class T>
DLOPS_HOST_DEVICE bool takes_over(T value, T best) {
  return value > best || value != value;
}

// torch.nn.MaxPool2d's output size; with ceil_mode the last window must start inside the image or
// its left padding.
DLOPS_HOST_DEVICE int64_t pool_output_size(int64_t input, int64_t kernel, int64_t stride,
                                           int64_t padding, int64_t dilation, bool ceil_mode) {
  const int64_t reach = input + 2 * padding - dilation * (kernel - 1) - 1;
  const int64_t numerator = reach + (ceil_mode ? stride - 1 : 0);
  // Rounds towards minus infinity, so that a kernel larger than the padded input gives 0 or less.
  int64_t quotient = numerator / stride;
  if (numerator % stride != 0 && numerator < 0) --quotient;
  int64_t size = quotient + 1;
  if (ceil_mode && (size - 1) * stride >= input + padding) --size;
  return size;
}

}  // namespace dlops
