// The arguments that linear_pack and conv_pack share: weight grids, bias and epilogue, checked; and
// the view of packed bytes in a run op.
#pragma once

#include <optional>
#include <vector>

#include "csrc/gemm/igemm.h"
#include "python/layout.h"

namespace qk::seam {

using OptionalTensor = std::optional<Tensor>;

// A linear or convolution weight's surroundings, as PackSource wants them. The tensors own what
// the pointers point at.
struct WeightGrid {
  Tensor scale;
  OptionalTensor zero_point, bias;
  bool per_tensor;

  const float* scale_data() const { return scale.const_data_ptr<float>(); }
  const int32_t* zero_point_data() const {
    return zero_point.has_value() ? zero_point->const_data_ptr<int32_t>() : nullptr;
  }
  const float* bias_data() const {
    return bias.has_value() ? bias->const_data_ptr<float>() : nullptr;
  }
};

// weight_scale and weight_zero_point: 1 or `channels` elements; bias: `channels`.
WeightGrid check_weight_grid(const char* op, const Tensor& scale, const OptionalTensor& zero_point,
                             const OptionalTensor& bias, int64_t channels);

struct OutputGrid {
  Epilogue epilogue;
  float scale = 1.0f;  // of an 8-bit output
};

// `numbers`: qkernels/ops/epilogue.py's Epilogue.as_list().
OutputGrid check_epilogue(const char* op, const std::vector<double>& numbers, ScalarType dtype,
                          const OptionalTensor& table);

OutputType check_output_type(const char* op, ScalarType dtype);

// Turns the status of pack_igemm() into an error.
void check_packing(const char* op, Status status, int64_t k, ScalarType input_dtype);

// Turns the status of view_packed() and its like into an error that names `pack_op`.
void check_packed(const char* op, const char* pack_op, Status status);
// packed must be a dense uint8 vector on the CPU.
void check_packed_tensor(const char* op, const char* pack_op, const Tensor& packed);
// The matrix in `packed` from byte `offset` on, made by `pack_op`.
PackedMatrix view_matrix(const char* op, const char* pack_op, const Tensor& packed, int64_t offset);

// input and residual of a run op against what the weight was packed with. check_residual returns
// whether the residual is int8.
void check_input_type(const char* op, const Tensor& input, bool packed_signed);
bool check_residual(const char* op, const OptionalTensor& residual, const Epilogue& epilogue,
                    const std::vector<int64_t>& output_sizes);

}  // namespace qk::seam
