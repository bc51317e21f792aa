// Max pooling on CUDA, contiguous and channels_last. The rules are max_pool2d_math.h's.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "common/checks.h"
#include "common/cuda_utils.cuh"
#include "cuda/max_pool2d_squares.cuh"
#include "cuda/windows.cuh"
#include "max_pool2d_math.h"

namespace dlops::cuda {
namespace {

// One pack of outputs per index: the maxima of its windows and, where `cells` is not null, the
// cells they stand in.
template <class scalar_t, class cell_t, class Packs>
struct MaxPool2d {
  using value_t = at::opmath_type<scalar_t>;  // holds every scalar_t exactly
  Pool2dGeometry g;
  Packs outputs;
  const scalar_t* input;
  scalar_t* output;
  cell_t* cells;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    using limits = std::numeric_limits<value_t>;
    const Pack at = outputs[i];
    const int64_t row = g.input_row(at.row, 0), col = g.input_col(at.col, 0);
    const int64_t r_begin = first_offset_inside(row, g.dilation_h);
    const int64_t s_begin = first_offset_inside(col, g.dilation_w);
    const int64_t r_end = offsets_before(row, g.dilation_h, g.kernel_h, g.H);
    const int64_t s_end = offsets_before(col, g.dilation_w, g.kernel_w, g.W);
    value_t best[Packs::width];
    typename Packs::template Values<cell_t> cell;
    for (int j = 0; j < Packs::width; ++j) {
      best[j] = limits::has_infinity ? -limits::infinity() : limits::lowest();
      cell.of[j] = static_cast<cell_t>(r_begin * g.kernel_w + s_begin);
    }
    const int64_t pixels = g.H * g.W, step = outputs.pixel_step();
    const scalar_t* const plane = input + outputs.start(at, pixels);
    typename Packs::template Values<scalar_t> values{};
    for (int64_t r = r_begin; r < r_end; ++r) {
      const int64_t pixel = (row + r * g.dilation_h) * g.W + col;
      for (int64_t s = s_begin; s < s_end; ++s) {
        outputs.load(values, plane + (pixel + s * g.dilation_w) * step, at, pixels);
        const auto number = static_cast<cell_t>(r * g.kernel_w + s);
        for (int j = 0; j < Packs::width; ++j) {
          const auto value = static_cast<value_t>(values.of[j]);
          const bool takes = takes_over(value, best[j]);
          best[j] = takes ? value : best[j];
          cell.of[j] = takes ? number : cell.of[j];
        }
      }
    }
    for (int j = 0; j < Packs::width; ++j) values.of[j] = static_cast<scalar_t>(best[j]);
    const int64_t to =
        outputs.start(at, g.OH * g.OW) + (at.row * g.OW + at.col) * outputs.pixel_step();
    outputs.store(values, output + to, at, g.OH * g.OW);
    if (cells != nullptr) outputs.store(cell, cells + to, at, g.OH * g.OW);
  }
};

// One pack of inputs per index: the sums of the gradients of the windows that chose them.
template <class scalar_t, class cell_t, class Packs>
struct Scatter {
  using sum_t = at::opmath_type<scalar_t>;
  Packs inputs;
  WindowAxis h, w;
  Pool2dGeometry g;
  const scalar_t* grad_output;
  const cell_t* cells;
  scalar_t* grad_input;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Pack at = inputs[i];
    const int64_t pixels = g.OH * g.OW, step = inputs.pixel_step();
    const int64_t start = inputs.start(at, pixels);
    sum_t sums[Packs::width] = {};
    typename Packs::template Values<cell_t> cell{};
    typename Packs::template Values<scalar_t> grad{};
    h.for_each_window(at.row + g.pad_h, [&](int64_t oh, int64_t r) {
      w.for_each_window(at.col + g.pad_w, [&](int64_t ow, int64_t s) {
        const int64_t output = start + (oh * g.OW + ow) * step;
        const auto own = static_cast<cell_t>(r * g.kernel_w + s);
        inputs.load(cell, cells + output, at, pixels);
        bool any = false;
        for (int j = 0; j < Packs::width; ++j) any = any || cell.of[j] == own;
        if (!any) return;
        inputs.load(grad, grad_output + output, at, pixels);
        for (int j = 0; j < Packs::width; ++j)
          sums[j] += cell.of[j] == own ? static_cast<sum_t>(grad.of[j]) : sum_t(0);
      });
    });
    for (int j = 0; j < Packs::width; ++j) grad.of[j] = static_cast<scalar_t>(sums[j]);
    const int64_t to = inputs.start(at, g.H * g.W) + (at.row * g.W + at.col) * step;
    inputs.store(grad, grad_input + to, at, g.H * g.W);
  }
};

// One output per index: its maximum's position in the H x W plane.
template <class cell_t, class Packs>
struct CellToIndex {
  Pool2dGeometry g;
  Packs outputs;
  const cell_t* cells;
  int64_t* indices;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Pack at = outputs[i];
    indices[i] = g.plane_index(at.row, at.col, cells[i]);
  }
};

// One output per index: the input that its window chose.
template <class bits_t, class cell_t, class Packs>
struct Gather {
  Pool2dGeometry g;
  Packs outputs;
  const bits_t* input;
  const cell_t* cells;
  bits_t* output;

  DLOPS_HOST_DEVICE void operator()(int64_t i) const {
    const Pack at = outputs[i];
    const int64_t pixel = g.plane_index(at.row, at.col, cells[i]);
    // A dilated window can miss the image altogether; its cell then lies outside.
    const bool inside = 0 <= pixel && pixel < g.H * g.W;
    const int64_t start = outputs.start(at, g.H * g.W);
    output[i] = inside ? input[start + pixel * outputs.pixel_step()] : bits_t{};
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

// Calls f(Packs) for images of H x W pixels: 4 planes at a time or, in channels_last, as many
// channels as 16 bytes hold, where the channels and the addresses in `data` allow that.
template <class scalar_t, class F>
void with_packs(const Pool2dGeometry& g, int64_t H, int64_t W, at::MemoryFormat format,
                std::initializer_list<const at::Tensor*> data, const F& f) {
  constexpr int width = std::min<int>(8, 16 / sizeof(scalar_t));
  if (!is_channels_last(format)) return f(Packs<4, false>(g.N, g.C, H, W));
  are_aligned(g.C, width, data) ? f(Packs<width, true>(g.N, g.C, H, W))
                                : f(Packs<1, true>(g.N, g.C, H, W));
}

// The same, with one element per index.
template <class F>
void with_elements(const Pool2dGeometry& g, int64_t H, int64_t W, at::MemoryFormat format,
                   const F& f) {
  is_channels_last(format) ? f(Packs<1, true>(g.N, g.C, H, W)) : f(Packs<1, false>(g.N, g.C, H, W));
}

// Calls f(Square()) for the windows that max_pool2d_squares.cuh takes, and says whether it did.
template <class F>
bool with_square(const Pool2dGeometry& g, const F& f) {
  const auto takes = [&]<int kernel, int stride>(Square<kernel, stride> square) {
    if (!are_squares(g, kernel, stride)) return false;
    f(square);
    return true;
  };
  return takes(Square<2, 2>()) || takes(Square<3, 2>()) || takes(Square<3, 1>());
}

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
      with_packs<scalar_t>(g, g.OH, g.OW, format, {&dense, &output}, [&](auto packs) {
        using P = decltype(packs);
        const scalar_t* const from = dense.const_data_ptr<scalar_t>();
        scalar_t* const to = output.mutable_data_ptr<scalar_t>();
        cell_t* const cells_to = cells == nullptr ? nullptr : cells->mutable_data_ptr<cell_t>();
        if constexpr (std::is_same_v<cell_t, uint8_t>) {
          if (with_square(g, [&]<int kernel, int stride>(Square<kernel, stride>) {
                for_each(packs.count(),
                         MaxPool2dSquares<scalar_t, P, kernel>{g, packs, from, to, cells_to});
              }))
            return;
        }
        for_each(packs.count(), MaxPool2d<scalar_t, cell_t, P>{g, packs, from, to, cells_to});
      });
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
    with_elements(g, g.OH, g.OW, format, [&](auto packs) {
      for_each(packs.count(),
               CellToIndex<cell_t, decltype(packs)>{g, packs, dense.const_data_ptr<cell_t>(),
                                                    indices.mutable_data_ptr<int64_t>()});
    });
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
          const scalar_t* const from = dense.const_data_ptr<scalar_t>();
          const cell_t* const chosen = dense_cells.const_data_ptr<cell_t>();
          scalar_t* const to = grad_input.mutable_data_ptr<scalar_t>();
          with_packs<scalar_t>(
              g, g.H, g.W, format, {&dense, &dense_cells, &grad_input}, [&](auto packs) {
                using P = decltype(packs);
                if constexpr (std::is_same_v<cell_t, uint8_t>) {
                  if (with_square(g, [&]<int kernel, int stride>(Square<kernel, stride>) {
                        using Squares = ScatterSquares<scalar_t, P, kernel, stride>;
                        const P squares = Squares::squares_of(g);
                        for_each(squares.count(), Squares{squares, g, from, chosen, to});
                      }))
                    return;
                }
                for_each(packs.count(),
                         Scatter<scalar_t, cell_t, P>{
                             packs, WindowAxis(g.kernel_h, g.stride_h, g.dilation_h, g.OH),
                             WindowAxis(g.kernel_w, g.stride_w, g.dilation_w, g.OW), g, from,
                             chosen, to});
              });
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
      with_elements(g, g.OH, g.OW, format, [&](auto packs) {
        for_each(packs.count(), Gather<bits_t, cell_t, decltype(packs)>{
                                    g, packs, static_cast<const bits_t*>(dense.const_data_ptr()),
                                    dense_cells.const_data_ptr<cell_t>(),
                                    static_cast<bits_t*>(output.mutable_data_ptr())});
      });
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
