#include "python/pack_on_grid.h"

#include "csrc/conv/cuda_device_pack.h"
#include "python/cuda/adapt.h"

namespace qk::seam {
namespace {

// Nothing is read on the host: what the values must be is not checked.
Tensor pack_on_grid(const Tensor& weight, const Tensor& weight_scale,
                    const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                    const Tensor& input_scale, const Tensor& input_zero_point,
                    ScalarType input_dtype, const std::vector<int64_t>& geometry) {
  constexpr const char* op = "pack_on_grid";
  const torch::stable::accelerator::DeviceGuard guard(guarded_device(op, weight));
  const OnGridCall call = check_pack_on_grid(weight, weight_scale, weight_zero_point, bias,
                                             input_scale, input_zero_point, input_dtype, geometry);
  const ConvShape& shape = call.shape;
  const int64_t products = shape.in_per_group() * shape.kernel_size();
  // The zero points are not known: the largest distances that there are.
  const int64_t reach = 255 * (call.weight_zero_point.has_value() ? 255 : 128);
  check_packing(op, products * reach <= INT32_MAX ? Status::kOk : Status::kKTooLarge, products,
                input_dtype);
  STD_TORCH_CHECK(shape.out_channels <= INT32_MAX && shape.in_channels <= INT32_MAX, op,
                  ": weight must have fewer than 2^31 channels, got shape ", shape_text(weight));
  ConvDeviceSource given{};
  given.source.shape = shape;
  given.source.weight = call.weight.const_data_ptr<int8_t>();
  given.source.weight_scale = call.weight_scale.const_data_ptr<float>();
  if (call.weight_zero_point.has_value()) {
    given.source.weight_zero_point = call.weight_zero_point->const_data_ptr<int32_t>();
  }
  given.source.per_tensor = call.per_tensor;
  if (call.bias.has_value()) given.source.bias = call.bias->const_data_ptr<float>();
  given.source.input_signed = call.input_signed;
  given.source.output_scale = 1.0f;
  given.source.epilogue.output = OutputType::kF32;
  given.input_scale = call.input_scale.const_data_ptr<float>();
  given.input_zero_point = call.input_zero_point.const_data_ptr<int32_t>();
  Tensor packed = empty(weight, {packed_conv_cuda_bytes(shape, conv_cuda_facts(given.source))},
                        ScalarType::Byte);
  if (shape.out_channels == 0) return packed;
  check_launch(op, pack_conv_on_device(given, packed.mutable_data_ptr(), current_stream(weight)));
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) { m.impl("pack_on_grid", TORCH_BOX(&pack_on_grid)); }

}  // namespace qk::seam
