// The ops on lists, checked, for either device.
#pragma once

#include <tuple>
#include <vector>

#include "csrc/foreach/foreach.h"
#include "python/layout.h"

namespace qk::seam {

using Tensors = std::vector<Tensor>;

// Where the work is done; `like` is a tensor of the device.
struct ForeachDevice {
  // clipped: [count] or null, for grids that are chosen.
  void (*quantize)(const char* op, const Tensor& like, const ForeachQuantArgs& args,
                   Tensor* clipped);
  void (*backward)(const char* op, const Tensor& like, const ForeachBackwardArgs& args);
};

Tensors foreach_fake_quant_on(const ForeachDevice& device, const Tensors& xs, const Tensors& scales,
                              const Tensors& zero_points, const std::vector<int64_t>& axes,
                              int64_t qmin, int64_t qmax);
Tensors foreach_fake_quant_backward_on(const ForeachDevice& device, const Tensors& grads,
                                       const Tensors& xs, const Tensors& scales,
                                       const Tensors& zero_points, const std::vector<int64_t>& axes,
                                       int64_t qmin, int64_t qmax);
std::tuple<Tensors, Tensors, Tensors, Tensors, Tensor> foreach_observe_fake_quant_on(
    const ForeachDevice& device, const Tensors& xs, const std::vector<int64_t>& axes, int64_t qmin,
    int64_t qmax, bool symmetric, double min_scale, std::optional<ScalarType> code_dtype);

}  // namespace qk::seam
