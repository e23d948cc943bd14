// What happens to an int32 accumulator before it is stored, shared by the GEMM and the depthwise
// kernels.
//
//   u8 / s8   q = clamp(RNE((float(acc) + addend[n]) * mult[n]) + zero_point, qmin, qmax)
//             then q = table[byte(q)] if has_table
//             then q = add(q, residual) if has_residual: the bits of the op `add`
//             addend = bias / (sx * sw), mult = (sx * sw) / so
//   f32       (float(acc) + addend[n]) * mult[n], mult = sx * sw;    bf16, f16: RNE of that
//   s32       acc
//
// Memory: an Epilogue is plain data; it is stored inside packed weights. Numbers: the scalar stage
// below is normative; the SIMD stages (x86_avx2_epilogue.h, x86_avx512_epilogue.h) give its bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "csrc/base/dtype.h"
#include "csrc/base/numerics.h"

namespace qk {

enum class OutputType : int32_t { kU8 = 0, kS8 = 1, kS32 = 2, kF32 = 3, kBF16 = 4, kF16 = 5 };

QK_HD int64_t output_bytes(OutputType type) {
  if (type == OutputType::kU8 || type == OutputType::kS8) return 1;
  return type == OutputType::kBF16 || type == OutputType::kF16 ? 2 : 4;
}

// q' = clamp(RNE((fma(q, scale, offset) + fma(r, residual_scale, residual_offset)) * inv_scale) +
// zero_point, qmin, qmax); an offset is float(-zp) * scale.
struct ResidualAdd {
  float scale, offset;
  float residual_scale, residual_offset;
  float inv_scale;
  int32_t zero_point, qmin, qmax;
  int32_t residual_zero_point = 0;  // in residual_offset; kept for checks
};

struct Epilogue {
  OutputType output = OutputType::kU8;
  int32_t zero_point = 0, qmin = 0, qmax = 255;
  int32_t has_table = 0, has_residual = 0;
  ResidualAdd residual = {};
  alignas(64) uint8_t table[256] = {};

  QK_HD bool is_8bit() const { return output == OutputType::kU8 || output == OutputType::kS8; }
  QK_HD bool is_signed() const { return output == OutputType::kS8; }
  // Whether a byte saturated as uint8 is not the output yet.
  QK_HD bool clamps() const { return is_signed() || qmin > 0 || qmax < 255; }
  // The same of a byte of the sum with a residual.
  QK_HD bool residual_clamps() const {
    return is_signed() || residual.qmin > 0 || residual.qmax < 255;
  }
};

QK_HD uint8_t residual_add(const ResidualAdd& add, int32_t q, int32_t r) {
  return static_cast<uint8_t>(add_codes(q, add.scale, add.offset, r, add.residual_scale,
                                        add.residual_offset, add.inv_scale, add.zero_point,
                                        add.qmin, add.qmax));
}

// The value of a float output.
QK_HD float output_value(int32_t acc, float addend, float mult) {
  return (static_cast<float>(acc) + addend) * mult;
}

// The bits of a 16-bit float output.
QK_HD uint16_t output_half(OutputType type, float value) {
  if (type == OutputType::kBF16) return float_to_bfloat16(value);
  Float16 half;
  from_float(value, &half);
  return half.bits;
}

// What scales the sums of rows that have grids of their own (csrc/linear_rows/linear_rows.h);
// arrays over the rows and over the columns.
struct RowScales {
  const float* row_scale;
  const int32_t* row_zero_point;
  const float* weight_scale;
  const int32_t* weight_sum;
  const float* bias;  // or nullptr

  QK_HD float value(int32_t acc, int64_t row, int64_t n) const {
    return row_scaled(acc, row_zero_point[row], weight_sum[n], row_scale[row], weight_scale[n],
                      bias == nullptr ? 0.0f : bias[n]);
  }
};

// Stores float32, bfloat16 or float16 at `out`.
QK_HD void store_float(OutputType type, float value, void* out) {
  if (type == OutputType::kF32) {
    std::memcpy(out, &value, 4);
  } else {
    const uint16_t half = output_half(type, value);
    std::memcpy(out, &half, 2);
  }
}

// One output element. `out` is the address of the element; `residual` that of the residual's byte.
QK_HD void store_output(const Epilogue& e, int32_t acc, float addend, float mult, void* out,
                        const uint8_t* residual, bool residual_signed) {
  if (e.output == OutputType::kS32) {
    std::memcpy(out, &acc, 4);
  } else if (!e.is_8bit()) {
    store_float(e.output, output_value(acc, addend, mult), out);
  } else {
    uint8_t q = static_cast<uint8_t>(requantize(acc, addend, mult, e.zero_point, e.qmin, e.qmax));
    if (e.has_table) q = e.table[q];
    if (e.has_residual) {
      q = residual_add(e.residual, byte_value(q, e.is_signed()),
                       byte_value(*residual, residual_signed));
    }
    std::memcpy(out, &q, 1);
  }
}

}  // namespace qk
