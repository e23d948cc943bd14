// Float images to codes with channels innermost: what stands between a photograph and the first
// layer.
//
//   q[n, p, c] = clamp(RNE(x[n, c, p] * inv[c]) + zp[c], qmin, qmax), inv[c] = 1.0f / scale[c]
//
// Layout: the pixels of an image follow one another, in planes (any stride between planes, at most
//   kMaxImageChannels of them) or with the channels innermost (dense, one grid); any stride between
//   images. q is dense, channels innermost. x is float32, bfloat16 or float16, q is uint8 or int8.
// Memory: owned by the caller; x and q must not overlap.
// Numbers: those of quantize (csrc/quantize/quantize.h), on every ISA, for any number of threads.
// Trick: one pass over memory. A run of pixels of each plane is quantized into a block of L1, and
//   byte shuffles interleave the planes on their way out. The same transpose of bytes, of any
//   number of channels, brings codes into channels-last order (csrc/plan/move.h).
#pragma once

#include "csrc/base/cpu.h"
#include "csrc/quantize/quantize.h"

namespace qk {

inline constexpr int64_t kMaxImageChannels = 16;

struct FloatImages {
  const void* x = nullptr;
  FloatType x_type = FloatType::kFloat32;
  bool interleaved = false;  // channels innermost
  int64_t channels = 0;
  int64_t batch_stride = 0, channel_stride = 0;  // in elements
  const float* scale = nullptr;                  // [channels], or [1] if not per_channel
  const int32_t* zero_point = nullptr;
  bool per_channel = false;
  bool q_signed = false;
  int32_t qmin = 0, qmax = 255;

  // The same from image n on.
  FloatImages from(int64_t n) const;
};

// A transpose of bytes: out[pixel_stride * i + c] = planes[c * plane_stride + i] for n pixels.
struct InterleaveRun {
  const uint8_t* planes;
  int64_t plane_stride, channels;
  uint8_t* out;
  int64_t pixel_stride, n;

  bool is_dense() const { return pixel_stride == channels; }
};
using InterleaveKernel = void (*)(const InterleaveRun&);

#define QK_INTERLEAVE_KERNEL(features, name) void name(const InterleaveRun&);
#include "csrc/image/kernels.inc"
#undef QK_INTERLEAVE_KERNEL

InterleaveKernel select_interleave_kernel(CpuFeatures features = cpu_features_active());

class ImageQuantizer {
 public:
  explicit ImageQuantizer(const FloatImages& images);

  // `count` pixels of image n, from pixel `first` on.
  void run(int64_t n, int64_t first, int64_t count, uint8_t* q) const;

 private:
  void quantize_run(int64_t offset, int64_t count, int64_t grid, uint8_t* q) const;

  const FloatImages images_;
  const QuantizeKernel quantize_;
  const InterleaveKernel interleave_;
  float inv_scale_[kMaxImageChannels];
};

struct QuantizeImageArgs {
  FloatImages images;
  uint8_t* q;
  int64_t batch, pixels;
};

void quantize_image(const QuantizeImageArgs& args, const Parallel& parallel);

}  // namespace qk
