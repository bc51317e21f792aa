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

  // Writes all of them where to(line, number) says, or nowhere where that is null. So many numbers
  // lie together there from a multiple of as many on: 16 or 8 bytes of them, or 1.
  template <class Block, class F>
  DLOPS_DEVICE static void write(Block& block, unsigned char* shared, int together, const F& to) {
    block.sync();  // all are there
    block.threads([&](int thread) {
      if (together == T::kChunk) {
        write_all<T::kChunk>(shared, thread, to);
      } else if (together > 1) {
        write_all<(T::kChunk > 2 ? T::kChunk / 2 : 1)>(shared, thread, to);
      } else {
        write_all<1>(shared, thread, to);
      }
    });
  }

 private:
  struct alignas(2 * sizeof(scalar_t)) Pair {
    scalar_t first, second;
  };
  template <int together, class F>
  DLOPS_DEVICE static void write_all(unsigned char* shared, int thread, const F& to) {
    constexpr int bytes = together * static_cast<int>(sizeof(scalar_t));
    for (int i = thread; i < lines * numbers / together; i += T::kThreads) {
      const int line = i * together / numbers, number = i * together % numbers;
      scalar_t* const place = to(line, number);
      if (place != nullptr)
        *reinterpret_cast<Bits<bytes>*>(place) =
            reinterpret_cast<const Bits<bytes>&>(at(shared, line, number));
    }
  }
};

}  // namespace dlops::cuda
