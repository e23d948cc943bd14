// The arguments of observe_histogram, checked: what its CPU and CUDA halves share.
#pragma once

#include "csrc/histogram/histogram.h"
#include "python/observe.h"

namespace qk::seam {

struct HistogramCall {
  Tensor x;
  FloatType type;
  const float* batch_low;
  const float* batch_high;
  float* low;
  float* high;
  float* histogram;
  int64_t bins;
};

HistogramCall check_histogram(const Tensor& x, const Tensor& batch_low, const Tensor& batch_high,
                              const Tensor& low, const Tensor& high, const Tensor& histogram);

}  // namespace qk::seam
