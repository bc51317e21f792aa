// Matrices turned round against the definition, of every small size and type, with nothing read or
// written beyond them.
#include "cpu/simd/transpose.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <span>
#include <type_traits>

using c10::BFloat16;
using c10::Half;
using namespace dlops::cpu;

namespace {

std::mt19937 generator(1);

// Elements that end where memory does: whoever reads or writes beyond them crashes.
template <class T>
class Elements {
 public:
  explicit Elements(int64_t count)
      : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), count_(static_cast<size_t>(count)) {
    size_ = (count_ * sizeof(T) + page_ - 1) / page_ * page_;
    void* memory =
        mmap(nullptr, size_ + page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory_ = static_cast<char*>(memory);
    if (memory == MAP_FAILED || mprotect(memory_ + size_, page_, PROT_NONE) != 0) std::abort();
  }
  ~Elements() { munmap(memory_, size_ + page_); }
  Elements(const Elements&) = delete;
  Elements& operator=(const Elements&) = delete;

  T* data() { return end() - count_; }
  T* end() { return reinterpret_cast<T*>(memory_ + size_); }
  T& operator[](int64_t i) { return data()[i]; }
  std::span<char> bytes() { return {memory_, size_}; }  // what comes before them included
  std::span<char> before() { return {memory_, size_ - count_ * sizeof(T)}; }

 private:
  size_t page_, count_, size_;
  char* memory_;
};

// Bits of any meaning: NaN with payloads, infinities and subnormal numbers.
template <class T>
void fill(Elements<T>& elements) {
  for (char& byte : elements.bytes()) byte = static_cast<char>(generator());
}

template <class T>
bool same(T a, T b) {
  if constexpr (std::is_floating_point_v<T> || sizeof(T) == 2) {
    if (a != a && b != b) return true;
  }
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <class from_t, class to_t>
bool check(int64_t rows, int64_t cols, int64_t apart) {
  const int64_t from_ld = cols + apart, to_ld = rows + apart;
  Elements<from_t> from((rows - 1) * from_ld + cols);
  Elements<to_t> to((cols - 1) * to_ld + rows), expected((cols - 1) * to_ld + rows);
  fill(from);
  fill(to);
  std::ranges::copy(to.bytes(), expected.bytes().begin());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      if constexpr (std::is_same_v<from_t, to_t>) {
        std::memcpy(&expected[j * to_ld + i], &from[i * from_ld + j], sizeof(to_t));
      } else {
        expected[j * to_ld + i] = static_cast<to_t>(from[i * from_ld + j]);
      }
    }
  }
  transpose<DLOPS_CAPABILITY>(from.data(), from_ld, rows, cols, to.data(), to_ld);
  bool right = std::ranges::equal(to.before(), expected.before());
  if constexpr (std::is_same_v<from_t, to_t>) {
    right = right && std::ranges::equal(to.bytes(), expected.bytes());
  } else {
    right = right && std::equal(to.data(), to.end(), expected.data(), same<to_t>);
  }
  if (!right)
    std::printf("wrong: %s, %lld x %lld, rows %lld apart\n", __PRETTY_FUNCTION__,
                static_cast<long long>(rows), static_cast<long long>(cols),
                static_cast<long long>(apart));
  return right;
}

template <class from_t, class to_t>
bool check_all() {
  bool right = true;
  for (int64_t rows = 1; rows <= 35; ++rows)
    for (int64_t cols = 1; cols <= 35; ++cols)
      right = check<from_t, to_t>(rows, cols, (rows + cols) % 3) && right;
  return right;
}

bool check_pairs(int64_t rows, int64_t cols) {
  const int64_t size = 2 * rows * cols;
  Elements<BFloat16> from(size), to(size);
  fill(from);
  transpose_pairs<DLOPS_CAPABILITY>(from.data(), cols, rows, cols, to.data(), rows);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      if (std::memcmp(&to[2 * (j * rows + i)], &from[2 * (i * cols + j)], 2 * sizeof(BFloat16))) {
        std::printf("wrong: pairs, %lld x %lld\n", static_cast<long long>(rows),
                    static_cast<long long>(cols));
        return false;
      }
  return true;
}

}  // namespace

int main() {
  const bool right[] = {check_all<float, float>(),
                        check_all<double, double>(),
                        check_all<c10::complex<float>, c10::complex<float>>(),
                        check_all<c10::complex<double>, c10::complex<double>>(),
                        check_all<int64_t, int64_t>(),
                        check_all<int32_t, int32_t>(),
                        check_all<int16_t, int16_t>(),
                        check_all<int8_t, int8_t>(),
                        check_all<uint8_t, uint8_t>(),
                        check_all<BFloat16, BFloat16>(),
                        check_all<BFloat16, float>(),
                        check_all<float, BFloat16>(),
                        check_all<Half, Half>(),
                        check_all<Half, float>(),
                        check_all<float, Half>(),
                        check_pairs(19, 37),
                        check_pairs(3, 5)};
  for (const bool each : right)
    if (!each) return 1;
  return 0;
}
