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
#include <limits>
#include <type_traits>

using c10::BFloat16;
using c10::Half;
using namespace dlops::cpu;

namespace {

// Many different numbers that every type holds.
template <class T>
T number(int64_t i) {
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>) {
    return static_cast<T>(static_cast<float>(i % 251 - 125));
  } else {
    return static_cast<T>(static_cast<int8_t>(i % 251 - 125));
  }
}

// Elements that end where memory does: whoever reads or writes beyond them crashes.
template <class T>
class Elements {
 public:
  explicit Elements(int64_t count) : page_(sysconf(_SC_PAGESIZE)), count_(count) {
    bytes_ = (count * static_cast<int64_t>(sizeof(T)) + page_ - 1) / page_ * page_;
    void* memory = mmap(nullptr, static_cast<size_t>(bytes_ + page_), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memory_ = static_cast<char*>(memory);
    mprotect(memory_ + bytes_, static_cast<size_t>(page_), PROT_NONE);
  }
  ~Elements() { munmap(memory_, static_cast<size_t>(bytes_ + page_)); }
  Elements(const Elements&) = delete;
  Elements& operator=(const Elements&) = delete;

  T* data() { return end() - count_; }
  T* end() { return reinterpret_cast<T*>(memory_ + bytes_); }
  T& operator[](int64_t i) { return data()[i]; }

 private:
  int64_t page_, count_, bytes_;
  char* memory_;
};

template <class from_t, class to_t>
bool check(int64_t rows, int64_t cols, int64_t apart) {
  const int64_t from_ld = cols + apart, to_ld = rows + apart;
  const int64_t from_size = (rows - 1) * from_ld + cols, to_size = (cols - 1) * to_ld + rows;
  Elements<from_t> from(from_size);
  Elements<to_t> to(to_size), expected(to_size);
  for (int64_t i = 0; i < from_size; ++i) from[i] = number<from_t>(i);
  std::fill(to.data(), to.end(), number<to_t>(7));
  std::fill(expected.data(), expected.end(), number<to_t>(7));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) expected[j * to_ld + i] = number<to_t>(i * from_ld + j);
  transpose<DLOPS_CAPABILITY>(from.data(), from_ld, rows, cols, to.data(), to_ld);
  if (std::equal(to.data(), to.end(), expected.data())) return true;
  std::printf("wrong: %s, %lld x %lld, rows %lld apart\n", __PRETTY_FUNCTION__,
              static_cast<long long>(rows), static_cast<long long>(cols),
              static_cast<long long>(apart));
  return false;
}

template <class from_t, class to_t>
bool check_all() {
  bool right = true;
  for (int64_t rows = 1; rows <= 35; ++rows)
    for (int64_t cols = 1; cols <= 35; ++cols)
      right = check<from_t, to_t>(rows, cols, (rows + cols) % 3) && right;
  return right;
}

bool check_pairs() {
  constexpr int64_t rows = 19, cols = 37, size = 2 * rows * cols;
  Elements<BFloat16> from(size), to(size);
  for (int64_t i = 0; i < size; ++i) from[i] = number<BFloat16>(i);
  transpose_pairs<DLOPS_CAPABILITY>(from.data(), cols, rows, cols, to.data(), rows);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      for (int64_t e = 0; e < 2; ++e)
        if (to[2 * (j * rows + i) + e] != from[2 * (i * cols + j) + e]) return false;
  return true;
}

// Bits are moved, whatever they mean; of numbers that are converted NaN stay NaN.
bool check_special() {
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              inf = std::numeric_limits<float>::infinity();
  const float from[4] = {nan, -inf, 1.00390625f, -0.f};  // the third lies between two bfloat16
  BFloat16 to[4];
  transpose<DLOPS_CAPABILITY>(from, 2, 2, 2, to, 2);
  return to[0] != to[0] && to[2] == BFloat16(-inf) && to[1] == BFloat16(1.f) && to[3].x == 0x8000;
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
                        check_pairs(),
                        check_special()};
  for (const bool each : right)
    if (!each) return 1;
  return 0;
}
