// The depthwise strip for machines without AVX2: the formula of depthwise.h, nothing interleaved.
#include "csrc/base/numerics.h"
#include "csrc/conv/depthwise.h"

namespace qk {
namespace {

constexpr int64_t kLanes = 16;

int32_t accumulate(const DepthwiseStrip& s, int64_t x, int64_t p, int64_t c) {
  int32_t acc = s.init[c];
  const int64_t channel = (s.channel_phase + c) / s.out_group * s.in_group;
  for (int64_t tap = 0; tap < s.taps; ++tap) {
    const int64_t offset = s.column_offset[x * s.column_step + tap * s.tap_step];
    for (int64_t i = 0; i < s.row_groups * 4; ++i) {
      const uint8_t* row = s.quads ? s.rows[i / 4 / s.quads] : s.rows[i];
      const int64_t in = s.quads ? channel + i % (4 * s.quads) : channel;
      const uint8_t byte = offset < 0 ? s.padding : row[offset + in];
      const int64_t group = tap * s.row_groups + i / 4;
      const int8_t w = s.weights[((group * s.rows_out + p) * kLanes + c) * 4 + i % 4];
      acc += (byte ^ s.input_flip) * w;
    }
  }
  return acc;
}

}  // namespace

void depthwise_scalar(const DepthwiseStrip& s) {
  for (int64_t x = 0; x < s.outputs; ++x) {
    for (int64_t p = 0; p < s.rows_out; ++p) {
      for (int64_t c = 0; c < s.channels; ++c) {
        const int32_t acc = accumulate(s, x, p, c);
        if (s.acc != nullptr) {
          s.acc[(x * s.rows_out + p) * kLanes + c] = acc;
        } else if (s.out[p] != nullptr) {
          const int32_t q = requantize(acc, s.addend[c], s.mult[c], s.zero_point, s.qmin, s.qmax);
          s.out[p][x * s.out_step + c] = static_cast<uint8_t>(q) ^ s.output_flip;
        }
      }
    }
  }
}

}  // namespace qk
