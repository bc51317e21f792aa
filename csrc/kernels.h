#pragma once

#include <pybind11/pybind11.h>

namespace dlops {
// Adds the module `kernels` to dlops._C.
void add_kernels(pybind11::module_& m);
}  // namespace dlops
