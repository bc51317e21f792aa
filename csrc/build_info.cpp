// The facts that a bug report needs. The DLOPS_* macros come from setup.py.
#include "build_info.h"

#include <ATen/Version.h>
#include <torch/version.h>

#include <string>

#include "cpu/capability.h"

namespace dlops {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "g++ " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = DLOPS_VERSION;
  info["torch"] = TORCH_VERSION;
  info["torch_built_with"] = DLOPS_TORCH_VERSION;
  info["python_built_with"] = PY_VERSION;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["cpu_capability"] = cpu::capability_name(cpu::capability());
  info["cpu_capabilities_built"] = DLOPS_CPU_CAPABILITIES;
#if defined(_OPENMP)
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#if defined(DLOPS_WITH_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  // Why CUDA was left out; empty where it is in.
  info["cuda_reason"] = DLOPS_CUDA_REASON;
  info["cuda_version"] = DLOPS_CUDA_VERSION;
  info["cuda_arch_list"] = DLOPS_CUDA_ARCH_LIST;
  return info;
}

}  // namespace dlops
