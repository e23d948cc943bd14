// AMX's tiles for the micro-benchmarks: all eight of 16 rows of 64 bytes.
#pragma once

#include <cstdint>

namespace qk {
namespace {

struct alignas(64) WholeTiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace
}  // namespace qk
