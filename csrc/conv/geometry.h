// The index arithmetic of convolutions, for every spatial rank, padding mode and for transposed
// convolutions alike.
//
//   conv        y[o] = sum over k of x[source(o * stride - pad_lo + k * dilation)] * w[k]
//   transposed  y[o] = sum over i, k with i * stride - pad_lo + k * dilation == o of x[i] * w[k]
//
// Every convolution is 3-D here: N, C, D, H, W with channels innermost in memory; the missing
// leading dimensions have size 1. Trick: a transposed convolution with stride s is s ordinary
// convolutions of stride 1 with fewer taps, one for each residue of the output position ("phase").
// In each dimension a phase is a DimPhase; an ordinary convolution is one phase with all taps.
// All sizes are int64 and every product is checked.
#pragma once

#include <cstdint>

#include "csrc/base/numerics.h"
#include "csrc/base/status.h"

namespace qk {

inline constexpr int kConvDims = 3;  // D, H, W

enum class PaddingMode : int32_t { kZeros = 0, kReflect = 1, kReplicate = 2, kCircular = 3 };

// A convolution without the size of its input.
struct ConvShape {
  int64_t in_channels = 0, out_channels = 0, groups = 1;
  int64_t kernel[kConvDims] = {1, 1, 1};
  int64_t stride[kConvDims] = {1, 1, 1};
  int64_t dilation[kConvDims] = {1, 1, 1};
  int64_t pad_lo[kConvDims] = {0, 0, 0};
  int64_t pad_hi[kConvDims] = {0, 0, 0};
  int32_t spatial_dims = 2;
  int32_t transposed = 0;
  PaddingMode padding_mode = PaddingMode::kZeros;
  int32_t reserved = 0;

  int64_t in_per_group() const { return in_channels / groups; }
  int64_t out_per_group() const { return out_channels / groups; }
  int64_t kernel_size() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// The sizes of one call.
struct ConvExtent {
  int64_t batch = 0;
  int64_t in[kConvDims] = {1, 1, 1};
  int64_t out[kConvDims] = {1, 1, 1};

  int64_t in_pixels() const { return in[0] * in[1] * in[2]; }
  int64_t out_pixels() const { return out[0] * out[1] * out[2]; }
};

// The part of one dimension that a phase computes: outputs out_first + j * out_step, and for the
// t-th of `taps` taps the kernel index kernel_first + t * kernel_step and the input position
// j * in_stride + in_offset + t * in_dilation, before padding.
struct DimPhase {
  int64_t out_first = 0, out_step = 1;
  int64_t taps = 1, kernel_first = 0, kernel_step = 1;
  int64_t in_stride = 1, in_offset = 0, in_dilation = 1;

  int64_t count(int64_t out) const {
    return out_first < out ? (out - out_first + out_step - 1) / out_step : 0;
  }
  int64_t position(int64_t j, int64_t tap) const {
    return j * in_stride + in_offset + tap * in_dilation;
  }
};

struct ConvPhase {
  DimPhase dim[kConvDims];

  bool dense_output() const {
    return dim[0].out_step == 1 && dim[1].out_step == 1 && dim[2].out_step == 1;
  }
};

// The phases of a dimension that have taps: 1 for an ordinary convolution, at most min(stride,
// kernel) for a transposed one.
int64_t dim_phase_count(const ConvShape& shape, int dim);
DimPhase dim_phase(const ConvShape& shape, int dim, int64_t index);

int64_t conv_phase_count(const ConvShape& shape);
ConvPhase conv_phase(const ConvShape& shape, int64_t index);
// False if some outputs of a transposed convolution receive no input at all.
bool phases_cover_output(const ConvShape& shape);

// The input index that padded position `p` of a dimension of size `in` reads; -1: the zero point.
// Reflect needs |overhang| < in, circular |overhang| <= in; check_conv_extent checks both.
template <typename Int>
QK_HD Int source_index(PaddingMode mode, Int p, Int in) {
  if (p >= 0 && p < in) return p;
  switch (mode) {
    case PaddingMode::kReflect:
      return p < 0 ? -p : 2 * (in - 1) - p;
    case PaddingMode::kReplicate:
      return p < 0 ? 0 : in - 1;
    case PaddingMode::kCircular:
      return p < 0 ? p + in : p - in;
    case PaddingMode::kZeros:
      break;
  }
  return -1;
}

// kBadShape if a size is not positive, channels do not divide, or a product overflows int64.
Status check_conv_shape(const ConvShape& shape);
// kBadShape if `out` is not an output size of `in` (a transposed convolution has `stride` of them,
// told apart by output_padding), or a product overflows.
Status check_conv_extent(const ConvShape& shape, const ConvExtent& extent);

}  // namespace qk
