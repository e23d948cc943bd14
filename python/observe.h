// The arguments of observers, checked: what their CPU and CUDA halves share.
#pragma once

#include <limits>

#include "csrc/observe/observe.h"
#include "python/layout.h"

namespace qk::seam {

// x in some dense layout: observing walks it in memory order.
Tensor dense(const Tensor& x);

// The data of a tensor of `n` elements that an observer keeps or is told.
template <typename T>
T* state_data(const char* op, const char* name, Tensor t, const Tensor& x, ScalarType dtype,
              int64_t n) {
  check_device(op, name, t, x);
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.numel() == n && t.is_contiguous(), op, ": ", name,
                  " must be a contiguous ", dtype_text(dtype), " tensor of ", n,
                  n == 1 ? " element" : " elements (one a channel)", ", got ",
                  dtype_text(t.scalar_type()), " of shape ", shape_text(t));
  return static_cast<T*>(t.mutable_data_ptr());
}

// The state of an observer as the ops take it, and how it moves.
struct Observer {
  Tensor low, high, scale, zero_point;
  std::optional<Tensor> non_finite;
  std::optional<int64_t> axis;
  int64_t qmin, qmax;
  bool symmetric;
  double min_scale;
  std::optional<double> momentum;
  Limits limits = {};  // to what is observed
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
