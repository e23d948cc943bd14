#include "python/pack_on_grid.h"

#include "python/linear.h"

namespace qk::seam {
namespace {

constexpr const char* kOp = "pack_on_grid";

Tensor checked(const char* name, const Tensor& t, const Tensor& weight, ScalarType dtype,
               int64_t least, int64_t most) {
  check_device(kOp, name, t, weight);
  STD_TORCH_CHECK(t.scalar_type() == dtype && (t.numel() == least || t.numel() == most), kOp, ": ",
                  name, " must be ", dtype_text(dtype), " with ", least,
                  most == least ? "" : " or " + std::to_string(most), " elements, got ",
                  dtype_text(t.scalar_type()), " of shape ", shape_text(t));
  return torch::stable::contiguous(t);
}

}  // namespace

OnGridCall check_pack_on_grid(const Tensor& weight, const Tensor& weight_scale,
                              const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                              const Tensor& input_scale, const Tensor& input_zero_point,
                              ScalarType input_dtype, const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, kOp, ": weight must be int8, got ",
                  dtype_text(weight.scalar_type()));
  OnGridCall call;
  if (geometry.empty()) {
    STD_TORCH_CHECK(weight.dim() == 2, kOp,
                    ": weight must have shape [out_features, in_features] without a geometry, got ",
                    shape_text(weight));
    call.shape.out_channels = weight.size(0);
    call.shape.in_channels = weight.size(1);
  } else {
    const ConvNumbers numbers = conv_numbers(kOp, geometry);
    std::vector<int64_t> sizes = sizes_of(weight);
    STD_TORCH_CHECK(weight.dim() >= 3 && weight.numel() > 0, kOp,
                    ": weight must have 3, 4 or 5 dimensions and not be empty, got shape ",
                    shape_text(weight));
    sizes.erase(sizes.begin(), sizes.begin() + 2);
    STD_TORCH_CHECK(sizes == numbers.kernel, kOp,
                    ": weight must have the kernel of geometry, got shape ", shape_text(weight));
    call.shape = check_conv_shape(kOp, numbers, weight.size(0), weight.size(1));
  }
  const int64_t channels = call.shape.out_channels;
  call.input_signed = check_code_type(kOp, "input_dtype", input_dtype);
  call.weight = torch::stable::contiguous(weight);
  call.weight_scale = checked("weight_scale", weight_scale, weight, ScalarType::Float, 1, channels);
  call.per_tensor = weight_scale.numel() == 1 && channels != 1;
  if (weight_zero_point.has_value()) {
    call.weight_zero_point = checked("weight_zero_point", *weight_zero_point, weight,
                                     ScalarType::Int, weight_scale.numel(), weight_scale.numel());
  }
  if (bias.has_value()) {
    call.bias = checked("bias", *bias, weight, ScalarType::Float, channels, channels);
  }
  call.input_scale = checked("input_scale", input_scale, weight, ScalarType::Float, 1, 1);
  call.input_zero_point =
      checked("input_zero_point", input_zero_point, weight, ScalarType::Int, 1, 1);
  return call;
}

namespace {

// The other packings, told the numbers that the tensors hold.
Tensor pack_on_grid(const Tensor& weight, const Tensor& weight_scale,
                    const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                    const Tensor& input_scale, const Tensor& input_zero_point,
                    ScalarType input_dtype, const std::vector<int64_t>& geometry) {
  const OnGridCall call = check_pack_on_grid(weight, weight_scale, weight_zero_point, bias,
                                             input_scale, input_zero_point, input_dtype, geometry);
  const double scale = *call.input_scale.const_data_ptr<float>();
  const int64_t zero_point = *call.input_zero_point.const_data_ptr<int32_t>();
  const std::vector<double> epilogue{1.0, 0.0, 0.0, 0.0};
  const Isa isa = isa_active();
  if (geometry.empty()) {
    const LinearSource linear =
        check_linear_pack(call.weight, call.weight_scale, call.weight_zero_point, call.bias, scale,
                          zero_point, input_dtype, epilogue, ScalarType::Float, std::nullopt);
    const PackSource& source = linear.source;
    Tensor packed =
        empty_on_cpu({packed_igemm_bytes(source.n, 1, source.depth, isa)}, ScalarType::Byte);
    check_packing(kOp, pack_igemm(source, isa, packed.mutable_data_ptr()), source.depth,
                  input_dtype);
    return packed;
  }
  const ConvNumbers numbers = conv_numbers(kOp, geometry);
  ConvPackCall conv = check_conv_pack(
      call.weight, call.weight_scale, call.weight_zero_point, call.bias, scale, zero_point,
      input_dtype, epilogue, ScalarType::Float, std::nullopt, numbers.stride, numbers.padding,
      numbers.dilation, numbers.groups, numbers.transposed, numbers.padding_mode);
  conv.source.keeps = false;
  Tensor packed = empty_on_cpu({packed_conv_bytes(conv.source, isa)}, ScalarType::Byte);
  check_packing(kOp, pack_conv(conv.source, isa, packed.mutable_data_ptr()),
                call.shape.in_per_group() * call.shape.kernel_size(), input_dtype);
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) { m.impl("pack_on_grid", TORCH_BOX(&pack_on_grid)); }

}  // namespace qk::seam
