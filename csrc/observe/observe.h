// Observers in one op: the smallest and largest value of a tensor or channel, the state that they
// update, the grid that follows, and fake-quantization on that grid.
//
//   batch   low[c] = min(x), high[c] = max(x) over the channel, of x limited to [floor, ceiling]
//   state   the first batch replaces it; then min and max of both, or with a momentum
//           low += momentum * (batch low - low), the same for high
//   grid    choose_scale, choose_zero_point (csrc/base/numerics.h) of the state
//   y       fake_quant(x) on that grid
//
// Layout: as fake_quant (csrc/quantize/grid.h). The scale and zero_point of the layout are where
// the chosen grid is written; x alone is observed if `y` is null.
// Memory: owned by the caller, the workspace too; y and x must not overlap.
// Numbers: equal bits on every ISA and for every thread count, and those of the Python observers
// with choose_qparams. A NaN or an infinity in x leaves state and grid as they were, unless they
// are to be ignored: then they are counted and the finite values decide.
// Trick: where a channel is one contiguous row that fits the cache, its extremes, grid and output
// are done while it is hot: x is read from memory once. NaN is found by an unordered compare of two
// vectors at a time in the pass that finds the extremes.
#pragma once

#include <cstdint>
#include <limits>

#include "csrc/base/cpu.h"
#include "csrc/base/dtype.h"
#include "csrc/base/numerics.h"
#include "csrc/base/parallel.h"
#include "csrc/quantize/grid.h"

namespace qk {

// The extremes of x. `grid` gives the walk over x (operand 1); its scale and zero_point are unused.
struct MinMaxArgs {
  const void* x;
  FloatType type;
  GridLayout grid;
  int64_t channels;  // 1: per tensor
  float* low;        // [channels]
  float* high;
  float* workspace;  // minmax_workspace(grid) elements
};

int64_t minmax_workspace(const GridLayout& grid);
// False if x holds a NaN or an infinity; the extremes are then those of nothing in particular.
// A channel without elements has low +inf and high -inf. Never -0, here and below: which zero a
// minimum finds depends on the order.
bool minmax(const MinMaxArgs& args, const Parallel& parallel);

struct NonFinite {
  int64_t nans = 0;
  int64_t infinities = 0;
};
// The extremes of the finite values; on one thread, for the rare case.
NonFinite finite_minmax(const MinMaxArgs& args);

// What an observer keeps between batches, and the grid chosen from it.
struct ObserverState {
  float* low;  // [channels]; low > high: nothing seen yet
  float* high;
  float* scale;
  int32_t* zero_point;
};

// How an observer moves.
struct ObserverRule {
  GridRule rule;
  bool averages;  // with `momentum`; else the extremes of all batches
  float momentum;
  float floor, ceiling;  // what follows limits x to them
};

// One channel after a batch.
struct ObserverStep {
  float low, high, scale;
  int32_t zero_point;
};

QK_HD float limited(float v, float floor, float ceiling) {
  return v < floor ? floor : v > ceiling ? ceiling : v;
}

// The state [state_low, state_high] after a batch with the extremes [low, high]; low > high:
// nothing finite was seen.
QK_HD ObserverStep observer_step(const ObserverRule& observer, float state_low, float state_high,
                                 float low, float high) {
  const bool first = !(state_low <= state_high);
  if (low <= high) {
    low = limited(low, observer.floor, observer.ceiling);
    high = limited(high, observer.floor, observer.ceiling);
  }
  if (!(low <= high)) {
    low = state_low;
    high = state_high;
  } else if (!first && observer.averages) {
    low = moving_average(state_low, low, observer.momentum);
    high = moving_average(state_high, high, observer.momentum);
  } else if (!first) {
    low = state_low < low ? state_low : low;
    high = state_high > high ? state_high : high;
  }
  const bool seen = low <= high;
  const float scale = seen ? choose_scale(low, high, observer.rule) : 1.0f;
  // Never -0: which zero a minimum finds depends on the order.
  return {low + 0.0f, high + 0.0f, scale,
          choose_zero_point(seen ? low + 0.0f : 0.0f, scale, observer.rule)};
}

struct ObserveArgs {
  const void* x;
  void* y;  // null: observe only
  FloatType type;
  GridLayout grid;
  int64_t channels;
  GridRule rule;
  bool averages;  // with `momentum`; else the extremes of all batches
  float momentum;
  bool ignore_non_finite;
  // What follows limits x to [floor, ceiling]; only where y is null.
  float floor = -std::numeric_limits<float>::infinity();
  float ceiling = std::numeric_limits<float>::infinity();
  ObserverState state;
  ObserverState next;  // scratch of the same size
  float* workspace;    // observe_workspace(grid, channels) elements
};

struct Observed {
  NonFinite non_finite;  // if not ignored and any is there, state, grid and y are not to be used
  bool clipped = true;   // false: every x of this batch lies inside the new grid
};

int64_t observe_workspace(const GridLayout& grid, int64_t channels);
Observed observe(const ObserveArgs& args, const Parallel& parallel);

// The extremes of one contiguous run are merged into low[0] and high[0], or of one channel an
// element into low[i] and high[i]. True if a NaN was seen (and left out).
struct MinMaxRun {
  const void* x;
  int64_t n;
  float* low;
  float* high;
  bool per_element;
};

// Element i of the run.
template <typename T>
inline __attribute__((always_inline)) bool minmax_element(const MinMaxRun& run, int64_t i) {
  const int64_t c = run.per_element ? i : 0;
  const float v = to_float(static_cast<const T*>(run.x)[i]);
  if (v < run.low[c]) run.low[c] = v;
  if (v > run.high[c]) run.high[c] = v;
  return v != v;
}

using MinMaxKernel = bool (*)(const MinMaxRun&);

#define QK_MINMAX_KERNEL(features, type, name) bool name(const MinMaxRun&);
#include "csrc/observe/kernels.inc"
#undef QK_MINMAX_KERNEL

MinMaxKernel select_minmax_kernel(FloatType type, CpuFeatures features = cpu_features_active());

}  // namespace qk
