// Max pooling over ranges of rows: of one plane (contiguous) or of one image (channels_last).
//
// cell_t is uint8_t for windows of at most 256 cells and int64_t above. `cells` may be null in the
// forward functions: then only the values are computed.
#pragma once

#include <cstdint>

#include "max_pool2d_math.h"

namespace dlops::cpu {

// Bytes of working memory for one thread of the functions that take `scratch`.
template <int capability, class scalar_t, class cell_t>
int64_t max_pool2d_scratch(const Pool2dGeometry& g);

// Output rows [oh0, oh1) of a plane, or all rows of several. `input`, `output` and `cells` point to
// the first one.
template <int capability, class scalar_t, class cell_t>
void max_pool2d_rows(const Pool2dGeometry& g, int64_t planes, int64_t oh0, int64_t oh1,
                     const scalar_t* input, scalar_t* output, cell_t* cells, void* scratch);
// Output rows [oh0, oh1) of a channels_last image.
template <int capability, class scalar_t, class cell_t>
void max_pool2d_rows_last(const Pool2dGeometry& g, int64_t oh0, int64_t oh1, const scalar_t* input,
                          scalar_t* output, cell_t* cells);

// Input rows [ih0, ih1) of the backward: each input gathers from the windows that chose it, in a
// fixed order, and is written once.
template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows(const Pool2dGeometry& g, int64_t planes, int64_t ih0, int64_t ih1,
                             const scalar_t* grad_output, const cell_t* cells, scalar_t* grad_input,
                             void* scratch);
template <int capability, class scalar_t, class cell_t>
void max_pool2d_scatter_rows_last(const Pool2dGeometry& g, int64_t ih0, int64_t ih1,
                                  const scalar_t* grad_output, const cell_t* cells,
                                  scalar_t* grad_input);

// The same where `side_by_side(g)`: forward and backward of planes, backward of an image, this by
// output rows [oh0, oh1).
inline bool side_by_side(const Pool2dGeometry& g) {
  return g.kernel_h == 2 && g.kernel_w == 2 && g.stride_h == 2 && g.stride_w == 2 &&
         g.dilation_h == 1 && g.dilation_w == 1 && g.pad_h == 0 && g.pad_w == 0 &&
         2 * g.OH <= g.H && 2 * g.OW <= g.W && g.first_cell == 0 && g.cell_step == 2;
}
template <int capability, class scalar_t>
void max_pool2d_pairs(const Pool2dGeometry& g, int64_t planes, int64_t oh0, int64_t oh1,
                      const scalar_t* input, scalar_t* output, uint8_t* cells);
template <int capability, class scalar_t>
void max_pool2d_scatter_pairs(const Pool2dGeometry& g, int64_t planes, int64_t ih0, int64_t ih1,
                              const scalar_t* grad_output, const uint8_t* cells,
                              scalar_t* grad_input);
template <int capability, class scalar_t>
void max_pool2d_scatter_pairs_last(const Pool2dGeometry& g, int64_t oh0, int64_t oh1,
                                   const scalar_t* grad_output, const uint8_t* cells,
                                   scalar_t* grad_input);

}  // namespace dlops::cpu
