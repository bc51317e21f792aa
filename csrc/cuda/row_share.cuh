// The classes of a row that one member of a team works on (rows.cuh), with their logits in
// registers: 16 bytes at a time where the row allows it, several loads on their way at once. A row
// that does not fit goes through the registers in chunks.
#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>
#include <limits>

#include "common/cuda_utils.cuh"
#include "cuda/rows.cuh"
#include "cuda/write_at_once.cuh"

namespace dlops::cuda {

template <class scalar_t>
struct alignas(16) Pack {
  static constexpr int width = 16 / sizeof(scalar_t);
  scalar_t of[width];
};
// How many of them a member holds: of narrow types fewer, which take more registers at work.
template <class scalar_t>
constexpr int kPacks = sizeof(scalar_t) < 4 ? 4 : 8;

// How the elements of a row stand in memory.
struct RowLayout {
  int64_t classes, stride;
  bool in_packs;  // side by side, every row at a multiple of 16 bytes
};

template <class scalar_t, class Team>
class RowShare {
 public:
  using T = at::opmath_type<scalar_t>;

  DLOPS_HOST_DEVICE RowShare(const scalar_t* logits, const RowLayout& layout, int rank)
      : logits_(logits),
        classes_(layout.classes),
        stride_(layout.stride),
        in_packs_(layout.in_packs),
        own_(layout.in_packs ? rank * kWidth : rank),
        step_(layout.in_packs ? 1 : Team::size),
        pitch_(step_ * stride_) {
    if (classes_ > 0) load(0);  // on its way before anything is known of the row
  }

  // Calls f() for each chunk, when its logits are there. A row of one chunk is read once.
  template <class F>
  DLOPS_HOST_DEVICE void for_each_chunk(const F& f) {
    for (int64_t begin = 0; begin < classes_; begin += kChunk) {
      if (begin != begin_) load(begin);
      f();
    }
  }
  // Calls f(logit) for this member's share of the chunk, and with -inf in place of what it lacks.
  template <class F>
  DLOPS_HOST_DEVICE void for_each_logit(const F& f) const {
    for_each_pack(begin_, [&](int k, int64_t) {
      DLOPS_UNROLL
      for (int j = 0; j < kWidth; ++j) f(static_cast<T>(packs_[k].of[j]));
    });
  }
  DLOPS_HOST_DEVICE bool is_one_chunk() const { return classes_ <= kChunk; }
  // Whether class c is one of this member's.
  DLOPS_HOST_DEVICE bool owns(int64_t c) const {
    const int64_t place = c % kTeamPack - own_;
    return in_packs_ ? 0 <= place && place < kWidth : place % step_ == 0;
  }
  // to[c] = f(logit) for all of this member's classes, where `to` is laid out like the logits.
  template <class F>
  DLOPS_HOST_DEVICE void write(scalar_t* to, const F& f) {
    for_each_chunk([&] {
      for_each_pack(begin_, [&](int k, int64_t first) {
        Pack<scalar_t> result;
        DLOPS_UNROLL
        for (int j = 0; j < kWidth; ++j)
          result.of[j] = static_cast<scalar_t>(f(static_cast<T>(packs_[k].of[j])));
        store(result, to, first);
      });
    });
  }

 private:
  static constexpr int kWidth = Pack<scalar_t>::width;
  static constexpr int64_t kTeamPack = Team::size * kWidth, kChunk = kPacks<scalar_t> * kTeamPack;

  // Calls f(k, its first class) for the member's packs of a chunk: `step_` lies between the classes
  // of a pack, so that neighbouring members read neighbouring bytes either way.
  template <class F>
  DLOPS_HOST_DEVICE void for_each_pack(int64_t begin, const F& f) const {
    DLOPS_UNROLL
    for (int k = 0; k < kPacks<scalar_t>; ++k) {
      const int64_t first = begin + k * kTeamPack;
      if (first >= classes_) break;
      f(k, first + own_);
    }
  }
  DLOPS_HOST_DEVICE void load(int64_t begin) {
    const auto none = static_cast<scalar_t>(-std::numeric_limits<float>::infinity());
    for_each_pack(begin, [&](int k, int64_t) {
      DLOPS_UNROLL
      for (scalar_t& logit : packs_[k].of) logit = none;
    });
    if (in_packs_) {
      for_each_pack(begin, [&](int k, int64_t first) {
        if (first < classes_) packs_[k] = *reinterpret_cast<const Pack<scalar_t>*>(logits_ + first);
      });
    } else {
      for_each_pack(begin, [&](int k, int64_t first) {
        DLOPS_UNROLL
        for (int j = 0; j < kWidth; ++j) {
          if (first + j * step_ < classes_) packs_[k].of[j] = logits_[first * stride_ + j * pitch_];
        }
      });
    }
    begin_ = begin;
  }
  DLOPS_HOST_DEVICE void store(const Pack<scalar_t>& pack, scalar_t* to, int64_t first) const {
    if (in_packs_) {
      if (first < classes_) write_at_once(to + first, pack);
      return;
    }
    DLOPS_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      if (first + j * step_ < classes_) to[first * stride_ + j * pitch_] = pack.of[j];
    }
  }

  const scalar_t* logits_;
  int64_t classes_, stride_;
  bool in_packs_;
  int64_t own_;           // the member's first class in a pack of the whole team
  int64_t step_, pitch_;  // from one to the next of its classes, and in memory
  int64_t begin_ = -1;    // of the chunk in `packs_`
  Pack<scalar_t> packs_[kPacks<scalar_t>] = {};
};

}  // namespace dlops::cuda
