#include "csrc/gemm/linear.h"

#include "python/linear.h"

namespace qk::seam {

LinearSource check_linear_pack(const Tensor& weight, const Tensor& weight_scale,
                               const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                               double input_scale, int64_t input_zero_point, ScalarType input_dtype,
                               const std::vector<double>& epilogue, ScalarType output_dtype,
                               const OptionalTensor& table) {
  constexpr const char* op = "linear_pack";
  STD_TORCH_CHECK(weight.is_cpu(), op, ": weight must be on the CPU");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, op, ": weight must be int8, got ",
                  dtype_text(weight.scalar_type()));
  STD_TORCH_CHECK(weight.dim() == 2, op,
                  ": weight must have shape [out_features, in_features], got ", shape_text(weight));
  const int64_t n = weight.size(0), k = weight.size(1);
  const bool input_signed = check_code_type(op, "input_dtype", input_dtype);
  check_zero_point(op, "input_zero_point", input_dtype, input_zero_point);
  LinearSource checked{weight, check_weight_grid(op, weight_scale, weight_zero_point, bias, n), {}};
  const WeightGrid& grid = checked.grid;
  const OutputGrid output = check_epilogue(op, epilogue, output_dtype, table);
  checked.source = {.weight = static_cast<const int8_t*>(weight.const_data_ptr()),
                    .n = n,
                    .taps = 1,
                    .depth = k,
                    .stride_n = weight.stride(0),
                    .stride_tap = 0,
                    .stride_k = weight.stride(1),
                    .weight_scale = grid.scale_data(),
                    .weight_zero_point = grid.zero_point_data(),
                    .per_tensor = grid.per_tensor,
                    .bias = grid.bias_data(),
                    .input_scale = check_scale(op, "input_scale", input_scale),
                    .input_zero_point = static_cast<int32_t>(input_zero_point),
                    .input_signed = input_signed,
                    .output_scale = output.scale,
                    .epilogue = output.epilogue};
  check_packing(op, check_accumulator(checked.source), k, input_dtype);
  return checked;
}

namespace {

Tensor linear_pack(const Tensor& weight, const Tensor& weight_scale,
                   const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                   double input_scale, int64_t input_zero_point, ScalarType input_dtype,
                   const std::vector<double>& epilogue, ScalarType output_dtype,
                   const OptionalTensor& table) {
  const LinearSource checked =
      check_linear_pack(weight, weight_scale, weight_zero_point, bias, input_scale,
                        input_zero_point, input_dtype, epilogue, output_dtype, table);
  const PackSource& source = checked.source;
  const Isa isa = isa_active();
  Tensor packed =
      empty_on_cpu({packed_igemm_bytes(source.n, 1, source.depth, isa)}, ScalarType::Byte);
  check_packing("linear_pack", pack_igemm(source, isa, packed.mutable_data_ptr()), source.depth,
                input_dtype);
  return packed;
}

Tensor linear(const Tensor& input, const Tensor& packed, const OptionalTensor& residual,
              int64_t out_features, ScalarType output_dtype) {
  constexpr const char* op = "linear";
  STD_TORCH_CHECK(input.is_cpu() && packed.is_cpu(), op,
                  ": input and packed must both be on the CPU");
  check_packed_tensor(op, "linear_pack", packed);
  const PackedMatrix matrix = view_matrix(op, "linear_pack", packed, 0);
  const PackedHeader& header = *matrix.header;
  STD_TORCH_CHECK(header.taps == 1, op, ": packed must be made by linear_pack");
  STD_TORCH_CHECK(header.n == out_features, op, ": out_features must be ", header.n,
                  ", as packed, got ", out_features);
  STD_TORCH_CHECK(header.epilogue.output == check_output_type(op, output_dtype), op,
                  ": output_dtype must be the one that the weight was packed with, got ",
                  dtype_text(output_dtype));
  check_input_type(op, input, header.input_signed);
  STD_TORCH_CHECK(input.dim() >= 1 && input.size(input.dim() - 1) == header.depth, op,
                  ": input must have shape [..., ", header.depth, "], got ", shape_text(input));
  std::vector<int64_t> sizes = sizes_of(input);
  sizes.back() = header.n;
  const bool residual_signed = check_residual(op, residual, header.epilogue, sizes);

  Tensor out = empty_on_cpu(sizes, output_dtype);
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
  if (rows == 0 || header.n == 0) return out;
  const Rows a = as_rows(input);
  const std::optional<Rows> r =
      residual.has_value() ? std::optional(as_rows(*residual)) : std::nullopt;
  qk::linear({.matrix = matrix,
              .input = static_cast<const uint8_t*>(a.owner.const_data_ptr()),
              .rows = rows,
              .input_row_stride = header.depth == 0 ? 0 : a.stride,
              .out = out.mutable_data_ptr(),
              .residual = r ? static_cast<const uint8_t*>(r->owner.const_data_ptr()) : nullptr,
              .residual_row_stride = r ? r->stride : 0,
              .residual_signed = residual_signed},
             torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&linear_pack));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace qk::seam
