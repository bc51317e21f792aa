// Sums and maps over many elements whose result does not depend on the number of threads: fixed
// chunks, each summed by itself, added up in their order.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <vector>

#include "conv2d_math.h"
#include "cpu/capability.h"
#include "cpu/grain.h"
#include "cpu/simd/conv2d.h"

namespace dlops::cpu {

// The sum of f(begin, end) over chunks of [0, count).
template <class F>
double chunked_sum(int64_t count, int64_t chunk, const F& f) {
  std::vector<double> sums(static_cast<size_t>(ceil_div(count, chunk)));
  at::parallel_for(0, static_cast<int64_t>(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      sums[static_cast<size_t>(i)] = f(i * chunk, std::min(count, (i + 1) * chunk));
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// Adds the chunks of `sums` (chunks, ...) to the first, in their order.
template <class sum_t>
void add_chunks(const at::Tensor& sums) {
  const int64_t chunks = sums.size(0), size = sums.numel() / chunks;
  if (chunks == 1) return;
  sum_t* const data = sums.mutable_data_ptr<sum_t>();
  const auto add = DLOPS_SIMD(add_row, sum_t, sum_t);
  at::parallel_for(0, size, grain(chunks), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      add(data + chunk * size + begin, data + begin, end - begin);
  });
}

}  // namespace dlops::cpu
