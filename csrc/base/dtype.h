// Element types that kernels meet behind a void pointer, and the 16-bit floats' exact conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/base/numerics.h"

namespace qk {

enum class FloatType : uint8_t { kFloat32, kBFloat16, kFloat16 };

constexpr int64_t float_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }

enum class CodeType : uint8_t { kUInt8, kInt8, kInt32 };

constexpr int64_t code_bytes(CodeType type) { return type == CodeType::kInt32 ? 4 : 1; }

// The bits of a 16-bit float. Arithmetic is always done in float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

QK_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

QK_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

QK_HD float to_float(float x) { return x; }
QK_HD float to_float(BFloat16 x) { return bits_float(uint32_t{x.bits} << 16); }
QK_HD float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // 2^112 rebiases the exponent and normalizes subnormals; the product is exact.
  const float magnitude = bits_float(rest << 13) * bits_float(0x77800000u);
  return bits_float(sign | float_bits(magnitude));
}

// Rounds to nearest even; overflow becomes infinity. NaN stays NaN.
QK_HD void from_float(float x, float* out) { *out = x; }
QK_HD void from_float(float x, BFloat16* out) {
  const uint32_t u = float_bits(x);
  out->bits = x != x ? static_cast<uint16_t>((u >> 16) | 0x40u)
                     : static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
QK_HD void from_float(float x, Float16* out) {
  const uint32_t u = float_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // normal: rebias, then round the 13 low bits
    const uint32_t rebiased = magnitude - 0x38000000u;
    half = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the rounded code in the low bits
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace qk
