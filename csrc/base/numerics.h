// The numerics contract of qkernels: the only definition of its scalar arithmetic, host and device.
//
// All floats are IEEE float32. RNE is round-to-nearest-even. Nothing is contracted to an FMA unless
// `fma` is written (the build passes -ffp-contract=off / -fmad=false). docs/numerics.md is the
// prose copy of this file.
//
//   quantize     q = clamp(RNE(x * inv) + zp, qmin, qmax), inv = 1.0f / scale    NaN -> qmin, +-Inf
//   saturate dequantize   x = float(q - zp) * scale fake_quant   dequantize(quantize(x)) requantize
//   q = clamp(RNE((float(acc) + addend) * multiplier) + zp, qmin, qmax)
//                addend = bias / (sx * sw), multiplier = (sx * sw) / so
//   add          q = quantize(fma(qa, sa, -za*sa) + fma(qb, sb, -zb*sb), 1/so)
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define QK_HD __host__ __device__ __forceinline__
#else
#define QK_HD inline __attribute__((always_inline))
#endif

namespace qk {

// Largest K for which the int32 accumulator of a dot product cannot overflow.
inline constexpr int64_t kMaxKU8S8 = 65793;   // (2^31 - 1) / (255 * 128)
inline constexpr int64_t kMaxKS8S8 = 131071;  // (2^31 - 1) / (128 * 128)

QK_HD float round_nearest_even(float x) {
#if defined(__CUDA_ARCH__)
  return rintf(x);
#else
  return __builtin_rintf(x);
#endif
}

// Clamps to [lo, hi]; NaN -> lo. Same as maxps(v, lo) then minps(., hi): x86 returns the second
// operand for NaN.
QK_HD float clamp_nan_to_lo(float v, float lo, float hi) {
  v = v > lo ? v : lo;
  return v < hi ? v : hi;
}

// RNE(v) clamped to the grid, as an offset from the zero point: an integer in [qmin - zp, qmax -
// zp].
QK_HD float quantize_offset(float v, int32_t zp, int32_t qmin, int32_t qmax) {
  return clamp_nan_to_lo(round_nearest_even(v), static_cast<float>(qmin - zp),
                         static_cast<float>(qmax - zp));
}

QK_HD int32_t quantize(float x, float inv_scale, int32_t zp, int32_t qmin, int32_t qmax) {
  return static_cast<int32_t>(quantize_offset(x * inv_scale, zp, qmin, qmax)) + zp;
}

QK_HD float dequantize(int32_t q, float scale, int32_t zp) {
  return static_cast<float>(q - zp) * scale;
}

QK_HD float fake_quant(float x, float scale, float inv_scale, int32_t zp, int32_t qmin,
                       int32_t qmax) {
  return quantize_offset(x * inv_scale, zp, qmin, qmax) * scale;
}

QK_HD int32_t requantize(int32_t acc, float addend, float multiplier, int32_t zp, int32_t qmin,
                         int32_t qmax) {
  return static_cast<int32_t>(
             quantize_offset((static_cast<float>(acc) + addend) * multiplier, zp, qmin, qmax)) +
         zp;
}

// float(q) * scale - zp * scale in one rounding, the form `add` uses for each operand.
QK_HD float dequantize_fma(int32_t q, float scale, float neg_zp_times_scale) {
#if defined(__CUDA_ARCH__)
  return fmaf(static_cast<float>(q), scale, neg_zp_times_scale);
#else
  return __builtin_fmaf(static_cast<float>(q), scale, neg_zp_times_scale);
#endif
}

}  // namespace qk
