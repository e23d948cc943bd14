// How one phase of a convolution is cut: output pixels into blocks, blocks and panels into shares
// of the threads, and the padded copy of the image that its rows may be read from.
#pragma once

#include "csrc/base/integers.h"
#include "csrc/conv/implicit_gemm.h"

namespace qk {

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t clamp(int64_t v, int64_t low, int64_t high) {
  return v < low ? low : v > high ? high : v;
}

// Rows of the image with `left` pixels of padding before them, in the workspace. Joined rows follow
// each other without a gap, with `top` rows of padding before those of an image: then all pixels of
// an image are evenly spaced.
struct PaddedImage {
  int64_t left = 0, pixels = 0, row_bytes = 0, rows = 0;
  bool joined = false;
  int64_t top = 0, image_rows = 0, slack = 0;
  int64_t bytes() const { return align_up(rows * row_bytes + slack); }
};

// One phase of one call.
struct PhaseRun {
  ConvPhase phase;
  GemmPlan plan;
  int64_t count[kConvDims];  // outputs in each dimension
  int64_t pixels;
  int64_t inner_begin, inner_end;  // outputs of a row whose windows lie inside the image
  bool direct;                     // the input is the matrix A
  int64_t block;                   // pixels in a block
  int64_t blocks;
  int64_t row_parts, column_parts;  // shares of the threads: of the blocks, of the panels
  int64_t windows;                  // most windows that a block copies
  PaddedImage image;
};

// Outputs j of [0, count) with 0 <= position(j, tap) < in: [*begin, *end).
inline void inner_range(const DimPhase& dim, int64_t first_tap, int64_t last_tap, int64_t in,
                        int64_t count, int64_t* begin, int64_t* end) {
  const int64_t low = dim.position(0, first_tap), high = in - 1 - dim.position(0, last_tap);
  *begin = clamp(low >= 0 ? 0 : ceil_div(-low, dim.in_stride), 0, count);
  *end = clamp(high < 0 ? 0 : high / dim.in_stride + 1, *begin, count);
}

// Panels of all sets of a phase, counted through: the columns that tasks share out.
int64_t panels_of_phase(const PackedConvHeader& packed);

PhaseRun phase_run(const ConvArgs& args, int64_t index, int64_t threads);

}  // namespace qk
