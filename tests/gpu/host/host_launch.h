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
void for_each(int64_t count, const F& f) {
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
  static int rank() { return 0; }
  template <class T, class Op>
  T reduce(T value, const Op&) const {
    return value;
  }
};

// Real threads, so that the parts of the code that share a row among several are run too.
struct HostTeam {
  static constexpr int size = 2;
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

template <class F>
void for_each_row(int64_t rows, int64_t length, int64_t stride, const F& f) {
  if (stride > 1 || length <= 4) {
    for (int64_t row = 0; row < rows; ++row) f(row, HostThread());
    return;
  }
  HostTeam::Shared shared;
  std::vector<std::thread> members;
  for (int rank = 0; rank < HostTeam::size; ++rank)
    members.emplace_back([&, rank] {
      for (int64_t row = 0; row < rows; ++row) f(row, HostTeam{&shared, rank});
    });
  for (std::thread& member : members) member.join();
}

}  // namespace dlops::cuda
