// Sums in double by a tree whose shape depends on the number of values alone.
#pragma once

#include <cstdint>

namespace qk {

class TreeSum {
 public:
  void add(double value) {
    int k = 0;
    for (; count_ >> k & 1; ++k) value = level_[k] + value;
    level_[k] = value;
    ++count_;
  }
  double total() const {
    double sum = 0;
    for (int k = 0; count_ >> k != 0; ++k) {
      if (count_ >> k & 1) sum = level_[k] + sum;
    }
    return sum;
  }

 private:
  double level_[48];  // level k: the sum of 2^k values, if bit k of the count is set
  uint64_t count_ = 0;
};

// As many side by side: the same bits, and one set of vector operations for all.
class TreeSums {
 public:
  static constexpr int64_t kCount = 64;

  // n values, at most kCount; the same n at every call.
  void add(const double* values, int64_t n) {
    double sums[kCount];
    for (int64_t i = 0; i < n; ++i) sums[i] = values[i];
    int k = 0;
    for (; count_ >> k & 1; ++k) {
      for (int64_t i = 0; i < n; ++i) sums[i] = level_[k][i] + sums[i];
    }
    for (int64_t i = 0; i < n; ++i) level_[k][i] = sums[i];
    ++count_;
  }
  double total(int64_t i) const {
    double sum = 0;
    for (int k = 0; count_ >> k != 0; ++k) {
      if (count_ >> k & 1) sum = level_[k][i] + sum;
    }
    return sum;
  }

 private:
  double level_[48][kCount];
  uint64_t count_ = 0;
};

}  // namespace qk
