// Fake-quantize: y = dequantize(quantize(x)), elementwise, in one pass.
//
//   y[o, c, i] = (clamp(RNE(x[o, c, i] * inv[c]) , qmin - zp[c], qmax - zp[c])) * scale[c], inv[c]
//   = 1.0f / scale[c]
//
// Layout: x and y are dense [outer, channels, inner]; channels == 1 is the per-tensor case.
// Memory: owned by the caller; y may alias x exactly, not partly.
// Numbers: bit-equal on every ISA and for every thread count, and bit-equal to
// torch.fake_quantize_per_tensor_affine on finite input. NaN gives qmin, +-Inf saturate. Trick:
// clamping before the zero point is added keeps everything in float (integers below 2^24 are
// exact), so that no conversion to integer is needed.
#pragma once

#include <cstdint>

#include "csrc/base/cpu.h"
#include "csrc/base/parallel.h"

namespace qk {

struct FakeQuantArgs {
  const float* x;
  float* y;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  const float* scale;         // [channels]
  const int32_t* zero_point;  // [channels]
  int32_t qmin;
  int32_t qmax;
};

void fake_quant(const FakeQuantArgs& args, const Parallel& parallel);

// One run of `n` elements that share a grid.
using FakeQuantRunKernel = void (*)(const float* x, float* y, int64_t n, float scale,
                                    int32_t zero_point, int32_t qmin, int32_t qmax);

#define QK_FAKE_QUANT_KERNEL(features, name) \
  void name(const float*, float*, int64_t, float, int32_t, int32_t, int32_t);
#include "csrc/fake_quant/kernels.inc"
#undef QK_FAKE_QUANT_KERNEL

FakeQuantRunKernel select_fake_quant_kernel(CpuFeatures features = cpu_features_active());

}  // namespace qk
