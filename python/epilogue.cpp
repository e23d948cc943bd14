#include "python/epilogue.h"

#include <cmath>

namespace qk::seam {
namespace {

int32_t integer(const char* op, const char* name, double value) {
  STD_TORCH_CHECK(value == std::nearbyint(value) && std::fabs(value) < 1e6, op, ": ", name,
                  " must be an integer, got ", value);
  return static_cast<int32_t>(value);
}

void check_finite_bias(const char* op, const Tensor& bias) {
  const float* values = bias.const_data_ptr<float>();
  for (int64_t i = 0; i < bias.numel(); ++i) {
    STD_TORCH_CHECK(std::isfinite(values[i]), op, ": bias must be finite, got ", values[i],
                    " at channel ", i);
  }
}

void check_vector(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", dtype_text(dtype),
                  ", got ", dtype_text(t.scalar_type()));
}

// One value a tensor stands for all channels.
Tensor broadcast_to_match(const Tensor& t, int64_t elements) {
  if (t.numel() == elements) return torch::stable::contiguous(t);
  Tensor wide = empty_on_cpu({elements}, t.scalar_type());
  const auto* from = static_cast<const uint32_t*>(t.const_data_ptr());
  auto* to = static_cast<uint32_t*>(wide.mutable_data_ptr());
  for (int64_t i = 0; i < elements; ++i) to[i] = from[0];
  return wide;
}

ResidualAdd check_residual_grid(const char* op, const std::vector<double>& n, ScalarType dtype,
                                const Epilogue& epilogue, float scale) {
  ResidualAdd add{};
  const int32_t residual_zero_point = integer(op, "the residual's zero_point", n[5]);
  STD_TORCH_CHECK(residual_zero_point >= -128 && residual_zero_point <= 255, op,
                  ": the residual's zero_point must be in [-128, 255], got ", residual_zero_point);
  add.scale = scale;
  add.offset = add_offset(scale, epilogue.zero_point);
  add.residual_scale = check_scale(op, "the residual's scale", n[4]);
  check_add_scale(op, "the output scale", scale);
  check_add_scale(op, "the residual's scale", add.residual_scale);
  add.residual_offset = add_offset(add.residual_scale, residual_zero_point);
  add.inv_scale = 1.0f / check_scale(op, "the residual's out_scale", n[6]);
  add.zero_point = integer(op, "the residual's out_zero_point", n[7]);
  add.qmin = integer(op, "the residual's out_qmin", n[8]);
  add.qmax = integer(op, "the residual's out_qmax", n[9]);
  add.residual_zero_point = residual_zero_point;
  check_clamped_grid(op, "the residual's out_zero_point", dtype, add.zero_point, add.qmin,
                     add.qmax);
  return add;
}

}  // namespace

WeightGrid check_weight_grid(const char* op, const Tensor& scale, const OptionalTensor& zero_point,
                             const OptionalTensor& bias, int64_t channels) {
  check_vector(op, "weight_scale", scale, ScalarType::Float);
  const bool one = scale.numel() == 1;
  STD_TORCH_CHECK(one || scale.numel() == channels, op, ": weight_scale must have 1 or ", channels,
                  " elements (one an output channel), got shape ", shape_text(scale));
  int64_t elements = one ? 1 : channels;
  if (zero_point.has_value()) {
    check_vector(op, "weight_zero_point", *zero_point, ScalarType::Int);
    STD_TORCH_CHECK(zero_point->numel() == 1 || zero_point->numel() == channels, op,
                    ": weight_zero_point must have 1 or ", channels,
                    " elements (one an output channel), got shape ", shape_text(*zero_point));
    if (zero_point->numel() != 1) elements = channels;
  }
  WeightGrid grid{broadcast_to_match(scale, elements), std::nullopt, std::nullopt,
                  elements == 1 && channels != 1};
  for (int64_t c = 0; c < elements; ++c) {
    const float value = grid.scale_data()[c];
    STD_TORCH_CHECK(std::isnormal(value) && value > 0, op,
                    ": weight_scale must be positive, finite and normal, got ", value,
                    " at channel ", c);
  }
  if (zero_point.has_value()) {
    grid.zero_point = broadcast_to_match(*zero_point, elements);
    for (int64_t c = 0; c < elements; ++c) {
      const int32_t value = grid.zero_point_data()[c];
      STD_TORCH_CHECK(value >= -128 && value <= 127, op,
                      ": weight_zero_point must be in [-128, 127], got ", value, " at channel ", c);
    }
  }
  if (bias.has_value()) {
    check_vector(op, "bias", *bias, ScalarType::Float);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == channels, op, ": bias must have shape [",
                    channels, "], got ", shape_text(*bias));
    grid.bias = torch::stable::contiguous(*bias);
    check_finite_bias(op, *grid.bias);
  }
  return grid;
}

OutputType check_output_type(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return OutputType::kU8;
    case ScalarType::Char:
      return OutputType::kS8;
    case ScalarType::Int:
      return OutputType::kS32;
    case ScalarType::Float:
      return OutputType::kF32;
    case ScalarType::BFloat16:
      return OutputType::kBF16;
    case ScalarType::Half:
      return OutputType::kF16;
    default:
      STD_TORCH_CHECK(
          false, op,
          ": output_dtype must be uint8, int8, int32, float32, bfloat16 or float16, got ",
          dtype_text(dtype));
  }
}

OutputGrid check_epilogue(const char* op, const std::vector<double>& numbers, ScalarType dtype,
                          const OptionalTensor& table) {
  OutputGrid grid;
  grid.epilogue.output = check_output_type(op, dtype);
  STD_TORCH_CHECK(numbers.size() == 4 || numbers.size() == 10, op,
                  ": epilogue must have 4 numbers, or 10 with a residual, got ", numbers.size());
  const bool has_residual = numbers.size() == 10;
  if (!grid.epilogue.is_8bit()) {
    STD_TORCH_CHECK(!table.has_value() && !has_residual, op,
                    ": a table or a residual needs an output_dtype of uint8 or int8, got ",
                    dtype_text(dtype));
    return grid;
  }
  grid.scale = check_scale(op, "the output scale", numbers[0]);
  grid.epilogue.zero_point = integer(op, "the output zero_point", numbers[1]);
  grid.epilogue.qmin = integer(op, "qmin", numbers[2]);
  grid.epilogue.qmax = integer(op, "qmax", numbers[3]);
  check_clamped_grid(op, "the output zero_point", dtype, grid.epilogue.zero_point,
                     grid.epilogue.qmin, grid.epilogue.qmax);
  if (table.has_value()) {
    check_vector(op, "table", *table, dtype);
    STD_TORCH_CHECK(table->dim() == 1 && table->numel() == 256, op,
                    ": table must have shape [256], got ", shape_text(*table));
    const Tensor dense = torch::stable::contiguous(*table);
    std::memcpy(grid.epilogue.table, dense.const_data_ptr(), 256);
    grid.epilogue.has_table = 1;
  }
  if (has_residual) {
    grid.epilogue.residual = check_residual_grid(op, numbers, dtype, grid.epilogue, grid.scale);
    grid.epilogue.has_residual = 1;
  }
  return grid;
}

void check_packing(const char* op, Status status, int64_t k, ScalarType input_dtype) {
  STD_TORCH_CHECK(status != Status::kKTooLarge, op, ": K = ", k, " products of ",
                  dtype_text(input_dtype),
                  " and int8 with these zero points could overflow the int32 accumulator (largest "
                  "K: 65793 for uint8, 131071 for int8 with zero points 0, less for larger ones); "
                  "split the layer");
  STD_TORCH_CHECK(status != Status::kBadScale, op,
                  ": input_scale * weight_scale, bias / (input_scale * weight_scale) and "
                  "input_scale * weight_scale / output scale must be finite and normal in float32");
  STD_TORCH_CHECK(status == Status::kOk, op, ": packing failed");
}

void check_packed(const char* op, const char* pack_op, Status status) {
  STD_TORCH_CHECK(status != Status::kBadIsa, op, ": packed was made for another instruction set; ",
                  isa_name(isa_active()), " is active: call ", pack_op, " again");
  STD_TORCH_CHECK(status != Status::kBadVersion, op,
                  ": packed was made by another version of qkernels: call ", pack_op, " again");
  STD_TORCH_CHECK(status == Status::kOk, op, ": packed must be an unchanged result of ", pack_op,
                  ", got other or damaged bytes");
}

void check_packed_tensor(const char* op, const char* pack_op, const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte &&
                      packed.dim() == 1 && (packed.numel() <= 1 || packed.stride(0) == 1),
                  op, ": packed must be a dense uint8 vector on the CPU, made by ", pack_op,
                  ", got ", dtype_text(packed.scalar_type()), " of shape ", shape_text(packed));
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % alignof(PackedHeader) == 0,
                  op, ": packed must start at a multiple of ", alignof(PackedHeader),
                  " bytes, as new tensors of torch do: take packed.clone()");
}

PackedMatrix view_matrix(const char* op, const char* pack_op, const Tensor& packed,
                         int64_t offset) {
  PackedMatrix matrix;
  check_packed(op, pack_op,
               view_packed(static_cast<const uint8_t*>(packed.const_data_ptr()) + offset,
                           packed.numel() - offset, &matrix));
  return matrix;
}

void check_input_type(const char* op, const Tensor& input, bool packed_signed) {
  const ScalarType expected = packed_signed ? ScalarType::Char : ScalarType::Byte;
  STD_TORCH_CHECK(input.scalar_type() == expected, op, ": input must be ", dtype_text(expected),
                  ", as it was when the weight was packed, got ", dtype_text(input.scalar_type()));
}

bool check_residual(const char* op, const OptionalTensor& residual, const Epilogue& epilogue,
                    const std::vector<int64_t>& output_sizes) {
  STD_TORCH_CHECK(residual.has_value() == (epilogue.has_residual != 0), op, ": residual must ",
                  residual.has_value() ? "not " : "", "be given: the weight was packed with",
                  residual.has_value() ? "out" : "", " a residual in its epilogue");
  if (!residual.has_value()) return false;
  STD_TORCH_CHECK(residual->is_cpu(), op, ": residual must be on the CPU");
  const bool is_signed = check_code_type(op, "residual", residual->scalar_type());
  check_zero_point(op, "the residual's zero_point", residual->scalar_type(),
                   epilogue.residual.residual_zero_point);
  STD_TORCH_CHECK(sizes_of(*residual) == output_sizes, op, ": residual must have shape ",
                  sizes_text(output_sizes), ", as the output, got ", shape_text(*residual));
  return is_signed;
}

}  // namespace qk::seam
