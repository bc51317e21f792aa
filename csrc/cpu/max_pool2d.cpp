// Max pooling on the CPU: splits the work among threads by rows, or by small planes
// (max_pool2d_turned.h); the loops are in simd/max_pool2d.cpp.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>

#include "common/checks.h"
#include "cpu/capability.h"
#include "cpu/grain.h"
#include "cpu/max_pool2d_turned.h"
#include "cpu/scratch.h"
#include "cpu/simd/max_pool2d.h"

namespace dlops::cpu {
namespace {

bool channels_last(at::MemoryFormat format) { return format == at::MemoryFormat::ChannelsLast; }

// Calls f(first part, parts, row0, row1) in parallel: for all rows of several parts, or for a run
// of rows of one where there are too few parts to share out.
template <class F>
void parallel_planes(int64_t parts, int64_t rows, int64_t visits_per_row, const F& f) {
  const bool many = parts >= std::min(64, 8 * at::get_num_threads());
  const int64_t run = many ? rows : std::min<int64_t>(rows, 16);
  const int64_t runs = ceil_div(rows, run);
  const int64_t each = grain(run * visits_per_row, kVisitsPerThread);
  at::parallel_for(0, parts * runs, each, [&](int64_t begin, int64_t end) {
    if (runs == 1) return f(begin, end - begin, 0, rows);
    for (int64_t i = begin; i < end; ++i)
      f(i / runs, 1, i % runs * run, std::min(rows, (i % runs + 1) * run));
  });
}

// Calls f(part, row0, row1) in parallel for runs of rows of each of `parts` planes or images. All
// the rows of a part go together unless there are too few parts to share out.
template <class F>
void parallel_rows(int64_t parts, int64_t rows, int64_t visits_per_row, const F& f) {
  parallel_planes(parts, rows, visits_per_row,
                  [&](int64_t part, int64_t count, int64_t begin, int64_t end) {
                    for (int64_t i = 0; i < count; ++i) f(part + i, begin, end);
                  });
}

// Calls f with a zero of the type that cells are saved in.
template <class F>
void dispatch_cells(const Pool2dGeometry& g, const F& f) {
  g.cells() <= kMaxByteCells ? f(uint8_t(0)) : f(int64_t(0));
}

template <class scalar_t, class cell_t>
void forward(const Pool2dGeometry& g, const at::Tensor& input, const at::Tensor& output,
             cell_t* cells) {
  const scalar_t* in = input.const_data_ptr<scalar_t>();
  scalar_t* out = output.mutable_data_ptr<scalar_t>();
  const auto part = [](auto* data, int64_t offset) {
    return data == nullptr ? data : data + offset;
  };
  if (channels_last(input.suggest_memory_format())) {
    const auto rows = DLOPS_SIMD(max_pool2d_rows_last, scalar_t, cell_t);
    parallel_rows(g.N, g.OH, g.OW * g.C * g.cells(), [&](int64_t n, int64_t begin, int64_t end) {
      const int64_t image = n * g.C * g.OH * g.OW;
      rows(g, begin, end, in + n * g.C * g.H * g.W, out + image, part(cells, image));
    });
    return;
  }
  if constexpr (std::is_same_v<cell_t, uint8_t>) {
    if constexpr (!std::is_integral_v<scalar_t>) {
      const TurnedPlanes<scalar_t> turned(g);
      if (turned.serve()) return turned.forward(in, out, cells);
    }
    if (side_by_side(g)) {
      const auto rows = DLOPS_SIMD(max_pool2d_pairs, scalar_t);
      parallel_planes(g.N * g.C, g.OH, g.OW * g.cells(),
                      [&](int64_t i, int64_t planes, int64_t begin, int64_t end) {
                        const int64_t plane = i * g.OH * g.OW;
                        rows(g, planes, begin, end, in + i * g.H * g.W, out + plane,
                             part(cells, plane));
                      });
      return;
    }
  }
  const auto rows = DLOPS_SIMD(max_pool2d_rows, scalar_t, cell_t);
  const int64_t bytes = DLOPS_SIMD(max_pool2d_scratch, scalar_t, cell_t)(g);
  parallel_planes(g.N * g.C, g.OH, g.OW * g.cells(),
                  [&](int64_t i, int64_t planes, int64_t begin, int64_t end) {
                    Scratch scratch(bytes);
                    const int64_t plane = i * g.OH * g.OW;
                    rows(g, planes, begin, end, in + i * g.H * g.W, out + plane, part(cells, plane),
                         scratch.take<char>(bytes));
                  });
}

// `cells`, where defined, is allocated and filled as well.
void forward_any(const Pool2dGeometry& g, const at::Tensor& input, const at::Tensor& output,
                 at::Tensor* cells) {
  const at::Tensor dense = input.contiguous(input.suggest_memory_format());
  const Pool2dGeometry visible = without_padding_cells(g);
  AT_DISPATCH_ALL_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "max_pool2d", [&] {
    if (output.numel() == 0) return;
    dispatch_cells(g, [&](auto zero) {
      using cell_t = decltype(zero);
      forward<scalar_t, cell_t>(visible, dense, output,
                                cells == nullptr ? nullptr : cells->mutable_data_ptr<cell_t>());
    });
  });
}

at::Tensor empty_output(const Pool2dGeometry& g, const at::Tensor& like, at::ScalarType dtype) {
  return at::empty({g.N, g.C, g.OH, g.OW},
                   like.options().dtype(dtype).memory_format(like.suggest_memory_format()));
}

std::tuple<at::Tensor, at::Tensor> max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size,
                                              at::IntArrayRef stride, at::IntArrayRef padding,
                                              at::IntArrayRef dilation, bool ceil_mode) {
  const Pool2dGeometry g = pool2d_geometry(input.sizes(), kernel_size, stride, padding, dilation,
                                           ceil_mode, "max_pool2d");
  at::Tensor output = empty_output(g, input, input.scalar_type());
  at::Tensor cells = empty_output(g, input, g.cells() <= kMaxByteCells ? at::kByte : at::kLong);
  forward_any(g, input, output, &cells);
  return {output, cells};
}

at::Tensor max_pool2d_values(const at::Tensor& input, at::IntArrayRef kernel_size,
                             at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, bool ceil_mode) {
  const Pool2dGeometry g = pool2d_geometry(input.sizes(), kernel_size, stride, padding, dilation,
                                           ceil_mode, "max_pool2d");
  at::Tensor output = empty_output(g, input, input.scalar_type());
  forward_any(g, input, output, nullptr);
  return output;
}

// Calls f(offset in the output, offset in the input or -1 where the cell points outside) for every
// output element; both tensors are dense in `format`.
template <class cell_t, class F>
void for_each_cell(const Pool2dGeometry& g, const at::Tensor& cells, at::MemoryFormat format,
                   const F& f) {
  const cell_t* cell = cells.const_data_ptr<cell_t>();
  const bool last = channels_last(format);
  const int64_t planes = last ? g.N : g.N * g.C, channels = last ? g.C : 1;
  parallel_rows(planes, g.OH, g.OW * channels, [&](int64_t i, int64_t begin, int64_t end) {
    for (int64_t oh = begin; oh < end; ++oh) {
      for (int64_t ow = 0; ow < g.OW; ++ow) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = ((i * g.OH + oh) * g.OW + ow) * channels + c;
          const int64_t r = cell[at] / g.kernel_w, s = cell[at] % g.kernel_w;
          const int64_t ih = g.input_row(oh, r), iw = g.input_col(ow, s);
          const bool inside = 0 <= ih && ih < g.H && 0 <= iw && iw < g.W;
          f(at, inside ? ((i * g.H + ih) * g.W + iw) * channels + c : -1, ih * g.W + iw);
        }
      }
    }
  });
}

at::Tensor max_pool2d_indices(const at::Tensor& cells, at::IntArrayRef input_size,
                              at::IntArrayRef kernel_size, at::IntArrayRef stride,
                              at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Pool2dGeometry g = pool2d_geometry_of_output(input_size, cells.sizes(), kernel_size, stride,
                                                     padding, dilation, "max_pool2d_indices");
  check_cells(cells, g, "max_pool2d_indices");
  at::Tensor indices = empty_output(g, cells, at::kLong);
  if (indices.numel() == 0) return indices;
  const at::MemoryFormat format = cells.suggest_memory_format();
  const at::Tensor dense = cells.contiguous(format);
  int64_t* to = indices.mutable_data_ptr<int64_t>();
  dispatch_cells(g, [&](auto zero) {
    for_each_cell<decltype(zero)>(
        g, dense, format, [&](int64_t at, int64_t, int64_t plane_index) { to[at] = plane_index; });
  });
  return indices;
}

at::Tensor max_pool2d_gather(const at::Tensor& input, const at::Tensor& cells,
                             at::IntArrayRef kernel_size, at::IntArrayRef stride,
                             at::IntArrayRef padding, at::IntArrayRef dilation) {
  const Pool2dGeometry g = pool2d_geometry_of_output(
      input.sizes(), cells.sizes(), kernel_size, stride, padding, dilation, "max_pool2d_gather");
  check_cells(cells, g, "max_pool2d_gather");
  at::Tensor output = empty_output(g, cells, input.scalar_type());
  if (output.numel() == 0) return output;
  const at::MemoryFormat format = cells.suggest_memory_format();
  const at::Tensor dense_cells = cells.contiguous(format), dense = input.contiguous(format);
  AT_DISPATCH_ALL_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "max_pool2d_gather", [&] {
        const scalar_t* from = dense.const_data_ptr<scalar_t>();
        scalar_t* to = output.mutable_data_ptr<scalar_t>();
        dispatch_cells(g, [&](auto zero) {
          for_each_cell<decltype(zero)>(g, dense_cells, format,
                                        [&](int64_t at, int64_t index, int64_t) {
                                          to[at] = index < 0 ? scalar_t(0) : from[index];
                                        });
        });
      });
  return output;
}

template <class scalar_t>
void scatter_pairs(const Pool2dGeometry& g, bool last, const scalar_t* grad, const uint8_t* chosen,
                   scalar_t* to) {
  const int64_t input = g.H * g.W, output = g.OH * g.OW;
  if (last) {
    const auto rows = DLOPS_SIMD(max_pool2d_scatter_pairs_last, scalar_t);
    parallel_rows(g.N, g.OH, 2 * g.W * g.C, [&](int64_t n, int64_t begin, int64_t end) {
      const int64_t i = n * g.C;
      rows(g, begin, end, grad + i * output, chosen + i * output, to + i * input);
    });
  } else {
    const auto rows = DLOPS_SIMD(max_pool2d_scatter_pairs, scalar_t);
    parallel_planes(
        g.N * g.C, g.H, g.W, [&](int64_t i, int64_t planes, int64_t begin, int64_t end) {
          rows(g, planes, begin, end, grad + i * output, chosen + i * output, to + i * input);
        });
  }
}

template <class scalar_t, class cell_t>
void scatter(const Pool2dGeometry& g, const at::Tensor& grad_output, const at::Tensor& cells,
             const at::Tensor& grad_input) {
  const scalar_t* grad = grad_output.const_data_ptr<scalar_t>();
  const cell_t* chosen = cells.const_data_ptr<cell_t>();
  scalar_t* to = grad_input.mutable_data_ptr<scalar_t>();
  const bool last = channels_last(cells.suggest_memory_format());
  if constexpr (std::is_same_v<cell_t, uint8_t>) {
    const TurnedPlanes<scalar_t> turned(g);
    if (!last && turned.serve()) return turned.scatter(grad, chosen, to);
    if (side_by_side(g)) return scatter_pairs(g, last, grad, chosen, to);
  }
  if (last) {
    const auto rows = DLOPS_SIMD(max_pool2d_scatter_rows_last, scalar_t, cell_t);
    parallel_rows(g.N, g.H, g.W * g.C, [&](int64_t n, int64_t begin, int64_t end) {
      const int64_t image = n * g.C * g.OH * g.OW;
      rows(g, begin, end, grad + image, chosen + image, to + n * g.C * g.H * g.W);
    });
  } else {
    const auto rows = DLOPS_SIMD(max_pool2d_scatter_rows, scalar_t, cell_t);
    const int64_t bytes = DLOPS_SIMD(max_pool2d_scratch, scalar_t, cell_t)(g);
    parallel_planes(g.N * g.C, g.H, g.W,
                    [&](int64_t i, int64_t planes, int64_t begin, int64_t end) {
                      Scratch scratch(bytes);
                      const int64_t plane = i * g.OH * g.OW;
                      rows(g, planes, begin, end, grad + plane, chosen + plane, to + i * g.H * g.W,
                           scratch.take<char>(bytes));
                    });
  }
}

at::Tensor max_pool2d_scatter(const at::Tensor& grad_output, const at::Tensor& cells,
                              at::IntArrayRef input_size, at::IntArrayRef kernel_size,
                              at::IntArrayRef stride, at::IntArrayRef padding,
                              at::IntArrayRef dilation) {
  const Pool2dGeometry g = pool2d_geometry_of_output(input_size, cells.sizes(), kernel_size, stride,
                                                     padding, dilation, "max_pool2d_scatter");
  check_cells(cells, g, "max_pool2d_scatter");
  check_sizes(grad_output, "grad_output", cells.sizes(), "max_pool2d_scatter");
  const at::MemoryFormat format = cells.suggest_memory_format();
  at::Tensor grad_input = at::empty(input_size, grad_output.options().memory_format(format));
  if (grad_input.numel() == 0) return grad_input;
  const at::Tensor dense = grad_output.contiguous(format), dense_cells = cells.contiguous(format);
  const Pool2dGeometry visible = without_padding_cells(g);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_output.scalar_type(), "max_pool2d_scatter", [&] {
        dispatch_cells(g, [&](auto zero) {
          scatter<scalar_t, decltype(zero)>(visible, dense, dense_cells, grad_input);
        });
      });
  return grad_input;
}

}  // namespace
}  // namespace dlops::cpu

TORCH_LIBRARY_IMPL(dlops, CPU, m) {
  m.impl("max_pool2d", &dlops::cpu::max_pool2d);
  m.impl("max_pool2d_values", &dlops::cpu::max_pool2d_values);
  m.impl("max_pool2d_indices", &dlops::cpu::max_pool2d_indices);
  m.impl("max_pool2d_scatter", &dlops::cpu::max_pool2d_scatter);
  m.impl("max_pool2d_gather", &dlops::cpu::max_pool2d_gather);
}
