#include "csrc/conv/geometry.h"

#include <numeric>

namespace qk {
namespace {

// Sizes and offsets stay far inside int64 even after a few additions.
constexpr int64_t kMaxElements = int64_t{1} << 48;

// *product *= factor; false if it leaves [0, kMaxElements].
bool multiply(int64_t* product, int64_t factor) {
  return factor >= 0 && !__builtin_mul_overflow(*product, factor, product) &&
         *product <= kMaxElements;
}

bool in_range(int64_t value, int64_t low) { return value >= low && value <= (int64_t{1} << 31); }

// Kernel taps whose offset has a residue modulo stride are `spacing` apart.
int64_t tap_spacing(const ConvShape& shape, int d) {
  return shape.stride[d] / std::gcd(shape.stride[d], shape.dilation[d]);
}

}  // namespace

int64_t dim_phase_count(const ConvShape& shape, int d) {
  if (!shape.transposed) return 1;
  const int64_t spacing = tap_spacing(shape, d);
  return shape.kernel[d] < spacing ? shape.kernel[d] : spacing;
}

DimPhase dim_phase(const ConvShape& shape, int d, int64_t index) {
  const int64_t stride = shape.stride[d], dilation = shape.dilation[d], pad = shape.pad_lo[d];
  if (!shape.transposed) return {0, 1, shape.kernel[d], 0, 1, stride, -pad, dilation};
  // Kernel indexes index, index + spacing, ... reach the outputs o with (o + pad) % stride ==
  // (index * dilation) % stride. Taps run backwards, so that the input position grows with the tap.
  const int64_t spacing = tap_spacing(shape, d);
  const int64_t taps = (shape.kernel[d] - index + spacing - 1) / spacing;
  const int64_t last = index + (taps - 1) * spacing;
  const int64_t first = ((index * dilation - pad) % stride + stride) % stride;
  return {first,
          stride,
          taps,
          last,
          -spacing,
          1,
          (first + pad - last * dilation) / stride,
          spacing * dilation / stride};
}

int64_t conv_phase_count(const ConvShape& shape) {
  int64_t count = 1;
  for (int d = 0; d < kConvDims; ++d) count *= dim_phase_count(shape, d);
  return count;
}

ConvPhase conv_phase(const ConvShape& shape, int64_t index) {
  ConvPhase phase;
  for (int d = kConvDims - 1; d >= 0; --d) {
    const int64_t count = dim_phase_count(shape, d);
    phase.dim[d] = dim_phase(shape, d, index % count);
    index /= count;
  }
  return phase;
}

bool phases_cover_output(const ConvShape& shape) {
  if (!shape.transposed) return true;
  for (int d = 0; d < kConvDims; ++d) {
    if (dim_phase_count(shape, d) < shape.stride[d]) return false;
  }
  return true;
}

Status check_conv_shape(const ConvShape& s) {
  if (s.spatial_dims < 1 || s.spatial_dims > kConvDims) return Status::kBadShape;
  if (!in_range(s.in_channels, 1) || !in_range(s.out_channels, 1) || !in_range(s.groups, 1) ||
      s.in_channels % s.groups != 0 || s.out_channels % s.groups != 0) {
    return Status::kBadShape;
  }
  int64_t weights = 1;
  bool ok = multiply(&weights, s.out_channels) && multiply(&weights, s.in_channels);
  for (int d = 0; d < kConvDims; ++d) {
    ok = ok && in_range(s.kernel[d], 1) && in_range(s.stride[d], 1) && in_range(s.dilation[d], 1) &&
         in_range(s.pad_lo[d], 0) && in_range(s.pad_hi[d], 0) && multiply(&weights, s.kernel[d]);
  }
  if (s.transposed && s.padding_mode != PaddingMode::kZeros) ok = false;
  return ok ? Status::kOk : Status::kBadShape;
}

Status check_conv_extent(const ConvShape& s, const ConvExtent& e) {
  if (e.batch < 0) return Status::kBadShape;
  int64_t inputs = s.in_channels, outputs = s.out_channels;
  bool ok = multiply(&inputs, e.batch) && multiply(&outputs, e.batch);
  for (int d = 0; ok && d < kConvDims; ++d) {
    ok = in_range(e.in[d], 1) && in_range(e.out[d], 1) && multiply(&inputs, e.in[d]) &&
         multiply(&outputs, e.out[d]);
    if (!ok) break;
    const int64_t window = (s.kernel[d] - 1) * s.dilation[d] + 1;
    if (s.transposed) {
      const int64_t least = (e.in[d] - 1) * s.stride[d] + window - s.pad_lo[d] - s.pad_hi[d];
      const int64_t slack = s.stride[d] > s.dilation[d] ? s.stride[d] : s.dilation[d];
      ok = e.out[d] >= least && e.out[d] < least + slack;
      continue;
    }
    const int64_t room = e.in[d] + s.pad_lo[d] + s.pad_hi[d] - window;
    ok = room >= 0 && e.out[d] == room / s.stride[d] + 1;
    const int64_t pad = s.pad_lo[d] > s.pad_hi[d] ? s.pad_lo[d] : s.pad_hi[d];
    if (s.padding_mode == PaddingMode::kReflect && pad >= e.in[d]) ok = false;
    if (s.padding_mode == PaddingMode::kCircular && pad > e.in[d]) ok = false;
  }
  return ok ? Status::kOk : Status::kBadShape;
}

}  // namespace qk
