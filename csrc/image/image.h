// A planar float image to interleaved codes: what stands between a photograph and the first layer.
//
//   q[n, p, c] = clamp(RNE(x[n, c, p] * inv[c]) + zp[c], qmin, qmax), inv[c] = 1.0f / scale[c]
//
// Layout: x is batch x channels x pixels with any two outer strides, pixels contiguous; q is dense,
//   channels innermost. x is float32, bfloat16 or float16, q is uint8 or int8.
// Memory: owned by the caller; x and q must not overlap. At most kMaxImageChannels channels.
// Numbers: those of quantize (csrc/quantize/quantize.h), on every ISA and for any number of
// threads. Trick: one pass over memory. A run of pixels of each plane is quantized into a block of
// L1, and
//   byte shuffles interleave the planes on their way out.
#pragma once

#include "csrc/base/cpu.h"
#include "csrc/quantize/quantize.h"

namespace qk {

inline constexpr int64_t kMaxImageChannels = 16;

struct QuantizeImageArgs {
  const void* x;
  FloatType x_type;
  uint8_t* q;
  bool q_signed;
  int32_t qmin, qmax;
  int64_t batch, channels, pixels;
  int64_t batch_stride, channel_stride;  // of x, in elements
  const float* scale;                    // [channels], or [1] if not per_channel
  const int32_t* zero_point;
  bool per_channel;
};

void quantize_image(const QuantizeImageArgs& args, const Parallel& parallel);

// out[channels * i + c] = planes[c * plane_stride + i] for n pixels.
struct InterleaveRun {
  const uint8_t* planes;
  int64_t plane_stride, channels;
  uint8_t* out;
  int64_t n;
};
using InterleaveKernel = void (*)(const InterleaveRun&);

#define QK_INTERLEAVE_KERNEL(features, name) void name(const InterleaveRun&);
#include "csrc/image/kernels.inc"
#undef QK_INTERLEAVE_KERNEL

InterleaveKernel select_interleave_kernel(CpuFeatures features = cpu_features_active());

}  // namespace qk
