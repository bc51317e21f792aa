#include "cpu/conv2d_pairs_weight.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/conv2d_pairs_sums.h"
#include "cpu/conv2d_planes.h"
#include "cpu/conv2d_strip_copies.h"
#include "cpu/matmul.h"
#include "cpu/simd/conv2d_planes.h"
#include "cpu/simd/transpose.h"

namespace dlops::cpu {
namespace {

using c10::BFloat16;

// Of a unit, in elements: half of a second-level cache of 1 MiB.
constexpr int64_t kUnitElements = 256 * 1024;
constexpr int64_t kBlock = PairSums::kBlock;

// Images and output rows whose planes and gradients are in cache together.
struct Unit {
  int64_t image, images, row, rows;
  int64_t plane;  // elements of a channel's planes
  int64_t pairs;  // of pixels of an image
};

// Few channels make thin products, a chain of dependent additions each: then all cells are rows of
// one, for which their shifts of the planes are copied.
bool copies_cells(const Conv2dGeometry& g) { return has_few_channels(g); }

// How a batch is cut into units. It depends on the shapes alone.
struct Cut {
  int64_t rows, images, strips, units;
  Cut(const Conv2dGeometry& g, const PlaneLayout& layout) {
    const int64_t image = elements(g, layout, g.OH);
    rows = g.OH;
    images = 1;
    if (image <= kUnitElements) {
      const int64_t tasks = PairSums::tasks_per_block(g);
      const int64_t fitting = std::min(kUnitElements / image, ceil_div(g.N, tasks));
      images = ceil_div(g.N, ceil_div(g.N, fitting));
    } else {
      const int64_t margins = elements(g, layout, 0), row = elements(g, layout, 1) - margins;
      const int64_t fitting = std::max<int64_t>(1, (kUnitElements - margins) / row);
      rows = ceil_div(g.OH, ceil_div(g.OH, std::min(fitting, g.OH)));
    }
    strips = ceil_div(g.OH, rows);
    units = ceil_div(g.N, images) * strips;
  }
  // The planes and the gradient of some output rows of an image.
  static int64_t elements(const Conv2dGeometry& g, const PlaneLayout& layout, int64_t rows) {
    const int64_t copies = copies_cells(g) ? g.column_rows() : 0;
    return g.channels_per_group() * layout.channel_size(rows) +
           (g.outputs_per_group() + copies) * rows * layout.pitch;
  }
};

class PlanesByPairs {
 public:
  PlanesByPairs(const Conv2dGeometry& g, const at::Tensor& grad_output, const at::Tensor& input,
                bool last)
      : g_(g),
        layout_(PlaneLayout::with_shared_zeros(g)),
        rows_(forward_axis(g.OH, g.H, g.R, g.stride_h, g.pad_top, g.dilation_h)),
        cut_(g, layout_),
        grad_{grad_output.const_data_ptr<BFloat16>(), g.O, g.OH, g.OW, last},
        input_{input.const_data_ptr<BFloat16>(), g.C, g.H, g.W, last},
        sums_(g, cut_.units) {}

  template <class result_t>
  bool run(result_t* result, bool last) {
    std::atomic<bool> finite = true;
    sums_.fill([&](const auto& each) {
      Scratch scratch(
          Scratch::size<BFloat16>(planes_size()) + Scratch::size<BFloat16>(pairs_size()) +
          Scratch::size<BFloat16>(space_size()) + Scratch::size<BFloat16>(cells_size()));
      const Space space{scratch.take<BFloat16>(planes_size()), scratch.take<BFloat16>(pairs_size()),
                        scratch.take<BFloat16>(space_size()), scratch.take<BFloat16>(cells_size())};
      each([&](int64_t chunk, int64_t group, int64_t unit, Interval blocks, bool first) {
        if (finite && !add_unit(chunk, group, unit, blocks, first, space)) finite = false;
      });
    });
    if (finite) sums_.finish(result, last);
    return finite;
  }

 private:
  struct Space {
    BFloat16 *planes, *pairs, *rows, *cells;
  };

  int64_t channels() const { return g_.channels_per_group(); }
  int64_t outputs() const { return g_.outputs_per_group(); }
  int64_t pairs(int64_t rows) const {
    return ceil_div((rows - 1) * layout_.pitch + g_.OW, int64_t{2});
  }
  // The rows of the input that output rows meet.
  Interval input_rows(int64_t row, int64_t rows) const {
    const int64_t first = row * g_.stride_h - g_.pad_top;
    const int64_t end = (row + rows + layout_.reach_h) * g_.stride_h - g_.pad_top;
    return intersect({first, std::max(first, end)}, {0, g_.H});
  }

  int64_t planes_size() const {
    return cut_.images * channels() * layout_.channel_size(cut_.rows) + kPlaneSlack;
  }
  int64_t pairs_size() const { return cut_.images * pairs(cut_.rows) * 2 * outputs() + kPadding; }
  int64_t space_size() const {
    const int64_t rows = std::min(g_.H, (cut_.rows + layout_.reach_h) * g_.stride_h);
    const int64_t grad = kBlock * pairs(cut_.rows) * 2 + layout_.pitch;
    return (input_.last ? std::max(rows * g_.W * channels(), kBlock) : grad) + kPlaneSlack;
  }

  int64_t cells_size() const {
    return copies_cells(g_) ? cut_.images * cell_rows() * pairs(cut_.rows) * 2 : 0;
  }
  // Of all cells' products.
  int64_t cell_rows() const { return sums_.cells() * channels(); }

  // False if one of its numbers is not finite.
  bool add_unit(int64_t chunk, int64_t group, int64_t index, Interval blocks, bool first,
                Space space) const {
    Unit unit;
    unit.image = index / cut_.strips * cut_.images;
    unit.images = std::min(g_.N - unit.image, cut_.images);
    unit.row = index % cut_.strips * cut_.rows;
    unit.rows = std::min(g_.OH - unit.row, cut_.rows);
    unit.plane = layout_.channel_size(unit.rows);
    unit.pairs = pairs(unit.rows);
    fill_planes(unit, group * channels(), space);
    BFloat16* to = space.pairs;
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      to = fill_pairs(unit, group * outputs() + block * kBlock, sums_.width(block), to, space.rows);
    const auto finite = DLOPS_SIMD(all_finite, BFloat16);
    if (!finite(space.planes, unit.images * channels() * unit.plane) ||
        !finite(space.pairs, to - space.pairs))
      return false;
    if (copies_cells(g_)) {
      copy_cells(unit, space);
      multiply(chunk, group, unit, blocks, first, space.pairs,
               {space.cells, cell_rows(), unit.pairs * 2});
    } else {
      multiply(chunk, group, unit, blocks, first, space.pairs,
               {space.planes, channels(), unit.plane});
    }
    return true;
  }

  // The phase planes as [image][channel].
  void fill_planes(const Unit& unit, int64_t c0, Space space) const {
    const auto flip = DLOPS_SIMD(transpose, BFloat16, BFloat16);
    const auto fill = DLOPS_SIMD(fill_phases, BFloat16, BFloat16);
    const Interval rows = input_rows(unit.row, unit.rows);
    const int64_t pixels = length(rows) * g_.W;
    BFloat16* to = space.planes;
    for (int64_t n = unit.image; n < unit.image + unit.images; ++n) {
      if (input_.last)
        flip(input_.at(n, c0, rows.begin, 0), g_.C, pixels, channels(), space.rows, pixels);
      for (int64_t c = 0; c < channels(); ++c, to += unit.plane) {
        const BFloat16* plane =
            input_.last ? space.rows + c * pixels - rows.begin * g_.W : input_.at(n, c0 + c, 0, 0);
        fill(g_, layout_, plane, unit.row, unit.rows, to);
      }
    }
    // Met by the last row of a plane, and by the odd pixel at its end.
    std::fill_n(to, kPlaneSlack, BFloat16(0));
  }

  // A block of the gradient as [image][pair of pixels][output][2], with zeros between its rows.
  BFloat16* fill_pairs(const Unit& unit, int64_t o0, int64_t width, BFloat16* to,
                       BFloat16* space) const {
    for (int64_t n = unit.image; n < unit.image + unit.images; ++n, to += unit.pairs * 2 * width) {
      if (grad_.last) {
        pair_pixels(unit, grad_.at(n, o0, unit.row, 0), width, to, space);
      } else {
        turn_pairs(unit, n, o0, width, to, space);
      }
    }
    return to;
  }
  void pair_pixels(const Unit& unit, const BFloat16* grad, int64_t width, BFloat16* to,
                   BFloat16* zeros) const {
    const auto join = DLOPS_SIMD(pair_rows, BFloat16);
    std::fill_n(zeros, width, BFloat16(0));
    const bool one = layout_.pitch == g_.OW;  // row goes on where the one before it ends
    const int64_t rows = one ? 1 : unit.rows, count = one ? unit.rows * g_.OW : g_.OW;
    int64_t pair = 0;  // that is filled next
    for (int64_t row = 0; row < rows; ++row, grad += count * g_.O) {
      const int64_t begin = row * layout_.pitch, odd = begin % 2, end = begin + count;
      std::fill(to + pair * 2 * width, to + begin / 2 * 2 * width, BFloat16(0));
      pair = begin / 2;
      if (odd == 1) join(zeros, grad, 0, 1, to + pair++ * 2 * width, width);
      const BFloat16* first = grad + odd * g_.O;
      join(first, first + g_.O, 2 * g_.O, end / 2 - pair, to + pair * 2 * width, width);
      pair = end / 2;
      if (end % 2 == 1)
        join(grad + (count - 1) * g_.O, zeros, 0, 1, to + pair++ * 2 * width, width);
    }
  }
  void turn_pairs(const Unit& unit, int64_t n, int64_t o0, int64_t width, BFloat16* to,
                  BFloat16* space) const {
    const auto fill = DLOPS_SIMD(fill_gradient, BFloat16, BFloat16);
    const auto turn = DLOPS_SIMD(transpose_pairs, BFloat16);
    // Whole vectors are written, beyond a plane's end: they are filled front to back.
    const int64_t pixels = unit.pairs * 2, met = (unit.rows - 1) * layout_.pitch + g_.OW;
    for (int64_t o = 0; o < width; ++o) {
      fill(g_, layout_, grad_.at(n, o0 + o, 0, 0), unit.row, unit.rows, space + o * pixels);
      std::fill(space + o * pixels + met, space + (o + 1) * pixels, BFloat16(0));
    }
    turn(space, unit.pairs, width, unit.pairs, to, width);
  }

  // The rows of all cells as [image][cell][channel].
  void copy_cells(const Unit& unit, Space space) const {
    BFloat16* to = space.cells;
    for (int64_t n = 0; n < unit.images; ++n) {
      for (int64_t i = 0; i < sums_.cells(); ++i) {
        const BFloat16* from = space.planes + n * channels() * unit.plane + offset(unit, i);
        for (int64_t c = 0; c < channels(); ++c, to += unit.pairs * 2)
          std::copy_n(from + c * unit.plane, unit.pairs * 2, to);
      }
    }
  }
  // Where the first pixel meets a cell.
  int64_t offset(const Unit& unit, int64_t i) const {
    return layout_.offset(g_, unit.rows, sums_.cell(i) / g_.S, sums_.cell(i) % g_.S);
  }

  // The left matrices of a unit's products: `rows` of an image, `ld` apart.
  struct Left {
    const BFloat16* data;
    int64_t rows, ld;
  };

  void multiply(int64_t chunk, int64_t group, const Unit& unit, Interval blocks, bool first,
                const BFloat16* b, Left left) const {
    const bool together = copies_cells(g_);
    for (int64_t i = 0; i < (together ? 1 : sums_.cells()); ++i) {
      const Interval pairs = together ? Interval{0, unit.pairs} : met_pairs(unit, sums_.cell(i));
      const int64_t shift = (together ? 0 : offset(unit, i)) + 2 * pairs.begin;
      const std::vector<Factors<BFloat16>> factors = factors_of(unit, blocks, pairs, b, left);
      for (int64_t c = 0; c < left.rows; c += kBlock) {
        const Factors<BFloat16>* images = factors.data();
        for (int64_t block = blocks.begin; block < blocks.end; ++block, images += unit.images) {
          float* to = sums_.at(chunk, group, i, c, block);
          matmul_of_factors(
              std::min(kBlock, left.rows - c), sums_.width(block), 2 * length(pairs), images,
              unit.images,
              {.lda = left.ld, .ldb = sums_.width(block), .shift = shift + c * left.ld}, to,
              sums_.ld(), first ? Addend<float>{} : Addend<float>{to, sums_.ld()});
        }
      }
    }
  }
  // Of all images, for each block.
  std::vector<Factors<BFloat16>> factors_of(const Unit& unit, Interval blocks, Interval pairs,
                                            const BFloat16* b, Left left) const {
    std::vector<Factors<BFloat16>> result;
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t pair = 2 * sums_.width(block);
      for (int64_t n = 0; n < unit.images; ++n, b += unit.pairs * pair)
        result.push_back({left.data + n * left.rows * left.ld, b + pairs.begin * pair});
    }
    return result;
  }
  // The pairs of a unit's pixels that have those which meet the image in a cell's row.
  Interval met_pairs(const Unit& unit, int64_t cell) const {
    const Interval inside = intersect(rows_.inside(cell / g_.S), {unit.row, unit.row + unit.rows});
    if (length(inside) == 0) return {0, 0};
    const int64_t begin = (inside.begin - unit.row) * layout_.pitch;
    const int64_t end = (inside.end - 1 - unit.row) * layout_.pitch + g_.OW;
    return {begin / 2, ceil_div(end, int64_t{2})};
  }

  const Conv2dGeometry& g_;
  const PlaneLayout layout_;
  const TapAxis rows_;
  const Cut cut_;
  const ImageView<BFloat16> grad_, input_;
  PairSums sums_;
};

// -------------------------------------------------------------------------- many small images

// Images of a unit, where products run over images; else 0.
int64_t many_images(const Conv2dGeometry& g) {
  constexpr int64_t kFewPixels = 36, kMany = 32;
  const int64_t image =
      g.H * g.W * g.channels_per_group() + g.output_pixels() * g.outputs_per_group();
  const int64_t tasks = PairSums::tasks_per_block(g);
  const int64_t fitting = std::min(kUnitElements * 3 / 2 / image, std::max(kMany, g.N / tasks));
  if (g.output_pixels() > kFewPixels || std::min(fitting, g.N) < kMany) return 0;
  return ceil_div(g.N, ceil_div(g.N, fitting));
}

// The depth of a product is the images, for each output pixel that a kernel cell meets.
class ImagesByPairs {
 public:
  ImagesByPairs(const Conv2dGeometry& g, const at::Tensor& grad_output, const at::Tensor& input,
                bool last, int64_t images)
      : g_(g),
        images_(images),
        depth_(ceil_div(images, int64_t{2}) * 2),
        grad_{grad_output.const_data_ptr<BFloat16>(), g.O, g.OH, g.OW, last},
        input_{input.const_data_ptr<BFloat16>(), g.C, g.H, g.W, last},
        sums_(g, ceil_div(g.N, images)) {}

  template <class result_t>
  void run(result_t* result, bool last) {
    sums_.fill([&](const auto& each) {
      Scratch scratch(Scratch::size<BFloat16>(input_size()) +
                      Scratch::size<BFloat16>(pairs_size()) +
                      Scratch::size<BFloat16>(space_size()));
      BFloat16* input = scratch.take<BFloat16>(input_size());
      BFloat16* pairs = scratch.take<BFloat16>(pairs_size());
      BFloat16* space = scratch.take<BFloat16>(space_size());
      each([&](int64_t chunk, int64_t group, int64_t unit, Interval blocks, bool first) {
        const int64_t n0 = unit * images_, count = std::min(g_.N, n0 + images_) - n0;
        turn_input(n0, count, group * channels(), input);
        for (int64_t block = blocks.begin; block < blocks.end; ++block)
          fill_pairs(n0, count, group * g_.outputs_per_group() + block * kBlock, sums_.width(block),
                     pairs + (block - blocks.begin) * block_size(), space);
        multiply(chunk, group, blocks, first, input, pairs);
      });
    });
    sums_.finish(result, last);
  }

 private:
  int64_t channels() const { return g_.channels_per_group(); }
  int64_t pixels() const { return g_.H * g_.W; }
  int64_t block_size() const { return g_.output_pixels() * depth_ * kBlock; }
  int64_t input_size() const { return pixels() * channels() * depth_; }
  int64_t pairs_size() const { return sums_.blocks() * block_size() + kPadding; }
  int64_t space_size() const { return 2 * g_.output_pixels() * kBlock; }

  // Images innermost: [channel][pixel][image], or channels_last [pixel][channel][image].
  void turn_input(int64_t n0, int64_t count, int64_t c0, BFloat16* to) const {
    const auto flip = DLOPS_SIMD(transpose, BFloat16, BFloat16);
    const int64_t image = g_.C * pixels();
    if (input_.last) {
      for (int64_t q = 0; q < pixels(); ++q)
        flip(input_.at(n0, c0, 0, 0) + q * g_.C, image, count, channels(),
             to + q * channels() * depth_, depth_);
    } else {
      flip(input_.at(n0, c0, 0, 0), image, count, channels() * pixels(), to, depth_);
    }
    if (count == depth_) return;
    for (int64_t i = 0; i < channels() * pixels(); ++i)
      std::fill(to + i * depth_ + count, to + (i + 1) * depth_, BFloat16(0));
  }

  // A block of the gradient as [pixel][pair of images][output][2].
  void fill_pairs(int64_t n0, int64_t count, int64_t o0, int64_t width, BFloat16* to,
                  BFloat16* space) const {
    const auto flip = DLOPS_SIMD(transpose, BFloat16, BFloat16);
    const auto join = DLOPS_SIMD(pair_rows, BFloat16);
    const int64_t P = g_.output_pixels();
    for (int64_t n = 0; n < depth_; n += 2) {
      const BFloat16* rows[2];
      for (int64_t i = 0; i < 2; ++i) {
        BFloat16* row = space + i * P * kBlock;
        rows[i] = row;
        if (n + i >= count) {
          std::fill_n(row, P * kBlock, BFloat16(0));
        } else if (grad_.last) {
          rows[i] = grad_.at(n0 + n + i, o0, 0, 0);
        } else {
          flip(grad_.at(n0 + n + i, o0, 0, 0), P, width, P, row, kBlock);
        }
      }
      for (int64_t p = 0; p < P; ++p) {
        const auto pixel = [&](int64_t i) {
          return rows[i] + p * (grad_.last && n + i < count ? g_.O : kBlock);
        };
        join(pixel(0), pixel(1), 0, 1, to + (p * depth_ + n) * kBlock, width);
      }
    }
  }

  void multiply(int64_t chunk, int64_t group, Interval blocks, bool first, const BFloat16* input,
                const BFloat16* pairs) const {
    const int64_t channel = input_.last ? depth_ : pixels() * depth_;
    for (int64_t i = 0; i < sums_.cells(); ++i) {
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        const std::vector<Factors<BFloat16>> met =
            meetings(sums_.cell(i), input, pairs + (block - blocks.begin) * block_size());
        for (int64_t c = 0; c < channels(); c += kBlock) {
          float* to = sums_.at(chunk, group, i, c, block);
          matmul_of_factors(std::min(kBlock, channels() - c), sums_.width(block), depth_,
                            met.data(), static_cast<int64_t>(met.size()),
                            {.lda = channel, .ldb = kBlock, .shift = c * channel}, to, sums_.ld(),
                            first ? Addend<float>{} : Addend<float>{to, sums_.ld()});
        }
      }
    }
  }

  // The pixels of the input that a kernel cell meets, and those of the gradient where it does.
  std::vector<Factors<BFloat16>> meetings(int64_t cell, const BFloat16* input,
                                          const BFloat16* pairs) const {
    const int64_t pixel = input_.last ? channels() * depth_ : depth_;
    const Interval inside = inside_columns(g_, cell % g_.S);
    std::vector<Factors<BFloat16>> result;
    for (int64_t y = 0; y < g_.OH; ++y) {
      const int64_t h = g_.input_row(y, cell / g_.S);
      if (!g_.row_inside(h)) continue;
      for (int64_t x = inside.begin; x < inside.end; ++x)
        result.push_back({input + (h * g_.W + g_.input_col(x, cell % g_.S)) * pixel,
                          pairs + (y * g_.OW + x) * depth_ * kBlock});
    }
    return result;
  }

  const Conv2dGeometry& g_;
  const int64_t images_, depth_;  // an even number of images
  const ImageView<BFloat16> grad_, input_;
  PairSums sums_;
};

}  // namespace

bool takes_pairs(const Conv2dGeometry& g, at::ScalarType dtype) {
  const PlaneLayout layout = PlaneLayout::with_shared_zeros(g);
  return dtype == at::kBFloat16 && multiplies_bfloat16() && !has_thin_groups(g) &&
         layout.compact(g) && Cut::elements(g, layout, 1) <= 4 * kUnitElements;
}

bool pairs_grad_weight(const Conv2dGeometry& g, const at::Tensor& grad_output,
                       const at::Tensor& input, const at::Tensor& grad_weight,
                       at::MemoryFormat format) {
  const bool last = format == at::MemoryFormat::ChannelsLast;
  const auto run = [&](auto* result) {
    if (const int64_t images = many_images(g); images > 0) {
      ImagesByPairs(g, grad_output, input, last, images).run(result, last);
      return true;
    }
    return PlanesByPairs(g, grad_output, input, last).run(result, last);
  };
  return grad_weight.scalar_type() == at::kFloat ? run(grad_weight.mutable_data_ptr<float>())
                                                 : run(grad_weight.mutable_data_ptr<BFloat16>());
}

}  // namespace dlops::cpu
