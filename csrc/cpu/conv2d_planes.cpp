#include "cpu/conv2d_planes.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/capability.h"
#include "cpu/grain.h"
#include "cpu/scratch.h"
#include "cpu/simd/conv2d_planes.h"
#include "cpu/sums.h"

namespace dlops::cpu {
namespace {

// What the phase planes of a task may take: half of a small L2 cache, in elements of 4 bytes.
constexpr int64_t kPhaseElements = 64 * 1024;
// Outputs that are computed at a time.
constexpr int64_t kOutputs = 8;
// The images' rows, cut into blocks whose planes stay in cache. The cut depends on the shapes
// alone.
struct RowBlocks {
  int64_t rows, size;
  RowBlocks(int64_t rows, int64_t row_elements, int64_t tasks_per_block) : rows(rows) {
    constexpr int64_t kTasks = 8;  // enough for a few threads
    const int64_t fitting =
        std::max<int64_t>(1, kPhaseElements / std::max<int64_t>(1, row_elements));
    const int64_t blocks =
        std::max(ceil_div(rows, fitting), std::min(rows, ceil_div(kTasks, tasks_per_block)));
    size = ceil_div(rows, blocks);
  }
  int64_t count() const { return ceil_div(rows, size); }
  Interval operator[](int64_t i) const { return {i * size, std::min(rows, (i + 1) * size)}; }
};

// One block of rows of one group of one image per task.
struct Tasks {
  const Conv2dGeometry& g;
  RowBlocks blocks;
  int64_t count() const { return g.N * g.groups * blocks.count(); }
  int64_t image(int64_t task) const { return task / blocks.count() / g.groups; }
  int64_t group(int64_t task) const { return task / blocks.count() % g.groups; }
  Interval rows(int64_t task) const { return blocks[task % blocks.count()]; }
};

// The phase planes of a group's channels, and where each term (c, r, s) of an output begins.
template <class scalar_t, class sum_t>
class GroupPhases {
 public:
  GroupPhases(const Conv2dGeometry& g, sum_t* space) : g_(g), layout_(g), space_(space) {}
  void fill(const scalar_t* channels, int64_t row0, int64_t rows) {
    const int64_t size = layout_.channel_size(rows);
    if (rows != rows_) place(rows, size);
    for (int64_t c = 0; c < g_.channels_per_group(); ++c)
      fill_(g_, layout_, channels + c * g_.H * g_.W, row0, rows, space_ + c * size);
  }
  const sum_t* const* terms() const { return terms_.data(); }

 private:
  void place(int64_t rows, int64_t size) {
    rows_ = rows;
    terms_.clear();
    for (int64_t c = 0; c < g_.channels_per_group(); ++c)
      for (int64_t r = 0; r < g_.R; ++r)
        for (int64_t s = 0; s < g_.S; ++s)
          terms_.push_back(space_ + c * size + layout_.offset(g_, rows, r, s));
  }
  const Conv2dGeometry& g_;
  const PlaneLayout layout_;
  sum_t* space_;
  decltype(&fill_phases<kBaseline, scalar_t, sum_t>) fill_ =
      DLOPS_SIMD(fill_phases, scalar_t, sum_t);
  int64_t rows_ = -1;
  std::vector<const sum_t*> terms_;
};

template <class scalar_t>
void forward(const Conv2dGeometry& g, const scalar_t* input,
             const at::opmath_type<scalar_t>* weight, const at::opmath_type<scalar_t>* bias,
             scalar_t* output) {
  using sum_t = at::opmath_type<scalar_t>;
  const PlaneLayout layout(g);
  const int64_t Cg = g.channels_per_group(), Og = g.outputs_per_group(), T = g.column_rows();
  const int64_t row_elements = Cg * layout.phases_h * layout.phases_w * layout.pitch;
  const Tasks tasks{g, RowBlocks(g.OH, row_elements, g.N * g.groups)};
  const int64_t most = tasks.blocks.size;
  const int64_t phase_count = Cg * layout.channel_size(most) + kPlaneSlack;
  const int64_t out_ld = most * layout.pitch + kPlaneSlack;
  const auto compute = DLOPS_SIMD(stencil, sum_t);
  const auto store = DLOPS_SIMD(store_rows, sum_t, scalar_t);
  const int64_t work = most * layout.pitch * Og * T;
  at::parallel_for(0, tasks.count(), grain(work), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::size<sum_t>(phase_count) + Scratch::size<sum_t>(kOutputs * out_ld));
    sum_t* phases = scratch.take<sum_t>(phase_count);
    sum_t* out = scratch.take<sum_t>(kOutputs * out_ld);
    GroupPhases<scalar_t, sum_t> planes(g, phases);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = tasks.image(task), group = tasks.group(task);
      const Interval rows = tasks.rows(task);
      const int64_t count = rows.end - rows.begin;
      planes.fill(input + (n * g.C + group * Cg) * g.H * g.W, rows.begin, count);
      for (int64_t o = group * Og; o < (group + 1) * Og; o += kOutputs) {
        const int64_t outputs = std::min(kOutputs, (group + 1) * Og - o);
        compute(planes.terms(), T, weight + o * T, bias == nullptr ? nullptr : bias + o, outputs,
                (count - 1) * layout.pitch + g.OW, out, out_ld);
        for (int64_t j = 0; j < outputs; ++j) {
          store(g, out + j * out_ld, count,
                output + ((n * g.O + o + j) * g.OH + rows.begin) * g.OW);
        }
      }
    }
  });
}

// ---------------------------------------------------------------------------------- grad_input

// The terms that an element of phase (a, b) of grad_input sums: the kernel cells that meet it.
struct PhaseCells {
  int64_t phase_h, phase_w;
  std::vector<int64_t> cells;  // r * S + s
};

std::vector<PhaseCells> phase_cells(const Conv2dGeometry& g) {
  std::vector<PhaseCells> result;
  for (int64_t a = 0; a < g.stride_h; ++a) {
    for (int64_t b = 0; b < g.stride_w; ++b) {
      PhaseCells phase{a, b, {}};
      for (int64_t r = 0; r < g.R; ++r)
        for (int64_t s = 0; s < g.S; ++s)
          if (r * g.dilation_h % g.stride_h == a && s * g.dilation_w % g.stride_w == b)
            phase.cells.push_back(r * g.S + s);
      result.push_back(std::move(phase));
    }
  }
  return result;
}

// How far in front of an element its gradient under a kernel cell lies.
int64_t shift(const Conv2dGeometry& g, const PlaneLayout& layout, int64_t cell) {
  const int64_t r = cell / g.S, s = cell % g.S;
  return r * g.dilation_h / g.stride_h * layout.pitch + s * g.dilation_w / g.stride_w;
}

// The weights in the order of use: for each group and phase a (Cg, outputs and cells) matrix.
template <class sum_t>
std::vector<sum_t> phase_weights(const Conv2dGeometry& g, const std::vector<PhaseCells>& phases,
                                 const sum_t* weight) {
  const int64_t Cg = g.channels_per_group(), Og = g.outputs_per_group(), cells = g.R * g.S;
  std::vector<sum_t> result;
  result.reserve(static_cast<size_t>(g.O * Cg * cells));
  for (int64_t group = 0; group < g.groups; ++group)
    for (const PhaseCells& phase : phases)
      for (int64_t c = 0; c < Cg; ++c)
        for (int64_t o = group * Og; o < (group + 1) * Og; ++o)
          for (const int64_t cell : phase.cells)
            result.push_back(weight[(o * Cg + c) * cells + cell]);
  return result;
}

template <class scalar_t>
void grad_input(const Conv2dGeometry& g, const scalar_t* grad_output,
                const at::opmath_type<scalar_t>* weight, scalar_t* result) {
  using sum_t = at::opmath_type<scalar_t>;
  const PlaneLayout layout(g);
  const int64_t Cg = g.channels_per_group(), Og = g.outputs_per_group(), pitch = layout.pitch;
  const std::vector<PhaseCells> phases = phase_cells(g);
  const std::vector<sum_t> weights = phase_weights(g, phases, weight);
  // Rows of a phase plane that reach the last row of the image.
  const int64_t phase_rows = (g.H - 1 + g.pad_top) / g.stride_h + 1;
  const Tasks tasks{g, RowBlocks(phase_rows, Og * pitch, g.N * g.groups)};
  const int64_t most = tasks.blocks.size;
  // In front of each plane, zeros that the first row's left neighbours are read from.
  const int64_t plane_size = layout.reach_w + (most + layout.reach_h) * pitch;
  const int64_t grad_count = Og * plane_size + kPlaneSlack;
  const int64_t out_ld = most * pitch + kPlaneSlack;
  const auto fill = DLOPS_SIMD(fill_gradient, scalar_t, sum_t);
  const auto compute = DLOPS_SIMD(stencil, sum_t);
  const auto store = DLOPS_SIMD(store_phase, sum_t, scalar_t);
  const int64_t work = most * pitch * Og * g.column_rows();
  at::parallel_for(0, tasks.count(), grain(work), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::size<sum_t>(grad_count) + Scratch::size<sum_t>(kOutputs * out_ld));
    sum_t* planes = scratch.take<sum_t>(grad_count);
    sum_t* out = scratch.take<sum_t>(kOutputs * out_ld);
    std::vector<std::vector<const sum_t*>> terms_of;
    for (const PhaseCells& phase : phases) {
      std::vector<const sum_t*> terms;
      for (int64_t o = 0; o < Og; ++o) {
        const sum_t* origin = planes + o * plane_size + layout.reach_w + layout.reach_h * pitch;
        for (const int64_t cell : phase.cells) terms.push_back(origin - shift(g, layout, cell));
      }
      terms_of.push_back(std::move(terms));
    }
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = tasks.image(task), group = tasks.group(task);
      const Interval rows = tasks.rows(task);
      const int64_t count = rows.end - rows.begin;
      for (int64_t o = 0; o < Og; ++o) {
        sum_t* plane = planes + o * plane_size;
        std::fill_n(plane, layout.reach_w, sum_t(0));
        fill(g, layout, grad_output + (n * g.O + group * Og + o) * g.OH * g.OW,
             rows.begin - layout.reach_h, count + layout.reach_h, plane + layout.reach_w);
      }
      const sum_t* w = weights.data() + group * Og * Cg * g.R * g.S;
      for (size_t k = 0; k < phases.size(); ++k) {
        const PhaseCells& phase = phases[k];
        const std::vector<const sum_t*>& terms = terms_of[k];
        const int64_t T = static_cast<int64_t>(terms.size());
        for (int64_t c = 0; c < Cg; c += kOutputs) {
          const int64_t channels = std::min(kOutputs, Cg - c);
          compute(terms.data(), T, w + c * T, nullptr, channels, count * pitch, out, out_ld);
          for (int64_t j = 0; j < channels; ++j) {
            store(g, out + j * out_ld, phase.phase_h, phase.phase_w, rows.begin, count,
                  result + (n * g.C + group * Cg + c + j) * g.H * g.W);
          }
        }
        w += Cg * T;
      }
    }
  });
}

// --------------------------------------------------------------------------------- grad_weight

// A group's gradients, as rows `pitch` apart: where they lie, or converted.
template <class scalar_t, class sum_t>
int64_t gradient_rows(const Conv2dGeometry& g, const scalar_t* grad, Interval rows, sum_t* space,
                      std::vector<const sum_t*>& planes) {
  const int64_t Og = g.outputs_per_group();
  planes.clear();
  if constexpr (std::is_same_v<scalar_t, sum_t>) {
    for (int64_t o = 0; o < Og; ++o) planes.push_back(grad + (o * g.OH + rows.begin) * g.OW);
    return g.OW;
  } else {
    const PlaneLayout layout(g);
    const int64_t count = rows.end - rows.begin;
    for (int64_t o = 0; o < Og; ++o, space += count * layout.pitch) {
      DLOPS_SIMD(fill_gradient, scalar_t, sum_t)(g, layout, grad + o * g.OH * g.OW, rows.begin,
                                                 count, space);
      planes.push_back(space);
    }
    return layout.pitch;
  }
}

template <class scalar_t>
void grad_weight(const Conv2dGeometry& g, const scalar_t* grad_output, const scalar_t* input,
                 scalar_t* result) {
  using sum_t = at::opmath_type<scalar_t>;
  const PlaneLayout layout(g);
  const int64_t Cg = g.channels_per_group(), Og = g.outputs_per_group(), T = g.column_rows();
  const RowBlocks blocks(g.OH, Cg * layout.phases_h * layout.phases_w * layout.pitch,
                         g.N * g.groups);
  // Independent parts of the sum over images: enough to keep threads busy.
  constexpr int64_t kTasks = 32;
  const int64_t items = g.N * blocks.count();
  const int64_t chunks = std::min(items, ceil_div(kTasks, g.groups));
  const at::Tensor sums = at::zeros({chunks, g.O * T}, at::kDouble);
  double* sum_data = sums.mutable_data_ptr<double>();
  const int64_t phase_count = Cg * layout.channel_size(blocks.size) + kPlaneSlack;
  const int64_t grad_count =
      std::is_same_v<scalar_t, sum_t> ? 0 : Og * blocks.size * layout.pitch + kPlaneSlack;
  const auto compute = DLOPS_SIMD(correlate, sum_t);
  const int64_t work = items / chunks * blocks.size * g.OW * Og * T;
  at::parallel_for(0, g.groups * chunks, grain(work), [&](int64_t begin, int64_t end) {
    Scratch scratch(Scratch::size<sum_t>(phase_count) + Scratch::size<sum_t>(grad_count));
    sum_t* phases = scratch.take<sum_t>(phase_count);
    sum_t* space = scratch.take<sum_t>(grad_count);
    GroupPhases<scalar_t, sum_t> planes(g, phases);
    std::vector<const sum_t*> grads;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, group = task / chunks;
      for (int64_t i = chunk * items / chunks; i < (chunk + 1) * items / chunks; ++i) {
        const int64_t n = i / blocks.count();
        const Interval rows = blocks[i % blocks.count()];
        const int64_t count = rows.end - rows.begin;
        planes.fill(input + (n * g.C + group * Cg) * g.H * g.W, rows.begin, count);
        const int64_t grad_pitch = gradient_rows(
            g, grad_output + (n * g.O + group * Og) * g.OH * g.OW, rows, space, grads);
        compute(grads.data(), Og, grad_pitch, planes.terms(), T, layout.pitch, count, g.OW,
                sum_data + (chunk * g.O + group * Og) * T);
      }
    }
  });
  add_chunks<double>(sums);
  for (int64_t i = 0; i < g.O * T; ++i)
    result[i] = static_cast<scalar_t>(static_cast<sum_t>(sum_data[i]));
}

}  // namespace

bool takes_planes(const Conv2dGeometry& g, at::ScalarType dtype) {
  const bool floating =
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  return floating && has_thin_groups(g) && PlaneLayout(g).compact(g);
}

void planes_forward(const Conv2dGeometry& g, const at::Tensor& input, const at::Tensor& weight,
                    const at::Tensor& bias, const at::Tensor& output) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(), "conv2d", [&] {
    using sum_t = at::opmath_type<scalar_t>;
    forward<scalar_t>(g, input.const_data_ptr<scalar_t>(), weight.const_data_ptr<sum_t>(),
                      bias.defined() ? bias.const_data_ptr<sum_t>() : nullptr,
                      output.mutable_data_ptr<scalar_t>());
  });
}

bool planes_grad_input(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& weight, const at::Tensor& result) {
  bool finite = true;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad_output.scalar_type(), "conv2d_grad_input", [&] {
        using sum_t = at::opmath_type<scalar_t>;
        const sum_t* w = weight.const_data_ptr<sum_t>();
        finite = std::all_of(w, w + weight.numel(), [](sum_t x) { return std::isfinite(x); });
        if (finite) {
          grad_input<scalar_t>(g, grad_output.const_data_ptr<scalar_t>(), w,
                               result.mutable_data_ptr<scalar_t>());
        }
      });
  return finite;
}

void planes_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                        const at::Tensor& input, const at::Tensor& result) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, input.scalar_type(),
                                  "conv2d_grad_weight", [&] {
                                    grad_weight<scalar_t>(g, grad_output.const_data_ptr<scalar_t>(),
                                                          input.const_data_ptr<scalar_t>(),
                                                          result.mutable_data_ptr<scalar_t>());
                                  });
}

}  // namespace dlops::cpu
