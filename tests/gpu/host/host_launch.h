// Stands in for the launches of csrc/cuda on a machine without nvcc: the same functors, on the
// host.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <thread>
#include <type_traits>
#include <vector>

#include "host_block.h"

#define DLOPS_CUDA_KEY CPU

namespace dlops::cuda {

template <class F>
void for_each(int64_t count, const F& f, int64_t = 0) {
  for (int64_t i = 0; i < count; ++i) f(i);
}

// In shares that are summed in their turn, as on the device: in one long sum, the rounding of
// double would show.
template <class F, class G>
void sum(int64_t count, const F& f, const G& finish, const at::TensorOptions&) {
  std::array<double, 256> shares = {};
  for (int64_t i = 0; i < count; ++i) shares[i % shares.size()] += static_cast<double>(f(i));
  finish(std::accumulate(shares.begin(), shares.end(), 0.0));
}

struct HostThread {
  static constexpr int size = 1;
  static constexpr bool together = false;
  static int rank() { return 0; }
  template <class T, class Op>
  T reduce(T value, const Op&) const {
    return value;
  }
};

// Real threads, so that the parts of the code that share a row among several are run too.
template <bool in_step>
struct HostTeam {
  static constexpr int size = 2;
  static constexpr bool together = in_step;
  struct Shared {
    std::barrier<> barrier{size};
    std::byte values[size][64];
  };
  Shared* shared;
  int own_rank;

  int rank() const { return own_rank; }
  template <class T, class Op>
  T reduce(T value, const Op& op) const {
    static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
    std::memcpy(shared->values[own_rank], &value, sizeof(T));
    shared->barrier.arrive_and_wait();
    T total, next;
    std::memcpy(&total, shared->values[0], sizeof(T));
    for (int i = 1; i < size; ++i) {
      std::memcpy(&next, shared->values[i], sizeof(T));
      total = op(total, next);
    }
    shared->barrier.arrive_and_wait();
    return total;
  }
};

// Calls f(row, team) by both members of a team.
template <class Team, class F>
void for_each_row_of_team(int64_t rows, const F& f) {
  typename Team::Shared shared;
  std::vector<std::thread> members;
  for (int rank = 0; rank < Team::size; ++rank)
    members.emplace_back([&, rank] {
      for (int64_t row = 0; row < rows; ++row) f(row, Team{&shared, rank});
    });
  for (std::thread& member : members) member.join();
}

// `Shape` is rows.cuh's, which comes after this. Rows that lie apart are shared as soon as they
// have more than some classes, so that small cases are.
template <class Shape, class F>
void for_each_row(const Shape& shape, const F& f, int64_t = 0) {
  if (shape.length <= 4) {
    for (int64_t row = 0; row < shape.rows; ++row) f(row, HostThread());
  } else if (shape.stride > 1) {
    for_each_row_of_team<HostTeam<true>>(shape.rows, f);
  } else {
    for_each_row_of_team<HostTeam<false>>(shape.rows, f);
  }
}

template <class Shape, class F, class G>
void sum_rows(const Shape& shape, const F& f, const G& finish, const at::TensorOptions& options) {
  std::vector<double> values(static_cast<size_t>(shape.rows));
  for_each_row(shape, [&](int64_t row, const auto& team) {
    const auto value = f(row, team);
    if (team.rank() == 0) values[static_cast<size_t>(row)] = static_cast<double>(value);
  });
  sum(shape.rows, [&](int64_t i) { return values[static_cast<size_t>(i)]; }, finish, options);
}

}  // namespace dlops::cuda
