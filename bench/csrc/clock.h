// The clock of the micro-benchmarks.
#pragma once

#include <chrono>

namespace qk {
namespace {

double now_ns() {
  return static_cast<double>(std::chrono::duration_cast<std::chrono::nanoseconds>(
                                 std::chrono::steady_clock::now().time_since_epoch())
                                 .count());
}

}  // namespace
}  // namespace qk
