// The part of the numerics contract (csrc/base/numerics.h) that only training rules need: clips
// with learned ends, tanh, and noise for stochastic rounding.
#pragma once

#include "csrc/base/numerics.h"

namespace qk {

// PACT: where the gradient passes through the clip to the ends of the grid, and the derivative of
// the clip by the scale, for v = x * inv_scale.
QK_HD bool clip_passes(float v, int32_t zp, int32_t qmin, int32_t qmax) {
  return v >= static_cast<float>(qmin - zp) && v <= static_cast<float>(qmax - zp);
}
QK_HD float clip_slope(float v, int32_t zp, int32_t qmin, int32_t qmax) {
  const float lo = static_cast<float>(qmin - zp), hi = static_cast<float>(qmax - zp);
  return v >= lo && v <= hi ? 0.0f : clamp_nan_to_lo(v, lo, hi);
}

// tanh, the same bits on every path: at most 1.3 units in the last place off.
//   |x| < 0.65   x + x^3 * P(x^2)
//   else         1 - 2 / (exp(2x) + 1), exp by 2^n * exp(r), r = 2x - n ln 2, exp(r) = 1 + r + r^2
//   Q(r)
// P and Q are minimax polynomials of this project, by Horner's rule with fma.
struct Tanh {
  static constexpr float kSmall = 0.65f, kLimit = 10.0f;  // tanh(10) rounds to 1
  static constexpr float kP0 = -0x1.555556p-2f, kP1 = 0x1.1110dap-3f, kP2 = -0x1.ba0388p-5f,
                         kP3 = 0x1.64558p-6f, kP4 = -0x1.0f4fdp-7f, kP5 = 0x1.2337fp-9f;
  static constexpr float kLog2E = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f,
                         kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kQ0 = 0.5f, kQ1 = 0x1.5554d8p-3f, kQ2 = 0x1.5554b2p-5f,
                         kQ3 = 0x1.12107p-7f, kQ4 = 0x1.6d7c36p-10f;
};

QK_HD float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// x is not NaN.
QK_HD float tanh_float(float x) {
  float a = x < 0.0f ? -x : x;
  a = a < Tanh::kLimit ? a : Tanh::kLimit;
  float y;
  if (a < Tanh::kSmall) {
    const float z = a * a;
    float p = fma(Tanh::kP5, z, Tanh::kP4);
    p = fma(p, z, Tanh::kP3);
    p = fma(p, z, Tanh::kP2);
    p = fma(p, z, Tanh::kP1);
    p = fma(p, z, Tanh::kP0);
    y = fma(a * z, p, a);
  } else {
    const float twice = a + a, n = round_nearest_even(twice * Tanh::kLog2E);
    const float r = fma(n, -Tanh::kLn2Low, fma(n, -Tanh::kLn2High, twice));
    float q = fma(Tanh::kQ4, r, Tanh::kQ3);
    q = fma(q, r, Tanh::kQ2);
    q = fma(q, r, Tanh::kQ1);
    q = fma(q, r, Tanh::kQ0);
    const float fraction = fma(r * r, q, r) + 1.0f;
    union {
      uint32_t u;
      float f;
    } power = {(static_cast<uint32_t>(static_cast<int32_t>(n)) + 127u) << 23};
    y = 1.0f - 2.0f / (fraction * power.f + 1.0f);
  }
  return __builtin_copysignf(y, x);
}

// A number in [-0.5, 0.5) for element `index` of a row: counters go through two rounds of mixing,
// so that no state is carried and every element can be computed anywhere.
QK_HD uint32_t mix_bits(uint32_t h) {
  h ^= h >> 16;
  h *= 0x85ebca6bu;
  h ^= h >> 13;
  h *= 0xc2b2ae35u;
  h ^= h >> 16;
  return h;
}
struct NoiseKey {
  uint32_t inner, outer;
};
QK_HD NoiseKey noise_key(uint64_t seed, uint64_t row) {
  const uint32_t high = mix_bits(static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(row));
  const uint32_t inner = mix_bits(static_cast<uint32_t>(seed) ^ high);
  return {inner, mix_bits(inner + 0x9e3779b9u)};
}
QK_HD float uniform_noise(NoiseKey key, uint32_t index) {
  const uint32_t h = mix_bits(mix_bits(index ^ key.inner) + key.outer);
  return static_cast<float>(h >> 8) * 0x1p-24f - 0.5f;
}

}  // namespace qk
