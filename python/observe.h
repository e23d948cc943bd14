// The arguments of observers, checked: what their CPU and CUDA halves share.
#pragma once

#include <limits>

#include "csrc/observe/observe.h"
#include "python/layout.h"

namespace qk::seam {

// x in some dense layout: observing walks it in memory order.
Tensor dense(const Tensor& x);

// The state of an observer as the ops take it, and how it moves.
struct Observer {
  Tensor low, high, scale, zero_point;
  std::optional<Tensor> non_finite;
  std::optional<int64_t> axis;
  int64_t qmin, qmax;
  bool symmetric;
  double min_scale;
  std::optional<double> momentum;
  float floor = -std::numeric_limits<float>::infinity();
  float ceiling = std::numeric_limits<float>::infinity();

  // Limits to what is observed.
  void limit(std::optional<double> low, std::optional<double> high);
};

struct ObserverCall {
  Tensor x;
  FloatType type;
  std::optional<int64_t> axis;
  int64_t channels;
  ObserverRule rule;
  ObserverState state;
  int64_t* counts;  // of values that are not finite; null: they are errors
};
// `out`: what the rounded x goes to, or null.
ObserverCall check_observer(const char* op, const Tensor& x, const Observer& observer, Tensor* out);

}  // namespace qk::seam
