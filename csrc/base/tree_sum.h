// A sum in double by a tree whose shape depends on the number of values alone.
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

}  // namespace qk
