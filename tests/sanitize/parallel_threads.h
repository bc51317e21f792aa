// at::parallel_for as plain threads, for ThreadSanitizer: torch's is OpenMP, whose runtime is not
// instrumented, so that every hand-over between its threads would look like a race. Included ahead
// of every source by scripts/sanitize.sh; the kernels themselves are compiled as they are.
//
// Ranges are split however small they are, so that the small shapes of the tests run on several
// threads. With DLOPS_SEEDED_RACE in the environment every part is given to two threads at once,
// which must then be reported.
#pragma once

#define parallel_for parallel_for_of_torch
#include <ATen/Parallel.h>
#undef parallel_for

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

namespace at {

template <class F>
void parallel_for(const int64_t begin, const int64_t end, int64_t, const F& f) {
  if (begin >= end) return;
  constexpr int64_t kThreads = 3;
  const int64_t part = (end - begin + kThreads - 1) / kThreads;
  const int copies = std::getenv("DLOPS_SEEDED_RACE") == nullptr ? 1 : 2;
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(2 * kThreads);
  for (int64_t from = begin; from < end; from += part) {
    for (int copy = 0; copy < copies; ++copy) {
      std::exception_ptr* error = &errors[threads.size()];
      threads.emplace_back([&f, error, from, to = std::min(end, from + part)] {
        try {
          f(from, to);
        } catch (...) {
          *error = std::current_exception();
        }
      });
    }
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace at
