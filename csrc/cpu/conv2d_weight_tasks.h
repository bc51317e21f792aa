// How the work on a weight's gradient is shared out.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "conv2d_math.h"
#include "cpu/grain.h"

namespace dlops::cpu {

// Units of work, each some pixels of the batch, in several chunks that have sums of their own; and
// blocks of outputs. How many there are depends on the shapes alone.
class WeightTasks {
 public:
  static constexpr int64_t kBlock = 64;  // outputs of a product

  // `elements`: of the sums of a chunk.
  WeightTasks(const Conv2dGeometry& g, int64_t units, int64_t elements) : g_(g), units_(units) {
    const int64_t most = std::max<int64_t>(1, kElements / std::max<int64_t>(1, elements));
    chunks_ = std::min({units, most, ceil_div(kTasks, g.groups)});
    splits_ = std::min(blocks(), ceil_div(kTasks, chunks_ * g.groups));
  }
  WeightTasks(const WeightTasks&) = delete;
  WeightTasks& operator=(const WeightTasks&) = delete;

  // As many parts of the batch as give every thread some, where all blocks of outputs do not.
  static int64_t tasks_per_block(const Conv2dGeometry& g) {
    return ceil_div(kTasks, g.groups * ceil_div(g.outputs_per_group(), kBlock));
  }
  int64_t chunks() const { return chunks_; }
  int64_t blocks() const { return ceil_div(g_.outputs_per_group(), kBlock); }
  int64_t width(int64_t block) const {
    return std::min(kBlock, g_.outputs_per_group() - block * kBlock);
  }

  // Calls begin_thread(each) on each thread; each(add) calls add(chunk, group, unit, blocks, first)
  // for its units, where the first unit of a chunk is the first to write its sums.
  template <class Begin>
  void fill(const Begin& begin_thread) const {
    const int64_t work = g_.N * g_.output_pixels() * g_.column_rows() * g_.outputs_per_group() /
                         std::max<int64_t>(1, chunks_ * splits_);
    at::parallel_for(0, chunks_ * g_.groups * splits_, grain(work),
                     [&](int64_t begin, int64_t end) {
                       begin_thread([&](const auto& add) {
                         // Neighbouring splits share what a unit is brought into.
                         for (int64_t task = begin, next; task < end; task = next) {
                           const int64_t part = task / splits_, chunk = part / g_.groups;
                           next = std::min(end, (part + 1) * splits_);
                           const Interval some{(task - part * splits_) * blocks() / splits_,
                                               (next - part * splits_) * blocks() / splits_};
                           const int64_t first = chunk * units_ / chunks_;
                           for (int64_t unit = first; unit < (chunk + 1) * units_ / chunks_; ++unit)
                             add(chunk, part % g_.groups, unit, some, unit == first);
                         }
                       });
                     });
  }

 private:
  static constexpr int64_t kTasks = 8;  // that keep a few threads evenly busy
  // What the sums of all chunks may take, where that is more than the gradient itself.
  static constexpr int64_t kElements = 512 * 1024;
  const Conv2dGeometry& g_;
  int64_t units_, chunks_, splits_;
};

}  // namespace dlops::cpu
