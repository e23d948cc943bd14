#include "python/conv.h"

#include "csrc/conv/cuda.h"
#include "python/cuda/adapt.h"

namespace qk::seam {
namespace {

// Packing reads values, so it waits for the device; it happens once, before any graph is captured.
Tensor conv_pack(const Tensor& weight, const Tensor& weight_scale,
                 const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                 double input_scale, int64_t input_zero_point, ScalarType input_dtype,
                 const std::vector<double>& epilogue, ScalarType output_dtype,
                 const OptionalTensor& table, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                 int64_t groups, bool transposed, const std::string& padding_mode) {
  constexpr const char* op = "conv_pack";
  STD_TORCH_CHECK(weight.is_cuda(), op, ": weight must be on the device of the other tensors");
  const ConvPackCall call =
      check_conv_pack(to_cpu(weight), to_cpu(weight_scale), to_cpu(weight_zero_point), to_cpu(bias),
                      input_scale, input_zero_point, input_dtype, epilogue, output_dtype,
                      to_cpu(table), stride, padding, dilation, groups, transposed, padding_mode);
  const ConvSource& source = call.source;
  Tensor packed = empty_on_cpu({packed_conv_cuda_bytes(source.shape, conv_cuda_facts(source))},
                               ScalarType::Byte);
  check_packing(op, pack_conv_cuda(source, packed.mutable_data_ptr()),
                source.shape.in_per_group() * source.shape.kernel_size(), input_dtype);
  return to_device_of(weight, packed);
}

ConvShape check_geometry(const Tensor& input, int64_t out_channels,
                         const std::vector<int64_t>& geometry) {
  STD_TORCH_CHECK(
      !geometry.empty(),
      "conv: geometry must be given on CUDA, as conv_geometry() makes it, got 0 numbers");
  const ConvNumbers numbers = conv_numbers("conv", geometry);
  const auto dims = static_cast<int64_t>(numbers.kernel.size());
  const int64_t groups = numbers.groups;
  STD_TORCH_CHECK(input.dim() == dims + 2, "conv: input must have ", dims + 2,
                  " dimensions [N, C, *spatial], got shape ", shape_text(input));
  STD_TORCH_CHECK(
      groups >= 1 && input.size(1) % groups == 0 && input.size(1) > 0 && out_channels > 0 &&
          out_channels % groups == 0,
      "conv: input channels and out_channels must be positive multiples of groups, got ",
      input.size(1), " and ", out_channels, " for ", groups, " groups");
  return numbers.transposed
             ? check_conv_shape("conv", numbers, input.size(1), out_channels / groups)
             : check_conv_shape("conv", numbers, out_channels, input.size(1) / groups);
}

Tensor conv(const Tensor& input, const Tensor& packed, const OptionalTensor& residual,
            int64_t out_channels, const std::vector<int64_t>& output_size, ScalarType output_dtype,
            const std::vector<int64_t>& geometry) {
  constexpr const char* op = "conv";
  const torch::stable::accelerator::DeviceGuard guard(guarded_device(op, input));
  check_device(op, "packed", packed, input);
  ConvCudaArgs args{};
  args.shape = check_geometry(input, out_channels, geometry);
  STD_TORCH_CHECK(
      packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() &&
          reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % kPackedAlign == 0 &&
          read_conv_cuda_facts(packed.numel(), args.shape, &args.facts) == Status::kOk,
      op, ": packed must be an unchanged result of conv_pack on CUDA for this geometry, ",
      args.shape.in_channels, " input and ", out_channels, " output channels, got ",
      dtype_text(packed.scalar_type()), " of shape ", shape_text(packed));
  check_input_type(op, input, args.facts.input_signed);
  STD_TORCH_CHECK(args.facts.output == check_output_type(op, output_dtype), op,
                  ": output_dtype must be the one that the weight was packed with, got ",
                  dtype_text(output_dtype));
  args.extent = check_conv_extent(args.shape, input, output_size);
  std::vector<int64_t> sizes{input.size(0), out_channels};
  sizes.insert(sizes.end(), output_size.begin(), output_size.end());
  args.residual_signed = check_residual_cuda(op, residual, args.facts, sizes, input);
  STD_TORCH_CHECK(conv_cuda_fits(args), op,
                  ": input must be smaller for one launch (fewer than 2^31 output pixels, and "
                  "elements of one image), got shape ",
                  shape_text(input), "; split the batch");

  const CudaMachine machine = current_machine(op);
  const Tensor x = as_channels_last(input);
  Tensor out = empty_channels_last(input, sizes, output_dtype), other;
  args.packed = packed.const_data_ptr();
  args.input = static_cast<const uint8_t*>(x.const_data_ptr());
  args.out = out.mutable_data_ptr();
  if (residual.has_value()) {
    other = as_channels_last(*residual);
    args.residual = static_cast<const uint8_t*>(other.const_data_ptr());
  }
  const Tensor workspace = empty(input, {conv_cuda_workspace(args, machine)}, ScalarType::Byte);
  args.workspace = workspace.mutable_data_ptr();
  check_launch(op, conv_cuda(args, machine, current_stream(input)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("conv_pack", TORCH_BOX(&conv_pack));
  m.impl("conv", TORCH_BOX(&conv));
}

}  // namespace qk::seam
