// The arguments of linear_pack, checked: what the CPU and the CUDA packing share.
#pragma once

#include "python/epilogue.h"

namespace qk::seam {

// The tensors own what `source` points at.
struct LinearSource {
  Tensor weight;
  WeightGrid grid;
  PackSource source;
};

// Every tensor is on the CPU.
LinearSource check_linear_pack(const Tensor& weight, const Tensor& weight_scale,
                               const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                               double input_scale, int64_t input_zero_point, ScalarType input_dtype,
                               const std::vector<double>& epilogue, ScalarType output_dtype,
                               const OptionalTensor& table);

}  // namespace qk::seam
