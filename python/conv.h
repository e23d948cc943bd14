// The arguments of conv_pack and conv, checked: what their CPU and CUDA halves share.
#pragma once

#include <string>

#include "csrc/conv/conv.h"
#include "python/epilogue.h"

namespace qk::seam {

// A convolution's numbers as the ops take them; one entry a spatial dimension, of padding two.
struct ConvNumbers {
  std::vector<int64_t> kernel;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  bool transposed;
  std::string padding_mode;
};
// From conv_geometry() of qkernels/ops/conv.py: kernel, stride, padding (two a dimension),
// dilation, groups, transposed, the number of the padding mode.
ConvNumbers conv_numbers(const char* op, const std::vector<int64_t>& geometry);
// `channels_first` and `channels_second`: of the weight, in torch's layout.
ConvShape check_conv_shape(const char* op, const ConvNumbers& numbers, int64_t channels_first,
                           int64_t channels_second);

// The tensors own what `source` points at.
struct ConvPackCall {
  Tensor weight;
  WeightGrid grid;
  ConvSource source;
};
// Every tensor is on the CPU.
ConvPackCall check_conv_pack(const Tensor& weight, const Tensor& weight_scale,
                             const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                             double input_scale, int64_t input_zero_point, ScalarType input_dtype,
                             const std::vector<double>& epilogue, ScalarType output_dtype,
                             const OptionalTensor& table, const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, int64_t groups, bool transposed,
                             const std::string& padding_mode);

// The sizes of one call: fits the shape and torch's rules.
ConvExtent check_conv_extent(const ConvShape& shape, const Tensor& input,
                             const std::vector<int64_t>& output_size);

}  // namespace qk::seam
