// Pooling of 8-bit codes over windows of the spatial dimensions.
//
//   max_pool  out = max of the codes in the window; padding never wins (alone: the lowest code)
//   avg_pool  out = clamp(RNE(float(sum(q - z)) * ((s/so)/float(divisor))) + zo, qmin, qmax), the
//             sum over the part of the window inside the input; divisor: the window's elements
//             (with or without padding), or a given number
//   adaptive  avg_pool over windows [floor(i*n/out), ceil((i+1)*n/out))
//
// Layout: input [batch, depth, height, width, channels] and output alike, dense or slices of the
//   channels of a wider tensor; 1-d and 2-d pools have depth (and height) 1.
// Memory: owned by the caller; the output must not overlap the input.
// Numbers: bit-equal on every ISA and for every thread count (integer sums are exact; a window has
// at most kMaxPoolWindow elements).
// Trick: the taps of a window are a strided box, clipped to the input outside of the kernel, so
// that padding costs nothing inside. One kernel call reduces all windows of an output row that lie
// inside the input, for all channels.
#pragma once

#include <cstdint>

#include "csrc/base/cpu.h"
#include "csrc/base/numerics.h"
#include "csrc/base/parallel.h"

namespace qk {

inline constexpr int64_t kMaxPoolWindow = int64_t{1} << 22;  // 255 * 2^22 < 2^31

struct PoolGeometry {
  int64_t batch, channels;
  int64_t in[3], out[3];  // depth, height, width
  // Window i of a dimension covers i * stride - padding + {0, dilation, ..., (kernel-1) *
  // dilation}. Adaptive: none of the four is read.
  bool adaptive;
  int64_t kernel[3], stride[3], padding[3], dilation[3];
};

// The part of a window of one dimension that lies in the input.
struct PoolSpan {
  int64_t first;   // first tap inside of the input
  int64_t taps;    // taps inside of the input
  int64_t padded;  // elements of the window inside of the padded input
};

// Window i of dimension `dim`, computed in integers of type Int: size * (out + 1) fits.
template <typename Int>
QK_HD PoolSpan window_span(const PoolGeometry& g, int dim, Int i) {
  const Int size = static_cast<Int>(g.in[dim]), out = static_cast<Int>(g.out[dim]);
  if (g.adaptive) {
    const Int first = i * size / out, end = ((i + 1) * size + out - 1) / out;
    return {first, end - first, end - first};
  }
  const Int dilation = static_cast<Int>(g.dilation[dim]), kernel = static_cast<Int>(g.kernel[dim]);
  const Int padding = static_cast<Int>(g.padding[dim]);
  const Int start = i * static_cast<Int>(g.stride[dim]) - padding;
  const Int skipped = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const Int fits = start < size ? (size - 1 - start) / dilation + 1 : 0;
  const Int last = fits < kernel ? fits : kernel, padded = size + padding - start;
  return {start + skipped * dilation, last > skipped ? last - skipped : 0,
          padded < kernel ? padded : kernel};
}

// Elements from one pixel to the next; 0: dense.
struct PoolStrides {
  int64_t q = 0, out = 0;
};

struct MaxPoolArgs {
  const uint8_t* q;
  uint8_t* out;
  bool is_signed;
  PoolGeometry geometry;
  PoolStrides strides = {};
};

struct AvgPoolArgs {
  const uint8_t* q;
  uint8_t* out;
  bool q_signed, out_signed;
  PoolGeometry geometry;
  bool count_include_pad;
  int64_t divisor;    // 0: the number of elements in the window
  float scale_ratio;  // input scale / output scale
  int32_t q_zero_point, out_zero_point, qmin, qmax;
  PoolStrides strides = {};
};

// What the sum over a window is divided by.
QK_HD int32_t window_divisor(const AvgPoolArgs& args, int64_t padded, int64_t inside) {
  const int64_t divisor = args.divisor != 0        ? args.divisor
                          : args.count_include_pad ? padded
                                                   : inside;
  return static_cast<int32_t>(divisor > 0 ? divisor : 1);
}

void max_pool(const MaxPoolArgs& args, const Parallel& parallel);
void avg_pool(const AvgPoolArgs& args, const Parallel& parallel);

// Boxes of taps, none outside of the input. Element c of tap (d, h, w) of box i is at
// base[i * step + d * stride[0] + h * stride[1] + w * stride[2] + c], its output at
// out[i * out_step + c].
struct PoolWindows {
  const uint8_t* base;
  int64_t taps[3];
  int64_t stride[3];
  int64_t channels;
  uint8_t* out;
  int64_t count, step, out_step;
};

struct MeanGrid {
  bool q_signed, out_signed;
  float scale_ratio;
  int32_t divisor;
  int32_t q_zero_point, out_zero_point, qmin, qmax;
};

using MaxPoolKernel = void (*)(const PoolWindows&, bool is_signed);
using AvgPoolKernel = void (*)(const PoolWindows&, const MeanGrid&);

#define QK_MAX_POOL_KERNEL(features, name) void name(const PoolWindows&, bool);
#define QK_AVG_POOL_KERNEL(features, name) void name(const PoolWindows&, const MeanGrid&);
#include "csrc/pool/kernels.inc"
#undef QK_MAX_POOL_KERNEL
#undef QK_AVG_POOL_KERNEL

MaxPoolKernel select_max_pool_kernel(CpuFeatures features = cpu_features_active());
AvgPoolKernel select_avg_pool_kernel(CpuFeatures features = cpu_features_active());

}  // namespace qk
