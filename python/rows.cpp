#include "python/rows.h"

namespace qk::seam {
namespace {

// A vector of `elements` on the device of `like`, dense.
Tensor checked_vector(const char* name, const Tensor& t, ScalarType dtype, int64_t elements,
                      const Tensor& like) {
  constexpr const char* op = "linear_rows";
  check_device(op, name, t, like);
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_text(dtype),
                  ", got ", dtype_text(t.scalar_type()));
  STD_TORCH_CHECK(t.numel() == elements, op, ": ", name, " must have ", elements,
                  " elements, got shape ", shape_text(t));
  return torch::stable::contiguous(t);
}

int64_t rows_of(const Tensor& x) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  return rows;
}

}  // namespace

QuantizeRowsCall check_quantize_rows(const Tensor& x, int64_t qmin, int64_t qmax, bool symmetric,
                                     ScalarType dtype) {
  constexpr const char* op = "quantize_rows";
  const FloatType type = check_float_type(op, "x", x);
  const bool q_signed = check_code_type(op, "dtype", dtype);
  check_code_range(op, dtype, qmin, qmax);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got a scalar");
  std::vector<int64_t> sizes = sizes_of(x);
  const int64_t depth = sizes.back();
  Tensor q = empty(x, sizes, dtype);
  sizes.pop_back();
  QuantizeRowsCall call{
      as_rows(x), q, empty(x, sizes, ScalarType::Float), empty(x, sizes, ScalarType::Int), {}};
  call.args = {.x = call.x.owner.const_data_ptr(),
               .type = type,
               .rows = rows_of(x),
               .depth = depth,
               .row_stride = depth == 0 ? 0 : call.x.stride,
               .q = call.q.mutable_data_ptr(),
               .q_signed = q_signed,
               .qmin = static_cast<int32_t>(qmin),
               .qmax = static_cast<int32_t>(qmax),
               .symmetric = symmetric,
               .scale = call.scale.mutable_data_ptr<float>(),
               .zero_point = call.zero_point.mutable_data_ptr<int32_t>()};
  return call;
}

LinearRowsCall check_linear_rows(const Tensor& input, const Tensor& row_scale,
                                 const Tensor& row_zero_point, const Tensor& weight_scale,
                                 const Tensor& weight_sum, const OptionalTensor& bias,
                                 int64_t out_features, ScalarType output_dtype) {
  constexpr const char* op = "linear_rows";
  const OutputType output = check_output_type(op, output_dtype);
  STD_TORCH_CHECK(
      output == OutputType::kF32 || output == OutputType::kBF16 || output == OutputType::kF16, op,
      ": output_dtype must be float32, bfloat16 or float16, got ", dtype_text(output_dtype));
  STD_TORCH_CHECK(input.dim() >= 1, op, ": input must have shape [..., in_features], got ",
                  shape_text(input));
  STD_TORCH_CHECK(out_features >= 0 && out_features < INT32_MAX, op,
                  ": out_features must be in [0, 2^31), got ", out_features);
  const int64_t rows = rows_of(input), n = out_features;
  LinearRowsCall call{
      as_rows(input),
      checked_vector("row_scale", row_scale, ScalarType::Float, rows, input),
      checked_vector("row_zero_point", row_zero_point, ScalarType::Int, rows, input),
      checked_vector("weight_scale", weight_scale, ScalarType::Float, n, input),
      checked_vector("weight_sum", weight_sum, ScalarType::Int, n, input),
      std::nullopt,
      sizes_of(input),
      rows,
      input.size(input.dim() - 1),
      output,
      {}};
  if (bias.has_value()) call.bias = checked_vector("bias", *bias, ScalarType::Float, n, input);
  call.sizes.back() = n;
  if (call.depth == 0) call.input.stride = 0;
  call.scales = {.row_scale = call.row_scale.const_data_ptr<float>(),
                 .row_zero_point = call.row_zero_point.const_data_ptr<int32_t>(),
                 .weight_scale = call.weight_scale.const_data_ptr<float>(),
                 .weight_sum = call.weight_sum.const_data_ptr<int32_t>(),
                 .bias = call.bias.has_value() ? call.bias->const_data_ptr<float>() : nullptr};
  return call;
}

void check_row_sums(int64_t depth, bool weight_zero_points) {
  const int64_t most = INT32_MAX / (255 * (weight_zero_points ? 255 : 128));
  STD_TORCH_CHECK(depth <= most, "linear_rows: in_features must be at most ", most,
                  ", or the int32 sums could overflow, got ", depth, "; split the layer");
}

namespace {

std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x, int64_t qmin, int64_t qmax,
                                                 bool symmetric, ScalarType dtype) {
  const QuantizeRowsCall call = check_quantize_rows(x, qmin, qmax, symmetric, dtype);
  qk::quantize_rows(call.args, torch_threads());
  return {call.q, call.scale, call.zero_point};
}

Tensor linear_rows(const Tensor& input, const Tensor& packed, const Tensor& row_scale,
                   const Tensor& row_zero_point, const Tensor& weight_scale,
                   const Tensor& weight_sum, const OptionalTensor& bias, int64_t out_features,
                   ScalarType output_dtype) {
  constexpr const char* op = "linear_rows";
  STD_TORCH_CHECK(input.is_cpu() && packed.is_cpu(), op,
                  ": input and packed must both be on the CPU");
  check_packed_tensor(op, "linear_pack", packed);
  const PackedMatrix matrix = view_matrix(op, "linear_pack", packed, 0);
  const PackedHeader& header = *matrix.header;
  STD_TORCH_CHECK(header.taps == 1 && header.epilogue.output == OutputType::kS32, op,
                  ": packed must be made by linear_pack with an int32 output");
  STD_TORCH_CHECK(header.n == out_features, op, ": out_features must be ", header.n,
                  ", as packed, got ", out_features);
  check_input_type(op, input, header.input_signed);
  const LinearRowsCall call = check_linear_rows(input, row_scale, row_zero_point, weight_scale,
                                                weight_sum, bias, out_features, output_dtype);
  STD_TORCH_CHECK(call.depth == header.depth, op, ": input must have shape [..., ", header.depth,
                  "], got ", shape_text(input));
  check_row_sums(header.depth, header.has_weight_zero_point != 0);
  Tensor out = empty_on_cpu(call.sizes, output_dtype);
  qk::linear_rows({.matrix = matrix,
                   .input = static_cast<const uint8_t*>(call.input.owner.const_data_ptr()),
                   .rows = call.rows,
                   .input_row_stride = call.input.stride,
                   .scales = call.scales,
                   .output = call.output,
                   .out = out.mutable_data_ptr()},
                  torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&quantize_rows));
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
}

}  // namespace qk::seam
