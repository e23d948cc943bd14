// Divisions that round up.
#pragma once

#include <cstdint>

namespace qk {

constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// The next multiple of `unit`; 64 bytes are a cache line.
constexpr int64_t align_up(int64_t bytes, int64_t unit = 64) {
  return ceil_div(bytes, unit) * unit;
}

}  // namespace qk
