// The block of cuda/block.cuh on the host: its threads take turns, phase by phase, and warps do
// together what the instructions' manual says they do.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <vector>

#include "cuda/boxes.h"

namespace dlops::cuda {

// What a box is cut from: one of the two, and the numbers of a row that lie together in memory.
struct BoxMap {
  BoxesOfRows rows;
  BoxesOfPixels pixels;
};
// How many boxes of pixels have come: for tests.
extern "C" {
inline int64_t dlops_boxes_of_pixels = 0;
}

// How often tiles of a type have been launched whose name holds `part`: for tests.
inline std::map<std::string, int64_t> launches_by_name;
extern "C" __attribute__((used)) inline int64_t dlops_launches(const char* part) {
  int64_t count = 0;
  for (const auto& [name, launches] : launches_by_name)
    if (name.find(part) != std::string::npos) count += launches;
  return count;
}

inline BoxMap map_rows(const BoxesOfRows& boxes) { return {boxes, {}}; }
inline BoxMap map_pixels(const BoxesOfPixels& boxes) { return {{}, boxes}; }

class Block {
 public:
  static constexpr int kThreads = 256;

  // `seed` decides what comes late.
  explicit Block(int64_t seed) : random_(static_cast<uint32_t>(seed) * 2654435761) {}

  template <class T>
  class PerThread {
   public:
    T& operator[](int thread) { return values_[static_cast<size_t>(thread)]; }

   private:
    std::vector<T> values_ = std::vector<T>(kThreads);
  };

  template <class F>
  void threads(const F& f) const {
    for (int thread = 0; thread < kThreads; ++thread) f(thread);
  }
  template <class F>
  void warps(const F& f) const {
    for (int warp = 0; warp < kThreads / 32; ++warp) f(warp);
  }
  template <class F>
  void groups(const F& f) const {
    for (int group = 0; group < kThreads / 128; ++group) f(group);
  }
  template <class F>
  void lanes(int warp, const F& f) const {
    for (int lane = 0; lane < 32; ++lane) f(warp * 32 + lane);
  }
  void sync() const {}

  // Some copies arrive at once, the others no sooner than someone waits for them: what reads a tile
  // too early, or writes into one that is still read, gives wrong results.
  template <int bytes>
  void copy(void* shared, const void* global, bool valid) {
    Copy copy{shared, bytes, {}};
    if (valid) std::memcpy(copy.data.data(), global, bytes);
    random_ = random_ * 1664525 + 1013904223;
    if (bytes < 4 || random_ >> 31 != 0) {
      copy.arrive();
    } else {
      open_.push_back(copy);
    }
  }
  void commit() {
    batches_.push_back(open_);
    open_.clear();
  }
  template <int pending>
  void wait() {
    while (batches_.size() > pending) {
      for (const Copy& copy : batches_.front()) copy.arrive();
      batches_.erase(batches_.begin());
    }
  }

  template <class F, class G>
  void load_matrices(int warp, const F& to, const G& from) const {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < 32; ++lane)
        std::memcpy(&to(warp * 32 + lane)[matrix], from(matrix * 8 + lane / 4) + lane % 4 * 4, 4);
  }
  template <class F, class G>
  void load_transposed(int warp, const F& to, const G& from) const {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < 32; ++lane)
        for (int half = 0; half < 2; ++half)
          std::memcpy(reinterpret_cast<unsigned char*>(&to(warp * 32 + lane)[matrix]) + half * 2,
                      from(matrix * 8 + lane % 4 * 2 + half) + lane / 4 * 2, 2);
  }

  template <class scalar_t, class C, class A, class B>
  void multiply_add(int warp, const C& sums, const A& a_of, const B& b_of) const {
    if constexpr (std::is_same_v<scalar_t, double>) {
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
          for (int k = 0; k < 4; ++k)
            sums(warp * 32 + lane)[i] += a_of(warp * 32 + lane / 4 * 4 + k)[i / 2] *
                                         b_of(warp * 32 + (lane % 4 * 2 + i % 2) * 4 + k)[0];
    } else {
      multiply_add_floats<scalar_t>(warp, sums, a_of, b_of);
    }
  }
  template <class scalar_t, class C, class A, class B>
  void multiply_add_floats(int warp, const C& sums, const A& a_of, const B& b_of) const {
    constexpr int depth = 32 / sizeof(scalar_t), each = depth / 8;  // elements in four bytes
    float a[16][depth], b[8][depth];
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, first = lane % 4 * each;
      for (int part = 0; part < 2; ++part)
        for (int i = 0; i < each; ++i) {
          const int k = part * depth / 2 + first + i;
          a[row][k] = element<scalar_t>(a_of(warp * 32 + lane)[2 * part], i);
          a[row + 8][k] = element<scalar_t>(a_of(warp * 32 + lane)[2 * part + 1], i);
          b[row][k] = element<scalar_t>(b_of(warp * 32 + lane)[part], i);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int k = 0; k < depth; ++k)
          sums(warp * 32 + lane)[i] += a[lane / 4 + i / 2 * 8][k] * b[lane % 4 * 2 + i % 2][k];
  }

  // The products of some stages are worked out at once, the others no sooner than someone waits for
  // them, from what is in memory by then.
  template <class scalar_t, int columns, bool transposed, class C>
  void start_product(int group, const C& sums, const unsigned char* a, const unsigned char* b,
                     int leading) {
    std::array<float*, 128> threads;
    for (int i = 0; i < 128; ++i) threads[static_cast<size_t>(i)] = sums(group * 128 + i);
    const std::function<void()> product = [=] {
      for (int row = 0; row < 64; ++row)
        for (int column = 0; column < columns; ++column) {
          const int lane = row % 8 * 4 + column % 8 / 2;
          float& sum = threads[static_cast<size_t>(row / 16 * 32 + lane)]
                              [column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
          for (int k = 0; k < 32 / static_cast<int>(sizeof(scalar_t)); ++k)
            sum += static_cast<float>(shared_element<scalar_t, transposed>(a, row, k, leading)) *
                   static_cast<float>(shared_element<scalar_t, transposed>(b, column, k, leading));
        }
    };
    if (late_) {
      products_.push_back(product);
    } else {
      finish_products();  // in their order
      product();
    }
  }
  void open_products() {
    random_ = random_ * 1664525 + 1013904223;
    late_ = random_ >> 31 != 0;
  }
  void close_products() {
    batches_of_products_.push_back(products_);
    products_.clear();
  }
  template <int pending = 0>
  void finish_products() {
    while (batches_of_products_.size() > pending) {
      for (const auto& product : batches_of_products_.front()) product();
      batches_of_products_.erase(batches_of_products_.begin());
    }
    if (pending > 0) return;
    for (const auto& product : products_) product();
    products_.clear();
  }
  template <class T>
  void settle(const PerThread<T>&) const {}
  void publish() const {}

  template <class F>
  void one(const F& f) const {
    f();
  }
  void open_barriers(uint64_t* barriers, int count) {
    for (int i = 0; i < count; ++i)
      if (!barriers_.try_emplace(barriers + i).second) throw std::logic_error("an open barrier");
  }
  void close_barriers(uint64_t* barriers, int count) {
    for (int i = 0; i < count; ++i) {
      if (barriers_.at(barriers + i).phase_is_open)
        throw std::logic_error("bytes on their way to a closed barrier");
      barriers_.erase(barriers + i);
    }
  }
  void expect(uint64_t* barrier, int bytes) {
    Barrier& state = barriers_.at(barrier);
    if (state.phase_is_open) throw std::logic_error("a phase within a phase");
    state.phase_is_open = true;
    state.missing = bytes;
  }
  // Boxes come like copies: some at once, the others when someone waits for them.
  void copy_rows(unsigned char* shared, const BoxMap& map, uint64_t* barrier, int c, int plane,
                 int row) {
    const BoxesOfRows& boxes = map.rows;
    copy_box(shared, barrier, boxes.numbers, c, boxes.columns, boxes.box_rows,
             [&](int i) -> const unsigned char* {
               if (row < 0 || row + i >= boxes.rows || plane < 0 || plane >= boxes.planes)
                 return nullptr;
               return static_cast<const unsigned char*>(boxes.start) +
                      (plane * boxes.plane + (row + i) * boxes.row) * bytes_of(boxes.numbers);
             });
  }
  // The im2col mode: the first cell of each window walks through the image from -pad on, by
  // strides, and wherever it passes the last window of a row or an image it begins the next one.
  void copy_pixels(unsigned char* shared, const BoxMap& map, uint64_t* barrier, int c, int n, int h,
                   int w, int dh, int dw) {
    const BoxesOfPixels& boxes = map.pixels;
    ++dlops_boxes_of_pixels;
    const int64_t last_h = boxes.H - 1 + boxes.below(), last_w = boxes.W - 1 + boxes.right();
    int64_t image = n, row = h, column = w;
    copy_box(shared, barrier, boxes.numbers, c, boxes.C, boxes.box_pixels,
             [&](int) -> const unsigned char* {
               const int64_t r = row + dh, s = column + dw;
               const bool inside =
                   image < boxes.N && r >= 0 && r < boxes.H && s >= 0 && s < boxes.W;
               const unsigned char* const from =
                   static_cast<const unsigned char*>(boxes.start) +
                   ((image * boxes.H + r) * boxes.W + s) * boxes.pixel * bytes_of(boxes.numbers);
               column += boxes.stride_w;
               if (column > last_w) {
                 column = -boxes.pad_left;
                 row += boxes.stride_h;
               }
               if (row > last_h) {
                 row = -boxes.pad_top;
                 ++image;
               }
               return inside ? from : nullptr;
             });
  }
  // As the device does, returns at once if the last phase that ended has this parity; it would wait
  // for ever where bytes are missing.
  void wait_for_phase(uint64_t* barrier, int parity) {
    Barrier& state = barriers_.at(barrier);
    if (state.phases % 2 != parity) return;
    if (!state.phase_is_open || state.missing != 0) throw std::logic_error("waits for ever");
    for (const Copy& copy : state.copies) copy.arrive();
    state.copies.clear();
    state.phase_is_open = false;
    ++state.phases;
  }

 private:
  template <class F>
  void copy_box(unsigned char* shared, uint64_t* barrier, BoxNumbers numbers, int c,
                int64_t columns, int rows, const F& row_at) {
    Barrier& state = barriers_.at(barrier);
    if (reinterpret_cast<uintptr_t>(shared) % 1024 != 0) throw std::logic_error("alignment");
    const int size = bytes_of(numbers);
    for (int i = 0; i < rows; ++i) {
      const unsigned char* const row = row_at(i);
      for (int chunk = 0; chunk < 8; ++chunk) {
        Copy copy{shared + i * 128 + (chunk ^ (i & 7)) * 16, 16, {}};
        for (int j = 0; j < 16 / size; ++j) {
          const int64_t at = c + chunk * (16 / size) + j;
          if (row == nullptr || at < 0 || at >= columns) continue;
          unsigned char* const to = copy.data.data() + j * size;
          std::memcpy(to, row + at * size, static_cast<size_t>(size));
          if (numbers == BoxNumbers::tf32) {
            uint32_t bits;
            std::memcpy(&bits, to, 4);
            const float rounded = element<float>(bits, 0);
            std::memcpy(to, &rounded, 4);
          }
        }
        random_ = random_ * 1664525 + 1013904223;
        if (random_ >> 31 != 0) {
          copy.arrive();
        } else {
          state.copies.push_back(copy);
        }
      }
    }
    state.missing -= rows * 128;
  }

  // The manual's canonical layouts with the swizzle of 128 bytes: 8 rows of 128 bytes lie together,
  // and bits 4 to 6 of an address are changed by bits 7 to 9.
  template <class scalar_t, bool transposed>
  static scalar_t shared_element(const unsigned char* start, int row, int k, int leading) {
    constexpr int size = sizeof(scalar_t);
    const int bytes = transposed ? row / 64 * leading + k / 8 * 1024 + k % 8 * 128 + row % 64 * size
                                 : row / 8 * 1024 + row % 8 * 128 + k * size;
    auto address = reinterpret_cast<uintptr_t>(start) + static_cast<uintptr_t>(bytes);
    address ^= (address >> 7 & 7) << 4;
    scalar_t value;
    std::memcpy(&value, reinterpret_cast<const void*>(address), sizeof(value));
    return value;
  }

  struct Copy {
    void* to;
    size_t bytes;
    std::array<unsigned char, 16> data;
    void arrive() const { std::memcpy(to, data.data(), bytes); }
  };

  template <class scalar_t>
  static float element(uint32_t bits, int i) {
    scalar_t value;
    if constexpr (std::is_same_v<scalar_t, float>) {
      bits = (bits + 0x1000) & ~uint32_t(0x1fff);  // TF32: ten bits of mantissa
      std::memcpy(&value, &bits, 4);
    } else {
      std::memcpy(&value, reinterpret_cast<const unsigned char*>(&bits) + 2 * i, 2);
    }
    return static_cast<float>(value);
  }

  std::vector<Copy> open_;
  std::vector<std::vector<Copy>> batches_;
  std::vector<std::function<void()>> products_;  // of the open batch
  std::vector<std::vector<std::function<void()>>> batches_of_products_;
  struct Barrier {
    int phases = 0, missing = 0;  // phases that have ended; bytes of the one that is open
    bool phase_is_open = false;
    std::vector<Copy> copies;
  };
  std::map<uint64_t*, Barrier> barriers_;
  bool late_ = false;
  uint32_t random_;
};

template <class Tiles>
void for_each_tile(const Tiles& tiles) {
  static_assert(Tiles::kThreads == Block::kThreads);
  ++launches_by_name[typeid(Tiles).name()];
  for (int64_t tile = 0; tile < tiles.count(); ++tile) {
    // All ones: not a number, wherever memory is read that nobody wrote.
    std::vector<unsigned char> memory(Tiles::kSharedBytes + 1024, 0xff);
    void* shared = memory.data();
    size_t space = memory.size();
    std::align(1024, Tiles::kSharedBytes, shared, space);
    Block block(tile);
    tiles(block, static_cast<unsigned char*>(shared), tile);
  }
}

}  // namespace dlops::cuda
