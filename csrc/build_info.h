#pragma once

#include <pybind11/pybind11.h>

namespace dlops {
pybind11::dict build_info();
}
