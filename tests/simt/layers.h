// What the tests of linear and of convolution put around a weight: random grids and an epilogue.
#pragma once

#include <vector>

#include "csrc/gemm/epilogue.h"
#include "tests/csrc/check.h"

namespace qk::test {

// Of `channels` output channels.
struct LayerGrids {
  std::vector<float> scales, bias;
  std::vector<int32_t> zero_points;

  LayerGrids(int64_t channels, Rng& rng)
      : scales(static_cast<size_t>(channels)), bias(scales.size()), zero_points(scales.size()) {
    for (float& v : scales) v = rng.real(0.001f, 0.01f);
    for (float& v : bias) v = rng.real(-3, 3);
    for (int32_t& v : zero_points) v = static_cast<int32_t>(rng.integer(-20, 20));
  }
};

inline Epilogue some_epilogue(OutputType output, bool table, bool residual, Rng& rng) {
  const int32_t low = output == OutputType::kS8 ? -128 : 0;
  Epilogue e{};
  e.output = output;
  e.zero_point = low + 120, e.qmin = low + 1, e.qmax = low + 255;
  e.has_table = table, e.has_residual = residual;
  for (uint8_t& v : e.table) v = static_cast<uint8_t>(rng.bits());
  e.residual = {0.02f, -0.02f * 7, 0.03f, -0.03f * 9, 1.0f / 0.031f, low + 77, low + 3, low + 250};
  return e;
}

}  // namespace qk::test
