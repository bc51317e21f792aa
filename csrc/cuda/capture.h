// Which CUDA graph, if any, the work on a device's current stream goes into. Host code alone.
#pragma once

#include <cstdint>

namespace dlops::cuda {

// A number of its own for each capture; 0: work runs at once.
uint64_t capture(int device);

}  // namespace dlops::cuda
