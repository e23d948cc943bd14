// The convolution as a GEMM that reads its rows through pointers: how weights are cut into packed
// matrices, shared by packing and running. See conv.h.
#pragma once

#include "csrc/conv/conv.h"

namespace qk {

// How one phase becomes a GEMM: rows are output pixels, columns output channels of one set.
struct GemmPlan {
  bool runs;  // a row of the window is one contiguous run of taps * channels bytes
  // Rows of A are the pixels of an output row, evenly spaced in a padded copy of the image (or,
  // without padding, in the image itself): AMX loads its tiles where they lie; AVX512-VNNI does so
  // with the few channels of a first layer, of which pointers and windows took a fifth.
  bool even_rows;
  bool padded_image;
  int64_t taps, depth;
};

// Elements from one pixel of the input, and of the output, to the next.
inline int64_t in_stride(const ConvArgs& args) {
  return args.in_pixel_stride > 0 ? args.in_pixel_stride : args.packed->shape.in_channels;
}
inline int64_t out_stride(const ConvArgs& args) {
  return args.out_pixel_stride > 0 ? args.out_pixel_stride : args.packed->shape.out_channels;
}

// Bytes of an output element.
inline int64_t out_element(const ConvArgs& args) {
  return stored_bytes(args.packed->epilogue, args.dequantized);
}

inline bool is_padded(const ConvShape& shape) {
  bool padded = false;
  for (int d = 0; d < kConvDims; ++d) padded |= shape.pad_lo[d] > 0 || shape.pad_hi[d] > 0;
  return padded;
}

inline GemmPlan gemm_plan(const ConvShape& shape, const ConvPhase& phase, int64_t groups_in_set,
                          Isa isa) {
  const int64_t rows = phase.dim[0].taps * phase.dim[1].taps, columns = phase.dim[2].taps;
  const int64_t channels = groups_in_set * shape.in_per_group();
  GemmPlan plan;
  plan.runs = shape.groups == 1 && columns > 1 && phase.dim[2].in_dilation == 1;
  plan.taps = plan.runs ? rows : rows * columns;
  plan.depth = plan.runs ? columns * channels : channels;
  const bool tiles = isa == Isa::kAmx && plan.taps <= kMaxTileTaps &&
                     fills_tiles(groups_in_set * shape.out_per_group(), plan.taps, plan.depth);
  const bool short_runs = isa == Isa::kAvx512Vnni && plan.runs && plan.depth <= kTileDepth;
  plan.even_rows = !shape.transposed && (tiles || short_runs);
  // Without padding and with one tap to a row the image does, if nothing is read past a pixel.
  plan.padded_image = plan.even_rows && (is_padded(shape) || columns > 1);
  if (!plan.padded_image) return plan;
  // What follows a run in the padded image meets weights that count as zero. Columns that would be
  // too long with them do without the image; groups_per_set() lets no set differ in that.
  if (plan.taps * tile_depth(plan.depth) <= kMaxColumn) {
    plan.depth = tile_depth(plan.depth);
  } else {
    plan.even_rows = plan.padded_image = false;
  }
  return plan;
}

// Narrow groups are merged, block-diagonally, until they fill a vector of outputs or a column is as
// long as it may be.
inline int64_t groups_per_set(const ConvShape& shape, Isa isa) {
  const int64_t fit = panel_shape(isa).lanes / shape.out_per_group();
  int64_t merged = fit < shape.groups ? fit : shape.groups;
  while (merged > 1 &&
         shape.kernel_size() * tile_depth(merged * shape.in_per_group()) > kMaxColumn) {
    --merged;
  }
  return merged < 1 ? 1 : merged;
}

// The groups of set `s`: the last set may have fewer.
inline int64_t groups_in_set(const ConvShape& shape, int64_t per_set, int64_t s) {
  const int64_t left = shape.groups - s * per_set;
  return left < per_set ? left : per_set;
}

// A part of the packed weights.
PackedMatrix conv_part(const PackedConvHeader& packed, int64_t index);

// Writes all outputs as if their accumulator were zero: for those that no phase reaches. Uses the
// first kFillBytes of the workspace.
inline constexpr int64_t kFillBytes = 64;
void fill_outputs(const ConvArgs& args, const Parallel& parallel);

int64_t implicit_gemm_workspace_bytes(const ConvArgs& args, const Parallel& parallel);
void implicit_gemm(const ConvArgs& args, const Parallel& parallel);

}  // namespace qk
