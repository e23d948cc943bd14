// The convolution as a GEMM that reads its rows through pointers: how weights are cut into packed
// matrices, shared by packing and running. See conv.h.
#pragma once

#include "csrc/conv/conv.h"

namespace qk {

// How one phase becomes a GEMM: rows are output pixels, columns output channels of one set.
struct GemmPlan {
  bool runs;  // a row of the window is one contiguous run of taps * channels bytes
  // Runs of whole AMX tiles, read from a padded copy of the image: no window overhangs it, and what
  // follows a short run in its tile meets weights that count as zero.
  bool padded_image;
  int64_t taps, depth;
};

// Shorter runs than the least fill a tile too poorly: there the copies of the GEMM are faster.
inline constexpr int64_t kAmxTileDepth = 64, kLeastPaddedDepth = 16;

inline GemmPlan gemm_plan(const ConvShape& shape, const ConvPhase& phase, int64_t groups_in_set,
                          Isa isa) {
  const int64_t rows = phase.dim[0].taps * phase.dim[1].taps, columns = phase.dim[2].taps;
  const bool runs = shape.groups == 1 && columns > 1 && phase.dim[2].in_dilation == 1;
  if (!runs) return {false, false, rows * columns, groups_in_set * shape.in_per_group()};
  const int64_t depth = columns * shape.in_channels;
  const bool tiles =
      depth % kAmxTileDepth == 0 || (depth < kAmxTileDepth && depth >= kLeastPaddedDepth);
  const bool padded_image = isa == Isa::kAmx && !shape.transposed && tiles;
  return {true, padded_image, rows, padded_image && depth < kAmxTileDepth ? kAmxTileDepth : depth};
}

// Narrow groups are merged, block-diagonally, until they fill a vector of outputs.
inline int64_t groups_per_set(const ConvShape& shape, Isa isa) {
  const int64_t fit = panel_shape(isa).lanes / shape.out_per_group();
  const int64_t merged = fit < 1 ? 1 : fit;
  return merged < shape.groups ? merged : shape.groups;
}

// The groups of set `s`: the last set may have fewer.
inline int64_t groups_in_set(const ConvShape& shape, int64_t per_set, int64_t s) {
  const int64_t left = shape.groups - s * per_set;
  return left < per_set ? left : per_set;
}

// Writes all outputs as if their accumulator were zero: for those that no phase reaches. Uses the
// first kFillBytes of the workspace.
inline constexpr int64_t kFillBytes = 64;
void fill_outputs(const ConvArgs& args, const Parallel& parallel);

int64_t implicit_gemm_workspace_bytes(const ConvArgs& args, const Parallel& parallel);
void implicit_gemm(const ConvArgs& args, const Parallel& parallel);

}  // namespace qk
