// Divider against the division that it stands for. Exits with 1 where they differ.
#include "cuda/divider.h"

#include <cstdint>
#include <initializer_list>
#include <iostream>
#include <random>

int main() {
  std::mt19937_64 random(1);
  int64_t wrong = 0;
  const auto check = [&](int64_t value, int64_t divisor) {
    if (value < 0 || dlops::cuda::Divider(divisor)(value) == value / divisor) return;
    if (++wrong <= 5) std::cout << value << " / " << divisor << "\n";
  };
  constexpr int64_t most = (int64_t(1) << 31) - 1;  // that is divided in 32 bits
  for (int64_t divisor = 1; divisor < 3000; ++divisor)
    for (const int64_t multiple :
         {int64_t(0), divisor, 2 * divisor, most / divisor * divisor, most})
      for (int64_t step = -1; step <= 1; ++step) check(multiple + step, divisor);
  for (int i = 0; i < 5'000'000; ++i) {
    // Numbers of any length.
    const auto value = static_cast<int64_t>(random() >> (1 + random() % 63));
    const auto divisor = static_cast<int64_t>(random() >> (1 + random() % 63));
    check(value, divisor + 1 > 0 ? divisor + 1 : 1);
  }
  return wrong == 0 ? 0 : 1;
}
