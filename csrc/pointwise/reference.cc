// Normative: the formulas of pointwise.h, one element at a time.
#include "csrc/base/numerics.h"
#include "csrc/pointwise/pointwise.h"

namespace qk {
void lookup_scalar(const LookupRows& run) {
  for (int64_t row = 0; row < run.rows; ++row) {
    const uint8_t* q = run.q + row * run.q_stride;
    uint8_t* out = run.out + row * run.out_stride;
    for (int64_t i = 0; i < run.n; ++i) out[i] = run.table[q[i]];
  }
}

void add_scalar(const BinaryRun& run) {
  const BinaryGrid& g = *run.grid;
  const float a_offset = add_offset(g.a_scale, g.a_zero_point);
  const float b_offset = add_offset(g.b_scale, g.b_zero_point);
  const float inv_scale = 1.0f / g.out_scale;
  for (int64_t i = 0; i < run.n; ++i) {
    const int32_t qa = byte_value(run.a[run.a_repeats ? 0 : i], g.a_signed);
    const int32_t qb = byte_value(run.b[run.b_repeats ? 0 : i], g.b_signed);
    run.out[i] = static_cast<uint8_t>(add_codes(qa, g.a_scale, a_offset, qb, g.b_scale, b_offset,
                                                inv_scale, g.out_zero_point, g.qmin, g.qmax));
  }
}

void mul_scalar(const BinaryRun& run) {
  const BinaryGrid& g = *run.grid;
  const float multiplier = mul_multiplier(g.a_scale, g.b_scale, g.out_scale);
  for (int64_t i = 0; i < run.n; ++i) {
    const int32_t qa = byte_value(run.a[run.a_repeats ? 0 : i], g.a_signed);
    const int32_t qb = byte_value(run.b[run.b_repeats ? 0 : i], g.b_signed);
    run.out[i] = static_cast<uint8_t>(mul_codes(qa, g.a_zero_point, qb, g.b_zero_point, multiplier,
                                                g.out_zero_point, g.qmin, g.qmax));
  }
}

}  // namespace qk
