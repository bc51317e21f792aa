// How many tasks a thread must get for the split to pay.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dlops::cpu {

// Multiply-adds below which waking another thread costs more than it saves.
constexpr int64_t kWorkPerThread = 1 << 16;

// Elements of pooling windows, likewise.
constexpr int64_t kVisitsPerThread = 1 << 14;

// at::parallel_for's grain for tasks of so many of either.
inline int64_t grain(int64_t work_per_task, int64_t work_per_thread = kWorkPerThread) {
  return std::max<int64_t>(1, work_per_thread / std::max<int64_t>(1, work_per_task));
}

}  // namespace dlops::cpu
