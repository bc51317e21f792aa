// Division by a number that is known before the launch: what an index takes to become positions.
// Free of torch, host and device.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace dlops::cuda {

// A division of 64 bits takes a GPU a hundred instructions, one of 32 some twenty; by a constant it
// is a product's upper half and a shift (Granlund and Montgomery, 1994).
class Divider {
 public:
  Divider() : Divider(1) {}
  explicit Divider(int64_t divisor) : divisor_(divisor) {
    if (divisor < 1 || divisor >> 31 != 0) return;  // 0: of an empty tensor, not used
    while ((uint64_t(1) << shift_) < static_cast<uint64_t>(divisor)) ++shift_;
    const uint64_t excess = (uint64_t(1) << shift_) - static_cast<uint64_t>(divisor);
    factor_ = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(divisor) + 1);
  }

  DLOPS_HOST_DEVICE int64_t divisor() const { return divisor_; }

  // value / divisor, for value >= 0.
  DLOPS_HOST_DEVICE int64_t operator()(int64_t value) const {
    if ((value | divisor_) >> 31 != 0) return value / divisor_;
    const auto low = static_cast<uint32_t>(value);
    const auto upper = static_cast<uint32_t>(uint64_t(low) * factor_ >> 32);
    return static_cast<int64_t>((upper + low) >> shift_);
  }
  // The quotient; `value` becomes the remainder.
  DLOPS_HOST_DEVICE int64_t split(int64_t& value) const {
    const int64_t quotient = (*this)(value);
    value -= quotient * divisor_;
    return quotient;
  }

 private:
  int64_t divisor_;
  uint32_t factor_ = 0, shift_ = 0;
};

}  // namespace dlops::cuda
