// Max pooling on CUDA, contiguous and channels_last. The rules are max_pool2d_math.h's.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <limits>

#include "common/checks.h"
#include "common/cuda_utils.cuh"
#include "cuda/windows.cuh"
#include "max_pool2d_math.h"

namespace dlops::cuda {
namespace {

// One output per index: its window's maximum and, where `cells` is not null, the cell it stands in.
template <class scalar_t, class cell_t>
struct MaxPool2d {
  using value_t = at::opmath_type<scalar_t>;  // holds every scalar_t exactly
  Pool2dGeometry g;
  bool channels_last;
  const scalar_t* input;
  scalar_t* output;
  cell_t* cells;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    using limits = std::numeric_limits<value_t>;
    const Position at(i, g.C, g.OH * g.OW, channels_last);
    const Plane plane(at.n, at.c, g.C, g.H * g.W, channels_last);
    const int64_t row = g.input_row(at.pixel / g.OW, 0), col = g.input_col(at.pixel % g.OW, 0);
    const int64_t r_begin = first_offset_inside(row, g.dilation_h);
    const int64_t s_begin = first_offset_inside(col, g.dilation_w);
    const int64_t r_end = offsets_before(row, g.dilation_h, g.kernel_h, g.H);
    const int64_t s_end = offsets_before(col, g.dilation_w, g.kernel_w, g.W);
    value_t best = limits::has_infinity ? -limits::infinity() : limits::lowest();
    int64_t cell = r_begin * g.kernel_w + s_begin;
    for (int64_t r = r_begin; r < r_end; ++r) {
      const int64_t pixel = (row + r * g.dilation_h) * g.W + col;
      for (int64_t s = s_begin; s < s_end; ++s) {
        const auto value = static_cast<value_t>(input[plane[pixel + s * g.dilation_w]]);
        if (!takes_over(value, best)) continue;
        best = value;
        cell = r * g.kernel_w + s;
      }
    }
    output[i] = static_cast<scalar_t>(best);
    if (cells != nullptr) cells[i] = static_cast<cell_t>(cell);
  }
};

// One output per index: its maximum's position in the H x W plane.
template <class cell_t>
struct CellToIndex {
  Pool2dGeometry g;
  bool channels_last;
  const cell_t* cells;
  int64_t* indices;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const int64_t pixel = Position(i, g.C, g.OH * g.OW, channels_last).pixel;
    indices[i] = g.plane_index(pixel / g.OW, pixel % g.OW, cells[i]);
  }
};

// One input per index: the sum of the gradients of the windows that chose it.
template <class scalar_t, class cell_t>
struct Scatter {
  using sum_t = at::opmath_type<scalar_t>;
  Pool2dGeometry g;
  bool channels_last;
  const scalar_t* grad_output;
  const cell_t* cells;
  scalar_t* grad_input;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Position at(i, g.C, g.H * g.W, channels_last);
    const Plane outputs(at.n, at.c, g.C, g.OH * g.OW, channels_last);
    const int64_t h = at.pixel / g.W + g.pad_h, w = at.pixel % g.W + g.pad_w;
    sum_t sum(0);
    for_each_window(h, g.kernel_h, g.stride_h, g.dilation_h, g.OH, [&](int64_t oh, int64_t r) {
      for_each_window(w, g.kernel_w, g.stride_w, g.dilation_w, g.OW, [&](int64_t ow, int64_t s) {
        const int64_t output = outputs[oh * g.OW + ow];
        if (static_cast<int64_t>(cells[output]) == r * g.kernel_w + s)
          sum += static_cast<sum_t>(grad_output[output]);
      });
    });
    grad_input[i] = static_cast<scalar_t>(sum);
  }
};

// One output per index: the input that its window chose.
template <class bits_t, class cell_t>
struct Gather {
  Pool2dGeometry g;
  bool channels_last;
  const bits_t* input;
  const cell_t* cells;
  bits_t* output;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Position at(i, g.C, g.OH * g.OW, channels_last);
    const Plane plane(at.n, at.c, g.C, g.H * g.W, channels_last);
    const int64_t pixel = g.plane_index(at.pixel / g.OW, at.pixel % g.OW, cells[i]);
    // A dilated window can miss the image altogether; its cell then lies outside.
    output[i] = 0 <= pixel && pixel < g.H * g.W ? input[plane[pixel]] : bits_t{};
  }
};

// Calls f(cell_t()) with the type that the cells of this geometry have.
template <class F>
void with_cell_type(const Pool2dGeometry& g, const F& f) {
  g.cells() <= kMaxByteCells ? f(uint8_t()) : f(int64_t());
}

at::ScalarType cell_dtype(const Pool2dGeometry& g) {
  return g.cells() <= kMaxByteCells ? at::kByte : at::kLong;
}

bool is_channels_last(at::MemoryFormat format) { return format == at::MemoryFormat::ChannelsLast; }

void check_same_device(const at::Tensor& cells, const at::Tensor& other, const char* name,
                       const char* op) {
  TORCH_CHECK(cells.device() == other.device(), op, ": expected all tensors to be on the same ",
              "device, but cells is on ", cells.device(), " and ", name, " is on ", other.device());
}

// The shared part of max_pool2d and max_pool2d_values: `cells` stays undefined where not wanted.
at::Tensor pool(const Pool2dGeometry& g, const at::Tensor& input, at::Tensor* cells) {
  const c10::DeviceGuard guard(input.device());
  const at::MemoryFormat format = input.suggest_memory_format();
  const auto options = input.options().memory_format(format);
  at::Tensor output = at::empty({g.N, g.C, g.OH, g.OW}, options);
  if (cells != nullptr) *cells = at::empty(output.sizes(), options.dtype(cell_dtype(g)));
  if (output.numel() == 0) return output;
  const at::Tensor dense = input.contiguous(format);
  AT_DISPATCH_ALL_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "max_pool2d", [&] {
    with_cell_type(g, [&](auto cell) {
      using cell_t = decltype(cell);
      for_each(output.numel(), MaxPool2d<scalar_t, cell_t>{
                                   g, is_channels_last(format), dense.const_data_ptr<scalar_t>(),
                                   output.mutable_data_ptr<scalar_t>(),
                                   cells == nullptr ? nullptr : cells->mutable_data_ptr<cell_t>()});
    });
  });
  return output;
}

std::tuple<at::Tensor, at::Tensor> max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, bool ceil_mode) {
  const Pool2dGeometry g = pool2d_geometry(input.sizes(), kernel_size, stride, padding, dilation,
                                           ceil_mode, "max_pool2d");
  at::Tensor cells;
  at::Tensor output = pool(g, input, &cells);
  return {output, cells};
}

at::Tensor max_pool2d_values(const at::Tensor& input, at::IntArrayRef kernel_size,
                             at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, bool ceil_mode) {
  const Pool2dGeometry g = pool2d_geometry(input.sizes(), kernel_size, stride, padding, dilation,
                                           ceil_mode, "max_pool2d");
  return pool(g, input, nullptr);
}

at::Tensor max_pool2d_indices(const at::Tensor& cells, at::IntArrayRef input_size,
                              at::IntArrayRef kernel_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Pool2dGeometry g = pool2d_geometry_of_output(input_size, cells.sizes(), kernel_size, stride,
                                                     padding, dilation, "max_pool2d_indices");
  check_cells(cells, g, "max_pool2d_indices");
  const c10::DeviceGuard guard(cells.device());
  const at::MemoryFormat format = cells.suggest_memory_format();
  at::Tensor indices =
      at::empty(cells.sizes(), cells.options().dtype(at::kLong).memory_format(format));
  if (indices.numel() == 0) return indices;
  const at::Tensor dense = cells.contiguous(format);
  with_cell_type(g, [&](auto cell) {
    using cell_t = decltype(cell);
    for_each(indices.numel(),
             CellToIndex<cell_t>{g, is_channels_last(format), dense.const_data_ptr<cell_t>(),
                                 indices.mutable_data_ptr<int64_t>()});
  });
  return indices;
}

at::Tensor max_pool2d_scatter(const at::Tensor& grad_output, const at::Tensor& cells,
                              at::IntArrayRef input_size, at::IntArrayRef kernel_size,
                              at::IntArrayRef stride, at::IntArrayRef padding,
                              at::IntArrayRef dilation) {
  const Pool2dGeometry g = pool2d_geometry_of_output(input_size, cells.sizes(), kernel_size, stride,
                                                     padding, dilation, "max_pool2d_scatter");
  check_cells(cells, g, "max_pool2d_scatter");
  check_sizes(grad_output, "grad_output", cells.sizes(), "max_pool2d_scatter");
  check_same_device(cells, grad_output, "grad_output", "max_pool2d_scatter");
  const c10::DeviceGuard guard(grad_output.device());
  const at::MemoryFormat format = cells.suggest_memory_format();
  at::Tensor grad_input = at::empty(input_size, grad_output.options().memory_format(format));
  if (grad_input.numel() == 0) return grad_input;
  const at::Tensor dense = grad_output.contiguous(format);
  const at::Tensor dense_cells = cells.contiguous(format);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_output.scalar_type(), "max_pool2d_scatter", [&] {
        with_cell_type(g, [&](auto cell) {
          using cell_t = decltype(cell);
          for_each(grad_input.numel(),
                   Scatter<scalar_t, cell_t>{g, is_channels_last(format),
                                             dense.const_data_ptr<scalar_t>(),
                                             dense_cells.const_data_ptr<cell_t>(),
                                             grad_input.mutable_data_ptr<scalar_t>()});
        });
      });
  return grad_input;
}

at::Tensor max_pool2d_gather(const at::Tensor& input, const at::Tensor& cells,
                             at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Pool2dGeometry g = pool2d_geometry_of_output(
      input.sizes(), cells.sizes(), kernel_size, stride, padding, dilation, "max_pool2d_gather");
  check_cells(cells, g, "max_pool2d_gather");
  check_same_device(cells, input, "input", "max_pool2d_gather");
  const c10::DeviceGuard guard(input.device());
  const at::MemoryFormat format = cells.suggest_memory_format();
  at::Tensor output = at::empty(cells.sizes(), input.options().memory_format(format));
  if (output.numel() == 0) return output;
  const at::Tensor dense = input.contiguous(format);
  const at::Tensor dense_cells = cells.contiguous(format);
  with_bits(input.element_size(), [&](auto bits) {
    with_cell_type(g, [&](auto cell) {
      using bits_t = decltype(bits);
      using cell_t = decltype(cell);
      for_each(output.numel(),
               Gather<bits_t, cell_t>{g, is_channels_last(format),
                                      static_cast<const bits_t*>(dense.const_data_ptr()),
                                      dense_cells.const_data_ptr<cell_t>(),
                                      static_cast<bits_t*>(output.mutable_data_ptr())});
    });
  });
  return output;
}

}  // namespace
}  // namespace dlops::cuda

TORCH_LIBRARY_IMPL(dlops, DLOPS_CUDA_KEY, m) {
  m.impl("max_pool2d", &dlops::cuda::max_pool2d);
  m.impl("max_pool2d_values", &dlops::cuda::max_pool2d_values);
  m.impl("max_pool2d_indices", &dlops::cuda::max_pool2d_indices);
  m.impl("max_pool2d_scatter", &dlops::cuda::max_pool2d_scatter);
  m.impl("max_pool2d_gather", &dlops::cuda::max_pool2d_gather);
}
