// Fake-quantize: y = dequantize(quantize(x)), elementwise, in one pass.
//
//   y = clamp(RNE(x * inv[c]), qmin - zp[c], qmax - zp[c]) * scale[c], inv[c] = 1.0f / scale[c]
//
// Layout: any dense layout in memory order, or rows that are contiguous inside
// (csrc/quantize/grid.h); x and y are float32, bfloat16 or float16 (computed in float32, rounded
// once).
// Memory: owned by the caller; y may alias x exactly, not partly.
// Numbers: bit-equal on every ISA and for every thread count, and bit-equal to
// torch.fake_quantize_per_tensor_affine on finite input, signs of zero too. NaN gives qmin, +-Inf
// saturate. qmin and qmax are in [-2^21, 2^21].
// Trick: clamping before the zero point is added keeps everything in float (integers below 2^24 are
// exact). The clamp comes before the rounding, which is then a sum and a difference with
// 1.5 * 2^23: cheaper than a rounding instruction, and it never gives -0.
#pragma once

#include <cstdint>

#include "csrc/base/cpu.h"
#include "csrc/base/dtype.h"
#include "csrc/base/parallel.h"
#include "csrc/quantize/grid.h"

namespace qk {

struct FakeQuantArgs {
  const void* x;
  void* y;
  FloatType type;
  int32_t qmin;
  int32_t qmax;
  GridLayout grid;
};

void fake_quant(const FakeQuantArgs& args, const Parallel& parallel);

// One contiguous run.
struct FakeQuantRun {
  const void* x;
  void* y;
  int64_t n;
  GridSpan grid;
  int32_t qmin;
  int32_t qmax;
  bool stream;  // store past the caches; the caller fences
};

// v + kRounder - kRounder is RNE(v), and +0 for zero, where |v| <= 2^22.
inline constexpr float kRounder = 0x1.8p23f;
inline constexpr int64_t kFakeQuantLimit = int64_t{1} << 21;

using FakeQuantKernel = void (*)(const FakeQuantRun&);

#define QK_FAKE_QUANT_KERNEL(features, type, name) void name(const FakeQuantRun&);
#include "csrc/fake_quant/kernels.inc"
#undef QK_FAKE_QUANT_KERNEL

FakeQuantKernel select_fake_quant_kernel(FloatType type,
                                         CpuFeatures features = cpu_features_active());

}  // namespace qk
