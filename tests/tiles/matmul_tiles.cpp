// The product by tiles against its definition, on small integers, over random shapes and strides.
#include "cpu/matmul_tiles.h"

#include <cstdio>
#include <limits>
#include <random>
#include <vector>

using c10::BFloat16;
using namespace dlops::cpu;

namespace {

std::mt19937 generator(1);

int64_t number(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(generator);
}

// Memory of exactly `size` numbers among others that are not: whatever is read or written beyond
// shows, in the results or to a sanitizer.
template <class T>
std::vector<T> numbers(int64_t size) {
  std::vector<T> result(static_cast<size_t>(size));
  for (T& x : result) x = static_cast<T>(static_cast<float>(number(-3, 3)));
  return result;
}

// Whether one random product is right.
bool check() {
  const int64_t m = number(1, 70), n = number(1, 70), k = number(0, 60) * 2;
  const int64_t lda = number(0, 3) == 0 ? number(1, 8) : k + number(0, 9);  // rows may overlap
  const int64_t ldb = n + number(0, 5), ldc = n + number(0, 5), shift = number(0, 4);
  const auto count = static_cast<size_t>(number(1, 3));
  std::vector<std::vector<BFloat16>> a, b;
  std::vector<Factors<BFloat16>> factors;
  for (size_t f = 0; f < count; ++f) {
    a.push_back(numbers<BFloat16>(shift + (m - 1) * lda + k + 1));
    b.push_back(numbers<BFloat16>(k == 0 ? 1 : ((k / 2 - 1) * ldb + n) * 2));
  }
  for (size_t f = 0; f < count; ++f) factors.push_back({a[f].data(), b[f].data()});
  std::vector<float> c = numbers<float>((m - 1) * ldc + n), bias = numbers<float>(n);
  std::vector<float> expected = c;
  const int64_t kind = number(0, 2);
  const Addend<float> before = kind == 0   ? Addend<float>{}
                               : kind == 1 ? Addend<float>{c.data(), ldc}
                                           : Addend<float>{bias.data(), 0};
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      float sum = before.data == nullptr ? 0 : before.data[i * before.ld + j];
      for (const Factors<BFloat16>& f : factors)
        for (int64_t t = 0; t < k; ++t)
          sum += static_cast<float>(f.a[shift + i * lda + t]) *
                 static_cast<float>(f.b[(t / 2 * ldb + j) * 2 + t % 2]);
      expected[static_cast<size_t>(i * ldc + j)] = sum;
    }
  }
  matmul_of_tiles(m, n, k, factors.data(), static_cast<int64_t>(count),
                  {.lda = lda, .ldb = ldb, .shift = shift}, c.data(), ldc, before);
  if (c == expected) return true;
  std::printf("wrong: %ld x %ld x %ld, lda %ld, ldb %ld, ldc %ld\n", static_cast<long>(m),
              static_cast<long>(n), static_cast<long>(k), static_cast<long>(lda),
              static_cast<long>(ldb), static_cast<long>(ldc));
  return false;
}

}  // namespace

int main() {
  for (int i = 0; i < 1000; ++i)
    if (!check()) return 1;
  return 0;
}
