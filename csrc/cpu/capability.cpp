#include "cpu/capability.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <string>

namespace dlops::cpu {

namespace {

Capability of_machine() {
#if defined(__x86_64__)
  const std::string name = at::get_cpu_capability();
  if (name.rfind("AVX512", 0) == 0) return kAvx512;
  if (name.rfind("AVX2", 0) == 0) return kAvx2;
#endif
  return kBaseline;
}

}  // namespace

Capability capability() {
  static const Capability found = [] {
#if defined(DLOPS_ONLY_CAPABILITY)
    constexpr auto only = static_cast<Capability>(DLOPS_ONLY_CAPABILITY);
    TORCH_CHECK(of_machine() >= only, "dlops was built for ", capability_name(only),
                " alone (DLOPS_CPU_CAPABILITY), this process has ", capability_name(of_machine()));
    return only;
#else
    return of_machine();
#endif
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
