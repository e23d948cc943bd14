// Normative: the formulas of pool.h, one channel at a time.
#include "csrc/base/numerics.h"
#include "csrc/base/target.h"
#include "csrc/pool/pool.h"

namespace qk {
namespace {

#include "csrc/pool/windows.h"

void max_window(const PoolWindows& window, bool is_signed) {
  for (int64_t c = 0; c < window.channels; ++c) {
    int32_t best = is_signed ? -128 : 0;
    for_each_tap(window, window.base, [&](const uint8_t* tap) {
      const int32_t q = byte_value(tap[c], is_signed);
      best = q > best ? q : best;
    });
    window.out[c] = static_cast<uint8_t>(best);
  }
}

void mean_window(const PoolWindows& window, const MeanGrid& grid) {
  const int64_t taps = window.taps[0] * window.taps[1] * window.taps[2];
  for (int64_t c = 0; c < window.channels; ++c) {
    int32_t sum = -static_cast<int32_t>(taps) * grid.q_zero_point;
    for_each_tap(window, window.base,
                 [&](const uint8_t* tap) { sum += byte_value(tap[c], grid.q_signed); });
    window.out[c] = static_cast<uint8_t>(
        mean_code(sum, grid.scale_ratio, grid.divisor, grid.out_zero_point, grid.qmin, grid.qmax));
  }
}

}  // namespace

void max_pool_scalar(const PoolWindows& windows, bool is_signed) {
  for_each_window(windows, [&](const PoolWindows& window) { max_window(window, is_signed); });
}

void avg_pool_scalar(const PoolWindows& windows, const MeanGrid& grid) {
  for_each_window(windows, [&](const PoolWindows& window) { mean_window(window, grid); });
}

}  // namespace qk
