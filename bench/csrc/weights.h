// Weights as a network has them: normal, and scaled so that the largest of each column is 127. The
// AVX2 kernel's time depends on them (csrc/gemm/byte_steps.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

namespace qk {

// [columns][k].
inline std::vector<int8_t> normal_weights(int64_t columns, int64_t k) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<int8_t> weights;
  std::vector<float> column(static_cast<size_t>(k));
  for (int64_t c = 0; c < columns; ++c) {
    float most = 0;
    for (float& w : column) {
      w = normal(random);
      most = std::max(most, std::fabs(w));
    }
    for (const float w : column) {
      weights.push_back(static_cast<int8_t>(std::lrint(w / most * 127)));
    }
  }
  return weights;
}

}  // namespace qk
