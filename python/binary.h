// The arguments of pack_signs and of the products of packed signs, checked: what their CPU and CUDA
// halves share. Outputs are where the inputs are.
#pragma once

#include <vector>

#include "csrc/binary/binary.h"
#include "python/layout.h"

namespace qk::seam {

using OptionalTensor = std::optional<Tensor>;

struct PackSignsCall {
  Tensor x, out;
  BinaryPackArgs args;
};
PackSignsCall check_pack_signs(const Tensor& input, int64_t axis);

// binary_weight_pack's check of its weight.
void check_binary_weight(const Tensor& weight);
// The bytes of binary_weight_pack, on the CPU.
Tensor pack_binary_weight(const Tensor& weight);

struct BinaryCall {
  Tensor x, packed, scale;
  OptionalTensor bias;
  Tensor out;
  BinaryConvArgs args;
};
BinaryCall check_binary_linear(const Tensor& input, const Tensor& packed, const Tensor& scale,
                               const OptionalTensor& bias, int64_t in_features);
BinaryCall check_binary_conv2d(const Tensor& input, const Tensor& packed, const Tensor& scale,
                               const OptionalTensor& bias, int64_t in_channels,
                               const std::vector<int64_t>& kernel_size,
                               const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation);

}  // namespace qk::seam
