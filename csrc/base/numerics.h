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
//   mul          q = clamp(RNE(float((qa-za) * (qb-zb)) * ((sa*sb)/so)) + zo, qmin, qmax)
//   mean         q = clamp(RNE(float(sum(q - z)) * ((s/so)/float(count))) + zo, qmin, qmax)
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

// The value of an 8-bit code.
QK_HD int32_t byte_value(uint8_t byte, bool is_signed) {
  return is_signed ? static_cast<int8_t>(byte) : byte;
}

QK_HD float round_nearest_even(float x) {
#if defined(__CUDA_ARCH__)
  return rintf(x);
#else
  return __builtin_rintf(x);
#endif
}

QK_HD bool is_finite(float v) { return v - v == 0.0f; }

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

// What a clamp to [floor, ceiling] in front of the grid leaves of its codes.
struct CodeEnds {
  int32_t qmin, qmax;
};
QK_HD CodeEnds clamped_ends(float floor, float ceiling, float inv_scale, int32_t zp, int32_t qmin,
                            int32_t qmax) {
  return {quantize(floor, inv_scale, zp, qmin, qmax), quantize(ceiling, inv_scale, zp, qmin, qmax)};
}

QK_HD float dequantize(int32_t q, float scale, int32_t zp) {
  return static_cast<float>(q - zp) * scale;
}

QK_HD float fake_quant(float x, float scale, float inv_scale, int32_t zp, int32_t qmin,
                       int32_t qmax) {
  // + 0.0f turns -0 into the +0 that a trip through integers gives.
  return (quantize_offset(x * inv_scale, zp, qmin, qmax) + 0.0f) * scale;
}

// Where the gradient passes through fake_quant, for v = x * inv_scale: RNE(v) needs no clamp. False
// for NaN.
QK_HD bool fake_quant_passes(float v, int32_t zp, int32_t qmin, int32_t qmax) {
  const float r = round_nearest_even(v);
  return r >= static_cast<float>(qmin - zp) && r <= static_cast<float>(qmax - zp);
}

// The derivative of fake_quant by its scale, the rounding seen as the identity (LSQ).
QK_HD float fake_quant_slope(float v, int32_t zp, int32_t qmin, int32_t qmax) {
  return fake_quant_passes(v, zp, qmin, qmax) ? round_nearest_even(v) - v
                                              : quantize_offset(v, zp, qmin, qmax);
}

// A learned zero point on the grid, the same in the forward and in the backward.
QK_HD int32_t round_zero_point(float zp, int32_t qmin, int32_t qmax) {
  return static_cast<int32_t>(quantize_offset(zp, 0, qmin, qmax));
}

// Which grid to choose for a range: what QSpec says, as numbers.
struct GridRule {
  int32_t qmin;
  int32_t qmax;
  bool symmetric;   // the zero point is the middle of the codes
  float min_scale;  // no grid is finer
};

inline constexpr float kMaxScale = 0x1p50f;

// The scale of the grid that covers [low, high] and zero; an empty range (all zero) gets 1.
QK_HD float choose_scale(float low, float high, const GridRule& rule) {
  low = low < 0.0f ? low : 0.0f;
  high = high > 0.0f ? high : 0.0f;
  const float steps = static_cast<float>(rule.qmax - rule.qmin);
  const float scale =
      rule.symmetric ? (-low > high ? -low : high) / (steps * 0.5f) : (high - low) / steps;
  if (!(scale > 0.0f)) return 1.0f;
  const float bounded = scale < rule.min_scale ? rule.min_scale : scale;
  return bounded > kMaxScale ? kMaxScale : bounded;
}

// Its zero point: zero lies on the grid exactly.
QK_HD int32_t choose_zero_point(float low, float scale, const GridRule& rule) {
  if (rule.symmetric) return (rule.qmin + rule.qmax + 1) >> 1;
  low = low < 0.0f ? low : 0.0f;
  const float zp = static_cast<float>(rule.qmin) - round_nearest_even(low / scale);
  return static_cast<int32_t>(
      clamp_nan_to_lo(zp, static_cast<float>(rule.qmin), static_cast<float>(rule.qmax)));
}

// The running mean of an end of the range.
QK_HD float moving_average(float mean, float batch, float momentum) {
  return mean + momentum * (batch - mean);
}

QK_HD int32_t requantize(int32_t acc, float addend, float multiplier, int32_t zp, int32_t qmin,
                         int32_t qmax) {
  return static_cast<int32_t>(
             quantize_offset((static_cast<float>(acc) + addend) * multiplier, zp, qmin, qmax)) +
         zp;
}

// The grid of one row of activations, chosen from its extremes when it is there ("dynamic").
struct DynamicGrid {
  float scale;
  int32_t zero_point;
};

// A row of tiny numbers keeps a scale whose product with a weight's is normal.
inline constexpr float kMinRowScale = 0x1p-60f;

// `finite`: the row holds neither NaN nor infinities; else its scale is NaN, as all that follows.
QK_HD DynamicGrid choose_dynamic_grid(float low, float high, bool finite, int32_t qmin,
                                      int32_t qmax, bool symmetric) {
  const GridRule rule{qmin, qmax, symmetric, kMinRowScale};
  const float scale = finite ? choose_scale(low, high, rule) : __builtin_nanf("");
  return {scale, choose_zero_point(low, scale, rule)};
}

// One output of a linear layer whose rows have grids of their own; acc = sum of q * (w - zw).
QK_HD float row_scaled(int32_t acc, int32_t zero_point, int32_t weight_sum, float row_scale,
                       float weight_scale, float bias) {
  const uint32_t centered = static_cast<uint32_t>(acc) -
                            static_cast<uint32_t>(zero_point) * static_cast<uint32_t>(weight_sum);
  return static_cast<float>(static_cast<int32_t>(centered)) * (row_scale * weight_scale) + bias;
}

// RNE to the upper half of a float32, as bits. NaN stays NaN.
QK_HD uint16_t float_to_bfloat16(float x) {
  union {
    float f;
    uint32_t u;
  } bits = {x};
  if (x != x) return static_cast<uint16_t>((bits.u >> 16) | 0x40u);
  return static_cast<uint16_t>((bits.u + 0x7fffu + ((bits.u >> 16) & 1u)) >> 16);
}

// float(q) * scale - zp * scale in one rounding, the form `add` uses for each operand.
QK_HD float dequantize_fma(int32_t q, float scale, float neg_zp_times_scale) {
#if defined(__CUDA_ARCH__)
  return fmaf(static_cast<float>(q), scale, neg_zp_times_scale);
#else
  return __builtin_fmaf(static_cast<float>(q), scale, neg_zp_times_scale);
#endif
}

// The sum of two codes on the grid (1.0f / inv_scale, zp): what `add` and a fused residual compute.
QK_HD int32_t add_codes(int32_t qa, float a_scale, float a_offset, int32_t qb, float b_scale,
                        float b_offset, float inv_scale, int32_t zp, int32_t qmin, int32_t qmax) {
  const float sum = dequantize_fma(qa, a_scale, a_offset) + dequantize_fma(qb, b_scale, b_offset);
  return quantize(sum, inv_scale, zp, qmin, qmax);
}

// The `a_offset` of add_codes: -zp * scale.
QK_HD float add_offset(float scale, int32_t zp) { return static_cast<float>(-zp) * scale; }

// Whether add_codes takes the scale of an operand: no difference of two codes leaves the float32
// range, so that no sum is that of two infinities.
QK_HD bool is_add_scale(float scale) { return is_finite(255.0f * scale); }

// The `multiplier` of mul_codes, which must be finite: zero times infinity is no code.
QK_HD float mul_multiplier(float a_scale, float b_scale, float scale) {
  return (a_scale * b_scale) / scale;
}

// The product of two codes.
QK_HD int32_t mul_codes(int32_t qa, int32_t za, int32_t qb, int32_t zb, float multiplier,
                        int32_t zp, int32_t qmin, int32_t qmax) {
  return quantize(static_cast<float>((qa - za) * (qb - zb)), multiplier, zp, qmin, qmax);
}

// The mean of a window: centered_sum = sum(q - zp_in), scale_ratio = s_in / s_out, finite.
QK_HD int32_t mean_code(int32_t centered_sum, float scale_ratio, int32_t divisor, int32_t zp,
                        int32_t qmin, int32_t qmax) {
  return quantize(static_cast<float>(centered_sum), scale_ratio / static_cast<float>(divisor), zp,
                  qmin, qmax);
}

}  // namespace qk
