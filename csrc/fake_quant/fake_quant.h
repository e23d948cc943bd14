// Fake-quantize: y = dequantize(quantize(x)), elementwise, in one pass.
//
//   y = clamp(RNE(x * inv[c]), qmin - zp[c], qmax - zp[c]) * scale[c], inv[c] = 1.0f / scale[c]
//
// Layout: any dense layout in memory order, or rows that are contiguous inside
// (csrc/quantize/grid.h); x and y are float32, bfloat16 or float16 (computed in float32, rounded
// once).
// Memory: owned by the caller; y may alias x exactly, not partly.
// Numbers: bit-equal on every ISA and for every thread count, and bit-equal to
// torch.fake_quantize_per_tensor_affine on finite input. NaN gives qmin, +-Inf saturate. A result
// of zero is +0 or -0 as the product gives it.
// Trick: clamping before the zero point is added keeps everything in float (integers below 2^24 are
// exact), so that no conversion to integer is needed.
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

using FakeQuantKernel = void (*)(const FakeQuantRun&);

#define QK_FAKE_QUANT_KERNEL(features, type, name) void name(const FakeQuantRun&);
#include "csrc/fake_quant/kernels.inc"
#undef QK_FAKE_QUANT_KERNEL

FakeQuantKernel select_fake_quant_kernel(FloatType type,
                                         CpuFeatures features = cpu_features_active());

}  // namespace qk
