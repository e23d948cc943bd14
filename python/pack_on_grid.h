// The arguments of pack_on_grid, checked: what its CPU and CUDA halves share.
#pragma once

#include "python/conv.h"

namespace qk::seam {

// The tensors are contiguous, and where the weight is. A linear layer is a convolution of one tap.
struct OnGridCall {
  Tensor weight, weight_scale;
  OptionalTensor weight_zero_point, bias;
  Tensor input_scale, input_zero_point;
  ConvShape shape;
  bool per_tensor, input_signed;
};

OnGridCall check_pack_on_grid(const Tensor& weight, const Tensor& weight_scale,
                              const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                              const Tensor& input_scale, const Tensor& input_zero_point,
                              ScalarType input_dtype, const std::vector<int64_t>& geometry);

}  // namespace qk::seam
