#include "cpu/capability.h"

#include <ATen/Version.h>

#include <string>

namespace dlops::cpu {

Capability capability() {
  static const Capability found = [] {
#if defined(__x86_64__)
    const std::string name = at::get_cpu_capability();
    if (name.rfind("AVX512", 0) == 0) return kAvx512;
    if (name.rfind("AVX2", 0) == 0) return kAvx2;
#endif
    return kBaseline;
  }();
  return found;
}

const char* capability_name(Capability capability) {
  switch (capability) {
    case kAvx512:
      return "AVX512";
    case kAvx2:
      return "AVX2";
    default:
      return "baseline";
  }
}

}  // namespace dlops::cpu
