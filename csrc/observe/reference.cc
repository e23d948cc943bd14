// Normative: the extremes of a run, one element at a time.
#include "csrc/observe/observe.h"

namespace qk {
namespace {

template <typename T>
bool minmax_scalar(const MinMaxRun& run) {
  bool nan = false;
  for (int64_t i = 0; i < run.n; ++i) nan |= minmax_element<T>(run, i);
  return nan;
}

}  // namespace

bool minmax_f32_scalar(const MinMaxRun& run) { return minmax_scalar<float>(run); }
bool minmax_bf16_scalar(const MinMaxRun& run) { return minmax_scalar<BFloat16>(run); }
bool minmax_f16_scalar(const MinMaxRun& run) { return minmax_scalar<Float16>(run); }

}  // namespace qk
