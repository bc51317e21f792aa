// A tile's results on their way to memory: by way of shared memory, so that neighbouring threads
// write neighbours, 16 bytes at a time where they may.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/products.cuh"

namespace dlops::cuda {

// Lines of numbers that lie together in the result; a tile has `lines` of them.
template <class scalar_t, int lines, int numbers>
struct Lines {
  using T = Tile<scalar_t>;
  // 16 bytes more, so that what a warp puts there lies in all banks.
  static constexpr int kLineBytes = numbers * static_cast<int>(sizeof(scalar_t)) + 16;
  static constexpr int kBytes = lines * kLineBytes;

  DLOPS_DEVICE static scalar_t& at(unsigned char* shared, int line, int number) {
    return reinterpret_cast<scalar_t*>(shared + line * kLineBytes)[number];
  }

  // Puts two that lie together, of which the first is even.
  DLOPS_DEVICE static void put(unsigned char* shared, int line, int number, scalar_t first,
                               scalar_t second) {
    const Pair pair{first, second};
    scalar_t* const to = &at(shared, line, number);
    if constexpr (sizeof(Pair) == 4) {  // nvcc would write 16-bit numbers one by one
      uint32_t word;
      memcpy(&word, &pair, 4);
      *reinterpret_cast<uint32_t*>(to) = word;
    } else {
      *reinterpret_cast<Pair*>(to) = pair;
    }
  }

  // Writes all of them where to(line, number) says, or nowhere where that is null: `whole` chunks
  // of 16 bytes, which lie together there and begin at multiples of 16, or one by one.
  template <class Block, class F>
  DLOPS_DEVICE static void write(Block& block, unsigned char* shared, bool whole, const F& to) {
    block.sync();  // all are there
    block.threads([&](int thread) {
      if (whole) {
        for (int i = thread; i < lines * numbers / T::kChunk; i += T::kThreads)
          write_one<Chunk>(shared, i * T::kChunk, to);
      } else {
        for (int i = thread; i < lines * numbers; i += T::kThreads)
          write_one<scalar_t>(shared, i, to);
      }
    });
  }

 private:
  struct alignas(2 * sizeof(scalar_t)) Pair {
    scalar_t first, second;
  };
  struct alignas(16) Chunk {
    unsigned char bytes[16];
  };
  template <class W, class F>
  DLOPS_DEVICE static void write_one(unsigned char* shared, int i, const F& to) {
    const int line = i / numbers, number = i % numbers;
    scalar_t* const place = to(line, number);
    if (place != nullptr)
      *reinterpret_cast<W*>(place) = reinterpret_cast<const W&>(at(shared, line, number));
  }
};

}  // namespace dlops::cuda
