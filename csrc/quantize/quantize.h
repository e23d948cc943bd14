// Quantize and dequantize: float to 8-bit codes and back, elementwise.
//
//   quantize    q = clamp(RNE(x * inv[c]) + zp[c], qmin, qmax), inv[c] = 1.0f / scale[c]
//   dequantize  x = float(q - zp[c]) * scale[c]
//
// Layout: any dense layout in memory order, or rows that are contiguous inside (grid.h); x is
// float32, bfloat16 or float16 (computed in float32), q is uint8 or int8, for dequantize also int32
// (a sum of products, with zero points 0).
// Memory: owned by the caller; x and q must not overlap.
// Numbers: bit-equal on every ISA and for every thread count; the codes are those that fake_quant
// implies. NaN gives qmin, +-Inf saturate.
// Trick: x * inv is only clamped from above in float; the conversion maps what is too low, and NaN,
// to INT_MIN, and the saturating packs to 16 and 8 bits do the rest of the clamp.
#pragma once

#include <cstdint>

#include "csrc/base/cpu.h"
#include "csrc/base/dtype.h"
#include "csrc/base/parallel.h"
#include "csrc/quantize/grid.h"

namespace qk {

struct QuantizeArgs {
  const void* x;
  FloatType x_type;
  void* q;
  bool q_signed;
  int32_t qmin;
  int32_t qmax;
  GridLayout grid;
};

struct DequantizeArgs {
  const void* q;
  CodeType q_type;
  void* x;
  FloatType x_type;
  GridLayout grid;
};

// Output bytes above which dequantize stores past the caches.
inline constexpr int64_t kStreamBytes = int64_t{32} << 20;

void quantize(const QuantizeArgs& args, const Parallel& parallel);
void dequantize(const DequantizeArgs& args, const Parallel& parallel);

// One contiguous run.
struct QuantizeRun {
  const void* x;
  void* q;
  int64_t n;
  GridSpan grid;
  bool q_signed;
  int32_t qmin;
  int32_t qmax;
};

struct DequantizeRun {
  const void* q;
  void* x;
  int64_t n;
  GridSpan grid;
  CodeType q_type;
  bool stream;  // store past the caches; the caller fences
};

using QuantizeKernel = void (*)(const QuantizeRun&);
using DequantizeKernel = void (*)(const DequantizeRun&);

#define QK_QUANTIZE_KERNEL(features, type, name) void name(const QuantizeRun&);
#define QK_DEQUANTIZE_KERNEL(features, type, name) void name(const DequantizeRun&);
#include "csrc/quantize/kernels.inc"
#undef QK_QUANTIZE_KERNEL
#undef QK_DEQUANTIZE_KERNEL

QuantizeKernel select_quantize_kernel(FloatType type, CpuFeatures features = cpu_features_active());
DequantizeKernel select_dequantize_kernel(FloatType type,
                                          CpuFeatures features = cpu_features_active());

}  // namespace qk
