#include "python/conv.h"

namespace qk::seam {
namespace {

// One integer a spatial dimension, into the last of the three dimensions.
void check_sizes(const char* op, const char* name, const std::vector<int64_t>& list,
                 int64_t spatial, int64_t lowest, int64_t* to) {
  STD_TORCH_CHECK(static_cast<int64_t>(list.size()) == spatial, op, ": ", name, " must have ",
                  spatial, " elements (one a spatial dimension), got ", list.size());
  for (int64_t d = 0; d < spatial; ++d) {
    STD_TORCH_CHECK(list[d] >= lowest && list[d] <= INT32_MAX, op, ": ", name, " must be at least ",
                    lowest, ", got ", list[d]);
    to[kConvDims - spatial + d] = list[d];
  }
}

PaddingMode check_padding_mode(const std::string& name, bool transposed) {
  STD_TORCH_CHECK(!transposed || name == "zeros",
                  "conv_pack: padding_mode of a transposed convolution must be 'zeros', got '",
                  name, "'");
  if (name == "zeros") return PaddingMode::kZeros;
  if (name == "reflect") return PaddingMode::kReflect;
  if (name == "replicate") return PaddingMode::kReplicate;
  STD_TORCH_CHECK(
      name == "circular",
      "conv_pack: padding_mode must be 'zeros', 'reflect', 'replicate' or 'circular', got '", name,
      "'");
  return PaddingMode::kCircular;
}

}  // namespace

ConvNumbers conv_numbers(const char* op, const std::vector<int64_t>& geometry) {
  static constexpr const char* kModes[] = {"zeros", "reflect", "replicate", "circular"};
  const auto length = static_cast<int64_t>(geometry.size());
  const int64_t dims = (length - 3) / 5;
  STD_TORCH_CHECK(dims >= 1 && dims <= kConvDims && length == 5 * dims + 3 &&
                      geometry[length - 1] >= 0 && geometry[length - 1] < 4,
                  op, ": geometry must be made by conv_geometry(), got ", length, " numbers");
  const auto part = [&](int64_t first, int64_t count) {
    const auto begin = geometry.begin() + first * dims;
    return std::vector<int64_t>(begin, begin + count * dims);
  };
  return {part(0, 1),
          part(1, 1),
          part(2, 2),
          part(4, 1),
          geometry[length - 3],
          geometry[length - 2] != 0,
          kModes[geometry[length - 1]]};
}

ConvShape check_conv_shape(const char* op, const ConvNumbers& numbers, int64_t channels_first,
                           int64_t channels_second) {
  const auto spatial = static_cast<int64_t>(numbers.kernel.size());
  const int64_t groups = numbers.groups;
  const bool transposed = numbers.transposed;
  STD_TORCH_CHECK(groups >= 1 && channels_first % groups == 0, op,
                  ": groups must be positive and divide weight.size(0), got ", groups, " for ",
                  channels_first, " channels");
  ConvShape s;
  s.spatial_dims = static_cast<int32_t>(spatial);
  s.transposed = transposed;
  s.groups = groups;
  s.in_channels = transposed ? channels_first : channels_second * groups;
  s.out_channels = transposed ? channels_second * groups : channels_first;
  s.padding_mode = check_padding_mode(numbers.padding_mode, transposed);
  check_sizes(op, "the weight's spatial size", numbers.kernel, spatial, 1, s.kernel);
  check_sizes(op, "stride", numbers.stride, spatial, 1, s.stride);
  check_sizes(op, "dilation", numbers.dilation, spatial, 1, s.dilation);
  const std::vector<int64_t>& padding = numbers.padding;
  STD_TORCH_CHECK(static_cast<int64_t>(padding.size()) == 2 * spatial, op, ": padding must have ",
                  2 * spatial, " elements (before and after for each spatial dimension), got ",
                  padding.size());
  for (int64_t d = 0; d < spatial; ++d) {
    for (int64_t side = 0; side < 2; ++side) {
      const int64_t value = padding[2 * d + side];
      STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, op, ": padding must be at least 0, got ",
                      value);
      (side == 0 ? s.pad_lo : s.pad_hi)[kConvDims - spatial + d] = value;
    }
  }
  STD_TORCH_CHECK(qk::check_conv_shape(s) == Status::kOk, op,
                  ": weight must have fewer than 2^48 elements, got ", s.out_channels,
                  " output and ", s.in_channels, " input channels");
  return s;
}

ConvPackCall check_conv_pack(const Tensor& weight, const Tensor& weight_scale,
                             const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                             double input_scale, int64_t input_zero_point, ScalarType input_dtype,
                             const std::vector<double>& epilogue, ScalarType output_dtype,
                             const OptionalTensor& table, const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, int64_t groups, bool transposed,
                             const std::string& padding_mode) {
  STD_TORCH_CHECK(weight.dim() >= 3 && weight.dim() <= 5,
                  "conv_pack: weight must have 3, 4 or 5 dimensions, got shape ",
                  shape_text(weight));
  STD_TORCH_CHECK(weight.numel() > 0, "conv_pack: weight must not be empty, got shape ",
                  shape_text(weight));
  ConvNumbers numbers{sizes_of(weight), stride,     padding,     dilation,
                      groups,           transposed, padding_mode};
  numbers.kernel.erase(numbers.kernel.begin(), numbers.kernel.begin() + 2);
  const ConvShape shape = check_conv_shape("conv_pack", numbers, weight.size(0), weight.size(1));
  STD_TORCH_CHECK(weight.is_cpu(), "conv_pack: weight must be on the CPU");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char, "conv_pack: weight must be int8, got ",
                  dtype_text(weight.scalar_type()));
  const bool input_signed = check_code_type("conv_pack", "input_dtype", input_dtype);
  check_zero_point("conv_pack", "input_zero_point", input_dtype, input_zero_point);
  ConvPackCall call{
      torch::stable::contiguous(weight),
      check_weight_grid("conv_pack", weight_scale, weight_zero_point, bias, shape.out_channels),
      {}};
  const OutputGrid output = check_epilogue("conv_pack", epilogue, output_dtype, table);
  call.source = {.shape = shape,
                 .weight = call.weight.const_data_ptr<int8_t>(),
                 .weight_scale = call.grid.scale_data(),
                 .weight_zero_point = call.grid.zero_point_data(),
                 .per_tensor = call.grid.per_tensor,
                 .bias = call.grid.bias_data(),
                 .input_scale = check_scale("conv_pack", "input_scale", input_scale),
                 .input_zero_point = static_cast<int32_t>(input_zero_point),
                 .input_signed = input_signed,
                 .output_scale = output.scale,
                 .epilogue = output.epilogue};
  return call;
}

ConvExtent check_conv_extent(const ConvShape& s, const Tensor& input,
                             const std::vector<int64_t>& output_size) {
  STD_TORCH_CHECK(input.dim() == s.spatial_dims + 2 && input.size(1) == s.in_channels,
                  "conv: input must be [N, ", s.in_channels, ", ", s.spatial_dims,
                  " spatial dimensions], got shape ", shape_text(input));
  STD_TORCH_CHECK(static_cast<int64_t>(output_size.size()) == s.spatial_dims,
                  "conv: output_size must have ", s.spatial_dims,
                  " elements (one a spatial dimension), got ", output_size.size());
  ConvExtent e;
  e.batch = input.size(0);
  for (int64_t d = 0; d < s.spatial_dims; ++d) {
    e.in[kConvDims - s.spatial_dims + d] = input.size(2 + d);
    e.out[kConvDims - s.spatial_dims + d] = output_size[d];
  }
  STD_TORCH_CHECK(qk::check_conv_extent(s, e) == Status::kOk,
                  "conv: output_size must be positive and ",
                  "fit the input, kernel, stride, padding and dilation (reflect padding must be ",
                  "smaller than the input, circular padding must be at "
                  "most the input), got ",
                  sizes_text(output_size), " for an input of shape ", shape_text(input));
  return e;
}

namespace {

Tensor conv_pack(const Tensor& weight, const Tensor& weight_scale,
                 const OptionalTensor& weight_zero_point, const OptionalTensor& bias,
                 double input_scale, int64_t input_zero_point, ScalarType input_dtype,
                 const std::vector<double>& epilogue, ScalarType output_dtype,
                 const OptionalTensor& table, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                 int64_t groups, bool transposed, const std::string& padding_mode) {
  const ConvPackCall call = check_conv_pack(
      weight, weight_scale, weight_zero_point, bias, input_scale, input_zero_point, input_dtype,
      epilogue, output_dtype, table, stride, padding, dilation, groups, transposed, padding_mode);
  const ConvShape& shape = call.source.shape;
  const Isa isa = isa_active();
  Tensor packed = empty_on_cpu({packed_conv_bytes(call.source, isa)}, ScalarType::Byte);
  check_packing("conv_pack", pack_conv(call.source, isa, packed.mutable_data_ptr()),
                shape.in_per_group() * shape.kernel_size(), input_dtype);
  return packed;
}

// The geometry is in the packed bytes.
Tensor conv(const Tensor& input, const Tensor& packed, const OptionalTensor& residual,
            int64_t out_channels, const std::vector<int64_t>& output_size, ScalarType output_dtype,
            const std::vector<int64_t>&) {
  check_packed_tensor("conv", "conv_pack", packed);
  ConvArgs args;
  check_packed("conv", "conv_pack",
               view_packed_conv(packed.const_data_ptr(), packed.numel(), &args.packed));
  const PackedConvHeader& header = *args.packed;
  STD_TORCH_CHECK(input.is_cpu(), "conv: input must be on the CPU, as packed is");
  check_input_type("conv", input, header.input_signed);
  STD_TORCH_CHECK(header.epilogue.output == check_output_type("conv", output_dtype),
                  "conv: output_dtype must be the one that the weight was packed with, got ",
                  dtype_text(output_dtype));
  STD_TORCH_CHECK(out_channels == header.shape.out_channels, "conv: out_channels must be ",
                  header.shape.out_channels, ", as packed, got ", out_channels);
  args.extent = check_conv_extent(header.shape, input, output_size);
  std::vector<int64_t> sizes{input.size(0), out_channels};
  sizes.insert(sizes.end(), output_size.begin(), output_size.end());
  args.residual_signed = check_residual("conv", residual, header.epilogue, sizes);

  const Tensor x = as_channels_last(input);
  Tensor out = empty_channels_last(input, sizes, output_dtype);
  args.input = static_cast<const uint8_t*>(x.const_data_ptr());
  args.out = out.mutable_data_ptr();
  OptionalTensor other, workspace;
  if (residual.has_value()) {
    other = as_channels_last(*residual);
    args.residual = static_cast<const uint8_t*>(other->const_data_ptr());
  }
  const Parallel threads = torch_threads();
  if (const int64_t bytes = conv_workspace_bytes(args, threads); bytes > 0) {
    workspace = empty_on_cpu({bytes}, ScalarType::Byte);
    args.workspace = workspace->mutable_data_ptr();
  }
  qk::conv(args, threads);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("conv_pack", TORCH_BOX(&conv_pack));
  m.impl("conv", TORCH_BOX(&conv));
}

}  // namespace qk::seam
