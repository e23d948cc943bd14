// The arguments of the pools, checked: what their CPU and CUDA halves share. A call owns what its
// args point at.
#pragma once

#include <vector>

#include "csrc/pool/pool.h"
#include "python/layout.h"

namespace qk::seam {

template <class Args>
struct PoolCall {
  Tensor input, out;
  Args args;
};

struct PoolLists {
  const std::vector<int64_t>&kernel_size, &stride, &padding;
  bool ceil_mode;
};

// The grids of an average.
struct MeanNumbers {
  double q_scale;
  int64_t q_zero_point;
  double scale;
  int64_t zero_point, qmin, qmax;
  ScalarType dtype;
};

PoolCall<MaxPoolArgs> check_max_pool(const Tensor& q, const PoolLists& lists,
                                     const std::vector<int64_t>& dilation);
PoolCall<AvgPoolArgs> check_avg_pool(const Tensor& q, const PoolLists& lists,
                                     bool count_include_pad,
                                     std::optional<int64_t> divisor_override,
                                     const MeanNumbers& numbers);
PoolCall<AvgPoolArgs> check_adaptive_avg_pool(const Tensor& q,
                                              const std::vector<int64_t>& output_size,
                                              const MeanNumbers& numbers);

}  // namespace qk::seam
