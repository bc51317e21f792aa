#include "cpu/conv2d_few_pixels.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>

#include "cpu/conv2d_panels.h"
#include "cpu/grain.h"
#include "cpu/matmul.h"
#include "cpu/scratch.h"

namespace dlops::cpu {
namespace {

// What the columns of the batch may take, in elements; and how many pixels are few.
constexpr int64_t kColumns = 512 * 1024, kFewPixels = 64;
// Outputs of a task.
constexpr int64_t kOutputs = 64;

// The columns of all pixels as a P x K matrix, K ordered as in the weight's memory.
template <class scalar_t, bool last>
at::Tensor columns_of(const Conv2dGeometry& g, int64_t group, const scalar_t* input,
                      const at::TensorOptions& options) {
  const int64_t P = g.N * g.output_pixels(), K = g.column_rows(), cells = g.R * g.S;
  const int64_t c0 = group * g.channels_per_group();
  at::Tensor columns = at::empty({P, K}, options);
  scalar_t* to = columns.mutable_data_ptr<scalar_t>();
  if constexpr (last) {
    at::parallel_for(0, P, grain(K), [&](int64_t begin, int64_t end) {
      const ColumnBlock block{c0, c0 + g.channels_per_group(), begin, end};
      DLOPS_SIMD(fill_columns_last, scalar_t, scalar_t)(g, block, input, to + begin * K, K);
    });
  } else {
    constexpr int64_t kChannels = 8;
    const int64_t blocks = ceil_div(g.channels_per_group(), kChannels);
    at::parallel_for(0, blocks, grain(kChannels * cells * P), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<scalar_t>(kChannels * cells * P));
      scalar_t* rows = scratch.take<scalar_t>(kChannels * cells * P);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * kChannels;
        const int64_t count = std::min(kChannels, g.channels_per_group() - first);
        const ColumnBlock block{c0 + first, c0 + first + count, 0, P};
        DLOPS_SIMD(fill_columns, scalar_t, scalar_t)(g, block, input, rows, P);
        DLOPS_SIMD(transpose, scalar_t, scalar_t)(rows, P, count * cells, P, to + first * cells, K);
      }
    });
  }
  return columns;
}

template <class scalar_t, bool last>
void multiply(const Conv2dGeometry& g, const scalar_t* grad_output, const at::Tensor& input,
              scalar_t* grad_weight) {
  const Panels<scalar_t, last> panels{g};
  const int64_t P = g.N * g.output_pixels(), K = g.column_rows(), Og = g.outputs_per_group();
  const int64_t blocks = ceil_div(Og, kOutputs);
  for (int64_t group = 0; group < g.groups; ++group) {
    const at::Tensor columns =
        columns_of<scalar_t, last>(g, group, input.const_data_ptr<scalar_t>(), input.options());
    const scalar_t* b = columns.const_data_ptr<scalar_t>();
    at::parallel_for(0, blocks, grain(kOutputs * P * K), [&](int64_t begin, int64_t end) {
      Scratch scratch(Scratch::size<scalar_t>(Og * P));
      scalar_t* space = scratch.take<scalar_t>(Og * P);
      const Matrix<scalar_t> grad =
          last ? panels.outputs_transposed(grad_output, group, {0, g.N * g.output_pixels()}, space)
               : panels.outputs(grad_output, group, {0, P}, space);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t o = i * kOutputs, count = std::min(kOutputs, Og - o);
        matmul(count, K, P, grad.data + o * grad.ld, grad.ld, b, K,
               grad_weight + (group * Og + o) * K, K, false);
      }
    });
  }
}

}  // namespace

bool takes_few_pixels(const Conv2dGeometry& g, at::ScalarType dtype) {
  const int64_t P = g.N * g.output_pixels(), K = g.column_rows();
  return (dtype == at::kFloat || dtype == at::kDouble) && P <= kFewPixels && P * K <= kColumns &&
         g.outputs_per_group() >= kOutputs && g.O * K >= 256 * P;
}

bool few_pixels_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                            const at::Tensor& input, const at::Tensor& grad_weight,
                            at::MemoryFormat format) {
  return AT_DISPATCH_FLOATING_TYPES(input.scalar_type(), "conv2d_grad_weight", [&] {
    const scalar_t* grad = grad_output.const_data_ptr<scalar_t>();
    if (!DLOPS_SIMD(all_finite, scalar_t)(grad, grad_output.numel())) return false;
    scalar_t* to = grad_weight.mutable_data_ptr<scalar_t>();
    if (format == at::MemoryFormat::ChannelsLast) {
      multiply<scalar_t, true>(g, grad, input, to);
    } else {
      multiply<scalar_t, false>(g, grad, input, to);
    }
    return true;
  });
}

}  // namespace dlops::cpu
