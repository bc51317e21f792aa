#include "cpu/simd/conv2d_depthwise.h"

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <utility>

#include "cpu/simd/load_store.h"
#include "cpu/simd/registers.h"

namespace dlops::cpu {
namespace {

constexpr int kPixels = 4, kSlides = 8;
constexpr int64_t kRows = 4;  // of a kernel, that a row of the gradient meets at a time

// P destinations of one run at V vectors of channels, the last of which holds `tail` of them.
template <int P, int V, class scalar_t, class T>
void sum_block(const DepthwiseSum& d, const TapRun& row, const TapRun& run, int64_t i, int64_t c,
               int64_t tail, const scalar_t* from, const T* weight, const T* bias, scalar_t* to) {
  constexpr int64_t L = Vec<T>::size();
  const auto lanes = [&](int v) { return v + 1 < V ? L : tail; };
  Vec<T> sum[P][V];
  for (auto& pixel : sum)
    for (auto& one : pixel) one = Vec<T>(T(0));
  for (int64_t r = 0; r < row.tap_count; ++r) {
    const scalar_t* from_row = from + row.taps[r].source * d.from_width * d.C + c;
    const T* weight_row = weight + row.taps[r].cell * d.S * d.C + c;
    for (int64_t s = 0; s < run.tap_count; ++s) {
      const scalar_t* x = from_row + (run.taps[s].source + i * run.source_step) * d.C;
      const T* w = weight_row + run.taps[s].cell * d.C;
      for (int v = 0; v < V; ++v) {
        const Vec<T> factor = load<T>(w + v * L, lanes(v));
        for (int p = 0; p < P; ++p) {
          const Vec<T> value = load<T>(x + p * run.source_step * d.C + v * L, lanes(v));
          sum[p][v] = at::vec::fmadd(value, factor, sum[p][v]);
        }
      }
    }
  }
  Vec<T> last[V];  // The bias: sums that start from a large one round each term at its size.
  for (int v = 0; v < V; ++v)
    last[v] = bias == nullptr ? Vec<T>(T(0)) : load<T>(bias + c + v * L, lanes(v));
  for (int p = 0; p < P; ++p) {
    scalar_t* out = to + (row.first * d.to_width + run.first + (i + p) * run.step) * d.C + c;
    for (int v = 0; v < V; ++v) store(sum[p][v] + last[v], out + v * L, lanes(v));
  }
}

template <int P, class scalar_t, class T>
void sum_channels(const DepthwiseSum& d, const TapRun& row, const TapRun& run, int64_t i,
                  const scalar_t* from, const T* weight, const T* bias, scalar_t* to) {
  constexpr int64_t L = Vec<T>::size();
  constexpr int V = kSums / 8;
  int64_t c = 0;
  for (; c + V * L <= d.C; c += V * L)
    sum_block<P, V>(d, row, run, i, c, L, from, weight, bias, to);
  for (; c < d.C; c += L)
    sum_block<P, 1>(d, row, run, i, c, std::min(L, d.C - c), from, weight, bias, to);
}

// Whether the taps of a run stand one source step apart, so that neighbouring destinations share
// sources.
bool slides(const TapRun& run) {
  for (int64_t s = 0; s + 1 < run.tap_count; ++s) {
    if (run.taps[s + 1].source != run.taps[s].source + run.source_step ||
        run.taps[s + 1].cell != run.taps[s].cell + run.taps[1].cell - run.taps[0].cell)
      return false;
  }
  return run.tap_count > 1;
}

// Adds what a source gives through each tap to its destination, if that is one of the P.
template <int destination, int P, class V>
void add_tap(const V& value, const V& factor, V* sum) {
  if constexpr (destination >= 0 && destination < P)
    sum[destination] = at::vec::fmadd(value, factor, sum[destination]);
}
template <int source, int P, class V, int... s>
void add_source(const V& value, const V* factor, V* sum, std::integer_sequence<int, s...>) {
  (add_tap<source - s, P>(value, factor[s], sum), ...);
}

// P destinations of a run of K taps that slides, at one vector of channels: each source is read
// once. The sums have the order of sum_block.
template <int P, int K, class Lanes, class scalar_t, class T, int... p, int... s, int... j>
void slide_block(const DepthwiseSum& d, const TapRun& row, const TapRun& run, int64_t i, int64_t c,
                 Lanes lanes, const scalar_t* from, const T* weight, const T* bias, scalar_t* to,
                 std::integer_sequence<int, p...>, std::integer_sequence<int, s...>,
                 std::integer_sequence<int, j...>) {
  const int64_t source_step = run.source_step * d.C;
  const int64_t cell_step = (run.taps[1].cell - run.taps[0].cell) * d.C;
  from += c + (run.taps[0].source + i * run.source_step) * d.C;
  weight += c + run.taps[0].cell * d.C;
  Vec<T> sum[P] = {(static_cast<void>(p), Vec<T>(T(0)))...};
  for (int64_t r = 0; r < row.tap_count; ++r) {
    const scalar_t* x = from + row.taps[r].source * d.from_width * d.C;
    const T* w = weight + row.taps[r].cell * d.S * d.C;
    const Vec<T> factor[K] = {load<T>(w + s * cell_step, lanes)...};
    // Destination p meets source p + s.
    ((add_source<j, P>(load<T>(x, lanes), factor, sum, std::make_integer_sequence<int, K>{}),
      x += source_step),
     ...);
  }
  const Vec<T> last = bias == nullptr ? Vec<T>(T(0)) : load<T>(bias + c, lanes);
  to += (row.first * d.to_width + run.first + i * run.step) * d.C + c;
  (store(sum[p] + last, to + p * run.step * d.C, lanes), ...);
}

// As many destinations of the run as blocks of P, P / 2, ... cover; returns where they end.
template <int P, int K, class scalar_t, class T>
int64_t slide(const DepthwiseSum& d, const TapRun& row, const TapRun& run, int64_t i,
              const scalar_t* from, const T* weight, const T* bias, scalar_t* to) {
  constexpr int64_t L = Vec<T>::size();
  for (; i + P <= run.count; i += P) {
    const auto block = [&](int64_t c, auto lanes) {
      slide_block<P, K>(d, row, run, i, c, lanes, from, weight, bias, to,
                        std::make_integer_sequence<int, P>{}, std::make_integer_sequence<int, K>{},
                        std::make_integer_sequence<int, P + K - 1>{});
    };
    int64_t c = 0;
    for (; c + L <= d.C; c += L) block(c, std::integral_constant<int64_t, L>{});
    if (c < d.C) block(c, d.C - c);
  }
  if constexpr (P > 2) return slide<P / 2, K>(d, row, run, i, from, weight, bias, to);
  return i;
}

// Returns how many destinations it has done: none where the run does not slide.
template <class scalar_t, class T>
int64_t slide_run(const DepthwiseSum& d, const TapRun& row, const TapRun& run, const scalar_t* from,
                  const T* weight, const T* bias, scalar_t* to) {
  const auto along = [&](auto taps) -> int64_t {
    constexpr int K = taps;
    return slides(run) ? slide<kSlides, K>(d, row, run, 0, from, weight, bias, to) : 0;
  };
  switch (run.tap_count) {
    case 3:
      return along(std::integral_constant<int, 3>{});
    case 5:
      return along(std::integral_constant<int, 5>{});
    case 7:
      return along(std::integral_constant<int, 7>{});
    default:
      return 0;
  }
}

// sums[s][lane] += grad[ow][lane] * input[ow + s][lane] over the output columns [ow0, ow1), for B
// neighbouring kernel columns, at V vectors of channels. Where it `slides`, input_step is cell_step
// and what a pixel meets under one column the next pixel meets under the one before: each element
// of the input is read once.
template <int B, int V, bool slides, class scalar_t, class T>
void correlate_row(const scalar_t* grad, const scalar_t* input, int64_t ow0, int64_t ow1,
                   int64_t input_step, int64_t cell_step, int64_t C, int64_t tail, T* sums) {
  constexpr int64_t L = Vec<T>::size();
  const auto lanes = [&](int v) { return v + 1 < V ? L : tail; };
  if (ow0 >= ow1) return;
  Vec<T> sum[B][V], x[B][V];
  const auto read = [&](int s, int64_t ow) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      x[s][v] = load<T>(input + ow * input_step + s * cell_step + v * L, lanes(v));
  };
#pragma GCC unroll 4
  for (int s = 0; s < B; ++s) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[s][v] = Vec<T>::loadu(sums + (s * V + v) * L);
    if (slides && s + 1 < B) read(s, ow0);
  }
  for (int64_t ow = ow0; ow < ow1; ++ow) {
#pragma GCC unroll 4
    for (int s = slides ? B - 1 : 0; s < B; ++s) read(s, ow);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<T> g = load<T>(grad + ow * C + v * L, lanes(v));
#pragma GCC unroll 4
      for (int s = 0; s < B; ++s) sum[s][v] = at::vec::fmadd(g, x[s][v], sum[s][v]);
      if constexpr (slides) {
#pragma GCC unroll 4
        for (int s = 0; s + 1 < B; ++s) x[s][v] = x[s + 1][v];
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < B; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[s][v].store(sums + (s * V + v) * L);
}

// The kernel columns [s, s + B) of a few kernel rows, over a whole image: rows of both images are
// in the first-level cache when the next kernel row meets them.
template <int B, int V, class scalar_t>
void correlate_cells(const Conv2dGeometry& g, Interval rows, int64_t s, const scalar_t* grad,
                     const scalar_t* input, int64_t tail, double* sums) {
  using T = at::opmath_type<scalar_t>;
  constexpr int64_t L = Vec<T>::size();
  T partial[kRows][B * V * L] = {};
  Interval inside[B], common{0, g.OW};
  for (int b = 0; b < B; ++b) {
    inside[b] = inside_columns(g, s + b);
    common = {std::max(common.begin, inside[b].begin), std::min(common.end, inside[b].end)};
  }
  if (common.begin > common.end) common = {g.OW, g.OW};
  const int64_t input_step = g.stride_w * g.C, cell_step = g.dilation_w * g.C;
  const auto correlate_rows = [&](const scalar_t* from, const scalar_t* with, T* sum) {
    if (B > 1 && input_step == cell_step) {
      correlate_row<B, V, (B > 1)>(from, with, common.begin, common.end, input_step, cell_step, g.C,
                                   tail, sum);
    } else {
      correlate_row<B, V, false>(from, with, common.begin, common.end, input_step, cell_step, g.C,
                                 tail, sum);
    }
    for (int b = 0; b < B; ++b, with += cell_step, sum += V * L) {
      correlate_row<1, V, false>(from, with, inside[b].begin, std::min(inside[b].end, common.begin),
                                 input_step, cell_step, g.C, tail, sum);
      correlate_row<1, V, false>(from, with, std::max(inside[b].begin, common.end), inside[b].end,
                                 input_step, cell_step, g.C, tail, sum);
    }
  };
  for (int64_t oh = 0; oh < g.OH; ++oh) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      const int64_t ih = g.input_row(oh, r);
      if (!g.row_inside(ih)) continue;
      correlate_rows(grad + oh * g.OW * g.C, input + (ih * g.W + g.input_col(0, s)) * g.C,
                     partial[r - rows.begin]);
    }
  }
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    for (int b = 0; b < B; ++b) {
      for (int64_t i = 0; i < (V - 1) * L + tail; ++i)
        sums[(r * g.S + s + b) * g.C + i] +=
            static_cast<double>(partial[r - rows.begin][b * V * L + i]);
    }
  }
}

template <int V, class scalar_t>
void correlate_vectors(const Conv2dGeometry& g, const scalar_t* grad, const scalar_t* input,
                       int64_t tail, double* sums) {
  for (int64_t r = 0; r < g.R; r += kRows) {
    const Interval rows{r, std::min(g.R, r + kRows)};
    int64_t s = 0;
    for (; s + 3 <= g.S; s += 3) correlate_cells<3, V>(g, rows, s, grad, input, tail, sums);
    for (; s < g.S; ++s) correlate_cells<1, V>(g, rows, s, grad, input, tail, sums);
  }
}

}  // namespace

template <int capability, class scalar_t, class T>
void sum_taps(const DepthwiseSum& d, int64_t row0, int64_t row1, const scalar_t* from,
              const T* weight, const T* bias, scalar_t* to) {
  for (int64_t row = row0; row < row1; ++row) {
    for (int64_t k = 0; k < d.col_runs; ++k) {
      const TapRun& run = d.cols[k];
      int64_t i = slide_run(d, d.rows[row], run, from, weight, bias, to);
      for (; i + kPixels <= run.count; i += kPixels)
        sum_channels<kPixels>(d, d.rows[row], run, i, from, weight, bias, to);
      for (; i < run.count; ++i) sum_channels<1>(d, d.rows[row], run, i, from, weight, bias, to);
    }
  }
}

template <int capability, class scalar_t>
void correlate_channels(const Conv2dGeometry& g, const scalar_t* grad, const scalar_t* input,
                        int64_t c0, int64_t c1, double* sums) {
  constexpr int64_t L = Vec<at::opmath_type<scalar_t>>::size();
  constexpr int V = kSums / 4;
  int64_t c = c0;
  for (; c + V * L <= c1; c += V * L) correlate_vectors<V>(g, grad + c, input + c, L, sums + c);
  for (; c < c1; c += L)
    correlate_vectors<1>(g, grad + c, input + c, std::min(L, c1 - c), sums + c);
}

#define DLOPS_INSTANTIATE(scalar_t)                                                                \
  template void sum_taps<DLOPS_CAPABILITY>(const DepthwiseSum&, int64_t, int64_t, const scalar_t*, \
                                           const at::opmath_type<scalar_t>*,                       \
                                           const at::opmath_type<scalar_t>*, scalar_t*);           \
  template void correlate_channels<DLOPS_CAPABILITY>(const Conv2dGeometry&, const scalar_t*,       \
                                                     const scalar_t*, int64_t, int64_t, double*);

DLOPS_INSTANTIATE(double)
DLOPS_INSTANTIATE(float)
DLOPS_INSTANTIATE(c10::BFloat16)
DLOPS_INSTANTIATE(c10::Half)

}  // namespace dlops::cpu
