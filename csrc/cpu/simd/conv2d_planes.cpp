#include "cpu/simd/conv2d_planes.h"

#include <ATen/cpu/vec/functional.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "cpu/simd/load_store.h"
#include "cpu/simd/registers.h"

namespace dlops::cpu {
namespace {

// The plane columns [begin, end) that stand on an image of W columns, in phase b.
Interval image_columns(const Conv2dGeometry& g, int64_t phase_w, int64_t pitch) {
  const int64_t shift = g.pad_left - phase_w;  // image column = plane column * stride_w - shift
  const int64_t begin = shift > 0 ? ceil_div(shift, g.stride_w) : 0;
  const int64_t span = g.W + shift;
  const int64_t end = span > 0 ? std::min(pitch, ceil_div(span, g.stride_w)) : 0;
  return {std::min(begin, end), end};
}

// These two write whole vectors, beyond `count`: planes are filled front to back, with slack behind
// the last one.
template <class T>
void zero(T* to, int64_t count) {
  constexpr int64_t L = Vec<T>::size();
  for (int64_t i = 0; i < count; i += L) Vec<T>(T(0)).store(to + i);
}

template <class image_t, class sum_t>
void copy_row(const image_t* from, sum_t* to, int64_t count) {
  constexpr int64_t L = Vec<sum_t>::size();
  for (int64_t i = 0; i < count; i += L) load<sum_t>(from + i, count - i).store(to + i);
}

// Every other element. Those of two bytes are the lower halves of integers.
template <class image_t, class sum_t>
void gather_alternate(const image_t* from, sum_t* to, int64_t count) {
  int64_t i = 0;
#if DLOPS_CAPABILITY == 2
  if constexpr (sizeof(image_t) == 2 && std::is_same_v<image_t, sum_t>) {
    for (; i < count; i += 16) {
      // The last integer would end behind the last element.
      const auto whole = static_cast<__mmask16>((1u << std::min<int64_t>(16, count - 1 - i)) - 1);
      const auto wanted = static_cast<__mmask16>((1u << std::min<int64_t>(16, count - i)) - 1);
      const __m512i pairs = _mm512_maskz_loadu_epi32(whole, from + 2 * i);
      _mm512_mask_cvtepi32_storeu_epi16(to + i, wanted, pairs);
    }
    i = std::max<int64_t>(0, count - 1);
  }
#endif
  for (; i < count; ++i) to[i] = static_cast<sum_t>(from[2 * i]);
}

template <class image_t, class sum_t>
void gather_row(const image_t* from, int64_t step, sum_t* to, int64_t count) {
  if (step == 1) {
    copy_row(from, to, count);
  } else if (step == 2) {
    gather_alternate(from, to, count);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<sum_t>(from[step * i]);
  }
}

template <class sum_t, class image_t>
void scatter_row(const sum_t* from, image_t* to, int64_t step, int64_t count) {
  if (step == 1) {
    constexpr int64_t L = Vec<sum_t>::size();
    for (int64_t i = 0; i < count; i += L) store(Vec<sum_t>::loadu(from + i), to + i, count - i);
  } else if (step == 2) {
    for (int64_t i = 0; i < count; ++i) to[2 * i] = static_cast<image_t>(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[step * i] = static_cast<image_t>(from[i]);
  }
}

// J outputs at V vectors of pixels. The bias comes last: sums that start from a large one would
// round each of their terms at its size.
template <int J, int V, class T>
void stencil_block(const T* const* sources, int64_t terms, const T* weights, const T* bias,
                   int64_t i, T* out, int64_t ld) {
  constexpr int64_t L = Vec<T>::size();
  Vec<T> sum[J][V];
  for (auto& row : sum)
    for (auto& one : row) one = Vec<T>(T(0));
  for (int64_t t = 0; t < terms; ++t) {
    Vec<T> x[V];
    for (int v = 0; v < V; ++v) x[v] = Vec<T>::loadu(sources[t] + i + v * L);
    for (int j = 0; j < J; ++j) {
      const Vec<T> w(weights[j * terms + t]);
      for (int v = 0; v < V; ++v) sum[j][v] = at::vec::fmadd(x[v], w, sum[j][v]);
    }
  }
  for (int j = 0; j < J; ++j) {
    const Vec<T> last(bias == nullptr ? T(0) : bias[j]);
    for (int v = 0; v < V; ++v) (sum[j][v] + last).store(out + j * ld + i + v * L);
  }
}

// As many blocks of V vectors as there are, then narrower ones.
template <int J, int V, class T>
void stencil_from(int64_t i, const T* const* sources, int64_t terms, const T* weights,
                  const T* bias, int64_t count, T* out, int64_t ld) {
  constexpr int64_t L = Vec<T>::size();
  for (; ceil_div(count - i, L) >= V; i += V * L)
    stencil_block<J, V>(sources, terms, weights, bias, i, out, ld);
  if constexpr (V > 1) stencil_from<J, V / 2>(i, sources, terms, weights, bias, count, out, ld);
}

template <int J, class T>
int64_t stencil_outputs(int64_t j, const T* const* sources, int64_t terms, const T* weights,
                        const T* bias, int64_t outputs, int64_t count, T* out, int64_t ld) {
  for (; j + J <= outputs; j += J) {
    stencil_from<J, kSums / J>(0, sources, terms, weights + j * terms,
                               bias == nullptr ? nullptr : bias + j, count, out + j * ld, ld);
  }
  return j;
}

// J x B sums at a time.
template <int J, int B, class T>
void correlate_block(const T* const* a, int64_t a_pitch, const T* const* b, int64_t terms,
                     int64_t b_pitch, int64_t rows, int64_t cols, double* sums) {
  constexpr int64_t L = Vec<T>::size();
  Vec<T> sum[J][B];
  for (auto& row : sum)
    for (auto& one : row) one = Vec<T>(T(0));
  const auto add = [&](const auto& load, int64_t row, int64_t i) {
    Vec<T> x[J];
    for (int j = 0; j < J; ++j) x[j] = load(a[j] + row * a_pitch + i);
    for (int t = 0; t < B; ++t) {
      const Vec<T> y = load(b[t] + row * b_pitch + i);
      for (int j = 0; j < J; ++j) sum[j][t] = at::vec::fmadd(x[j], y, sum[j][t]);
    }
  };
  const int64_t tail = cols % L;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i + L <= cols; i += L) {
      add([](const T* p) { return Vec<T>::loadu(p); }, row, i);
    }
    if (tail > 0) add([tail](const T* p) { return Vec<T>::loadu(p, tail); }, row, cols - tail);
  }
  for (int j = 0; j < J; ++j) {
    for (int t = 0; t < B; ++t) {
      sums[j * terms + t] +=
          at::vec::vec_reduce_all<T>([](Vec<T>& x, Vec<T>& y) { return x + y; }, sum[j][t]);
    }
  }
}

// Terms t, t + B, ... as long as there are B of them.
template <int J, int B, class T>
int64_t correlate_terms(int64_t t, const T* const* a, int64_t a_pitch, const T* const* b,
                        int64_t terms, int64_t b_pitch, int64_t rows, int64_t cols, double* sums) {
  for (; t + B <= terms; t += B)
    correlate_block<J, B>(a, a_pitch, b + t, terms, b_pitch, rows, cols, sums + t);
  return t;
}

}  // namespace

template <int capability, class image_t, class sum_t>
void fill_phases(const Conv2dGeometry& g, const PlaneLayout& layout, const image_t* image,
                 int64_t row0, int64_t rows, sum_t* phases) {
  const int64_t pitch = layout.pitch;
  for (int64_t a = 0; a < layout.phases_h; ++a) {
    for (int64_t b = 0; b < layout.phases_w; ++b) {
      const Interval inside = image_columns(g, b, pitch);
      for (int64_t q = 0; q < rows + layout.reach_h; ++q, phases += pitch) {
        const int64_t h = (row0 + q) * g.stride_h + a - g.pad_top;
        if (!g.row_inside(h)) {
          zero(phases, pitch);
          continue;
        }
        zero(phases, inside.begin);
        const image_t* from = image + h * g.W + inside.begin * g.stride_w + b - g.pad_left;
        gather_row(from, g.stride_w, phases + inside.begin, inside.end - inside.begin);
        zero(phases + inside.end, pitch - inside.end);
      }
    }
  }
}

template <int capability, class image_t, class sum_t>
void fill_gradient(const Conv2dGeometry& g, const PlaneLayout& layout, const image_t* grad,
                   int64_t row0, int64_t rows, sum_t* plane) {
  const int64_t pitch = layout.pitch;
  for (int64_t q = row0; q < row0 + rows; ++q, plane += pitch) {
    const bool inside = 0 <= q && q < g.OH;
    const int64_t count = inside ? g.OW : 0;
    if (inside) gather_row(grad + q * g.OW, 1, plane, count);
    zero(plane + count, pitch - count);
  }
}

template <int capability, class sum_t>
void stencil(const sum_t* const* sources, int64_t terms, const sum_t* weights, const sum_t* bias,
             int64_t outputs, int64_t count, sum_t* out, int64_t ld) {
  int64_t j = 0;
  if constexpr (kSums >= 16)
    j = stencil_outputs<8>(j, sources, terms, weights, bias, outputs, count, out, ld);
  j = stencil_outputs<4>(j, sources, terms, weights, bias, outputs, count, out, ld);
  j = stencil_outputs<2>(j, sources, terms, weights, bias, outputs, count, out, ld);
  stencil_outputs<1>(j, sources, terms, weights, bias, outputs, count, out, ld);
}

template <int capability, class sum_t>
void correlate(const sum_t* const* a, int64_t outputs, int64_t a_pitch, const sum_t* const* b,
               int64_t terms, int64_t b_pitch, int64_t rows, int64_t cols, double* sums) {
  int64_t j = 0;
  for (; j + 4 <= outputs; j += 4) {
    const int64_t t = correlate_terms<4, kSums / 4>(0, a + j, a_pitch, b, terms, b_pitch, rows,
                                                    cols, sums + j * terms);
    correlate_terms<4, 1>(t, a + j, a_pitch, b, terms, b_pitch, rows, cols, sums + j * terms);
  }
  // The sizes of kernels.
  for (; j < outputs; ++j) {
    int64_t t = 0;
    t = correlate_terms<1, 9>(t, a + j, a_pitch, b, terms, b_pitch, rows, cols, sums + j * terms);
    t = correlate_terms<1, 5>(t, a + j, a_pitch, b, terms, b_pitch, rows, cols, sums + j * terms);
    t = correlate_terms<1, 3>(t, a + j, a_pitch, b, terms, b_pitch, rows, cols, sums + j * terms);
    correlate_terms<1, 1>(t, a + j, a_pitch, b, terms, b_pitch, rows, cols, sums + j * terms);
  }
}

template <int capability, class sum_t, class image_t>
void store_rows(const Conv2dGeometry& g, const sum_t* plane, int64_t rows, image_t* image) {
  const int64_t pitch = PlaneLayout(g).pitch;
  for (int64_t q = 0; q < rows; ++q) scatter_row(plane + q * pitch, image + q * g.OW, 1, g.OW);
}

template <int capability, class sum_t, class image_t>
void store_phase(const Conv2dGeometry& g, const sum_t* plane, int64_t phase_h, int64_t phase_w,
                 int64_t row0, int64_t rows, image_t* image) {
  const int64_t pitch = PlaneLayout(g).pitch;
  const Interval inside = image_columns(g, phase_w, pitch);
  const int64_t first = inside.begin * g.stride_w + phase_w - g.pad_left;
  for (int64_t q = row0; q < row0 + rows; ++q, plane += pitch) {
    const int64_t h = q * g.stride_h + phase_h - g.pad_top;
    if (!g.row_inside(h)) continue;
    image_t* row = image + h * g.W;
    scatter_row(plane + inside.begin, row + first, g.stride_w, inside.end - inside.begin);
    // Columns beyond the last window.
    for (int64_t w = pitch * g.stride_w + phase_w - g.pad_left; w < g.W; w += g.stride_w)
      if (w >= 0) row[w] = image_t(0);
  }
}

#define DLOPS_INSTANTIATE_COPIES(image_t, sum_t)                                            \
  template void fill_phases<DLOPS_CAPABILITY>(const Conv2dGeometry&, const PlaneLayout&,    \
                                              const image_t*, int64_t, int64_t, sum_t*);    \
  template void fill_gradient<DLOPS_CAPABILITY>(const Conv2dGeometry&, const PlaneLayout&,  \
                                                const image_t*, int64_t, int64_t, sum_t*);  \
  template void store_rows<DLOPS_CAPABILITY>(const Conv2dGeometry&, const sum_t*, int64_t,  \
                                             image_t*);                                     \
  template void store_phase<DLOPS_CAPABILITY>(const Conv2dGeometry&, const sum_t*, int64_t, \
                                              int64_t, int64_t, int64_t, image_t*);

#define DLOPS_INSTANTIATE(sum_t)                                                            \
  template void stencil<DLOPS_CAPABILITY>(const sum_t* const*, int64_t, const sum_t*,       \
                                          const sum_t*, int64_t, int64_t, sum_t*, int64_t); \
  template void correlate<DLOPS_CAPABILITY>(const sum_t* const*, int64_t, int64_t,          \
                                            const sum_t* const*, int64_t, int64_t, int64_t, \
                                            int64_t, double*);

DLOPS_INSTANTIATE(float)
DLOPS_INSTANTIATE(double)
DLOPS_INSTANTIATE_COPIES(double, double)
DLOPS_INSTANTIATE_COPIES(float, float)
DLOPS_INSTANTIATE_COPIES(c10::BFloat16, float)
DLOPS_INSTANTIATE_COPIES(c10::BFloat16, c10::BFloat16)
DLOPS_INSTANTIATE_COPIES(c10::Half, float)

}  // namespace dlops::cpu
