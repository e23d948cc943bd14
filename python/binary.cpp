#include "python/binary.h"

namespace qk::seam {
namespace {

Tensor binary_sign(const Tensor& input, bool) {
  const FloatType type = check_float_type("binary_sign", "x", input);
  Tensor out = empty_like(input, input.scalar_type());
  const Tensor x = is_dense(input) ? input : copy_in_layout(input, out);
  qk::binary_sign(
      {.x = x.const_data_ptr(), .y = out.mutable_data_ptr(), .type = type, .n = x.numel()},
      torch_threads());
  return out;
}

Tensor binary_sign_backward(const Tensor& grad_in, const Tensor& input, bool is_weight) {
  const char* op = "binary_sign_backward";
  const FloatType type = check_float_type(op, "x", input);
  STD_TORCH_CHECK(grad_in.is_cpu() && grad_in.scalar_type() == input.scalar_type() &&
                      sizes_of(grad_in) == sizes_of(input),
                  op, ": grad must have the dtype and shape of x, ",
                  dtype_text(input.scalar_type()), " ", shape_text(input), ", got ",
                  dtype_text(grad_in.scalar_type()), " ", shape_text(grad_in));
  Tensor out = empty_like(input, input.scalar_type());
  const Tensor x = is_dense(input) ? input : copy_in_layout(input, out);
  const Tensor grad =
      strides_of(grad_in) == strides_of(out) ? grad_in : copy_in_layout(grad_in, out);
  qk::binary_sign_backward({.grad = grad.const_data_ptr(),
                            .x = x.const_data_ptr(),
                            .out = out.mutable_data_ptr(),
                            .type = type,
                            .n = x.numel(),
                            .is_weight = is_weight},
                           torch_threads());
  return out;
}

// The shape of x with `axis` moved to the end and packed.
std::vector<int64_t> packed_shape(const Tensor& x, int64_t axis) {
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (d != axis) shape.push_back(x.size(d));
  }
  shape.push_back(binary_words(x.size(axis)));
  return shape;
}

}  // namespace

PackSignsCall check_pack_signs(const Tensor& input, int64_t axis_in) {
  const char* op = "pack_signs";
  const FloatType type = check_float_type(op, "x", input);
  const int64_t axis = *check_axis(op, input, axis_in);
  PackSignsCall call;
  call.out = empty(input, packed_shape(input, axis), ScalarType::Long);
  call.x = torch::stable::contiguous(input);
  const Tensor& x = call.x;
  int64_t inner = 1, outer = 1;
  for (int64_t d = 0; d < axis; ++d) outer *= x.size(d);
  for (int64_t d = axis + 1; d < x.dim(); ++d) inner *= x.size(d);
  call.args = {.x = x.const_data_ptr(),
               .type = type,
               .rows = outer * inner,
               .n = x.size(axis),
               .inner = inner,
               .outer_stride = x.size(axis) * inner,
               .inner_stride = 1,
               .stride = inner,
               .out = reinterpret_cast<uint64_t*>(call.out.mutable_data_ptr<int64_t>())};
  return call;
}

void check_binary_weight(const Tensor& weight) {
  const char* op = "binary_weight_pack";
  check_float_type(op, "weight", weight);
  STD_TORCH_CHECK(weight.dim() == 2 || weight.dim() == 4, op,
                  ": weight must have shape [out, in] or [out, in, height, width], got ",
                  shape_text(weight));
}

Tensor pack_binary_weight(const Tensor& weight) {
  const PackSignsCall rows = check_pack_signs(weight, 1);
  if (rows.out.numel() > 0) binary_pack(rows.args, torch_threads());
  const int64_t channels = weight.size(0);
  const int64_t words = channels > 0 ? rows.out.numel() / channels : 0;
  Tensor out = empty_on_cpu({binary_blocks(channels), words, kBinaryBlock}, ScalarType::Long);
  binary_pack_weight(rows.args.out, channels, words,
                     reinterpret_cast<uint64_t*>(out.mutable_data_ptr<int64_t>()));
  return out;
}

namespace {

void check_words(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long, op, ": ", name,
                  " must be an int64 tensor of packed signs, got ", dtype_text(t.scalar_type()));
}

Tensor checked_terms(const char* op, const char* name, const Tensor& t, const Tensor& input,
                     int64_t outputs) {
  check_device(op, name, t, input);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == outputs, op, ": ", name,
                  " must be float32 with one element an output, got ", dtype_text(t.scalar_type()),
                  " of shape ", shape_text(t));
  return torch::stable::contiguous(t);
}

// Checks and fills in what a linear layer and a convolution share.
BinaryCall check_product(const char* op, const Tensor& input, const Tensor& packed_in,
                         const Tensor& scale, const OptionalTensor& bias, Tensor out,
                         BinaryConvArgs args) {
  check_device(op, "packed", packed_in, input);
  check_words(op, "input", input);
  check_words(op, "packed", packed_in);
  const int64_t taps = args.kernel[0] * args.kernel[1];
  // Sums of more are not exact in float32.
  STD_TORCH_CHECK(args.in_channels >= 1 && args.in_channels <= (int64_t{1} << 24) / taps, op,
                  ": the number of inputs times the taps of the kernel must be in [1, 2^24], got ",
                  args.in_channels, " inputs and ", taps, " taps");
  const int64_t words = binary_words(args.in_channels);
  STD_TORCH_CHECK(input.size(input.dim() - 1) == words, op, ": input must hold ", words,
                  " words for ", args.in_channels, " inputs, got shape ", shape_text(input));
  STD_TORCH_CHECK(packed_in.dim() == 3 && packed_in.size(0) == binary_blocks(args.out_channels) &&
                      packed_in.size(1) == taps * words && packed_in.size(2) == kBinaryBlock,
                  op, ": packed must be made by binary_weight_pack from a weight of ",
                  args.out_channels, " outputs, ", args.in_channels, " inputs and ", taps,
                  " taps, got shape ", shape_text(packed_in));
  BinaryCall call;
  call.x = torch::stable::contiguous(input);
  call.packed = torch::stable::contiguous(packed_in);
  call.scale = checked_terms(op, "scale", scale, input, args.out_channels);
  if (bias.has_value()) call.bias = checked_terms(op, "bias", *bias, input, args.out_channels);
  call.out = out;
  call.args = args;
  call.args.input = reinterpret_cast<const uint64_t*>(call.x.const_data_ptr<int64_t>());
  call.args.weight = reinterpret_cast<const uint64_t*>(call.packed.const_data_ptr<int64_t>());
  call.args.scale = call.scale.const_data_ptr<float>();
  call.args.bias = call.bias.has_value() ? call.bias->const_data_ptr<float>() : nullptr;
  call.args.out = out.mutable_data_ptr<float>();
  return call;
}

}  // namespace

BinaryCall check_binary_linear(const Tensor& input, const Tensor& packed, const Tensor& scale,
                               const OptionalTensor& bias, int64_t in_features) {
  STD_TORCH_CHECK(input.dim() >= 1, "binary_linear: input must have at least 1 dimension");
  std::vector<int64_t> shape = sizes_of(input);
  const int64_t rows = input.numel() / (shape.back() > 0 ? shape.back() : 1);
  shape.back() = scale.numel();
  const Tensor out = empty(input, shape, ScalarType::Float);
  BinaryConvArgs args{};
  args.images = 1;
  args.in_channels = in_features;
  args.out_channels = scale.numel();
  args.size[0] = args.out_size[0] = rows;
  args.size[1] = args.out_size[1] = 1;
  for (int d = 0; d < 2; ++d) args.kernel[d] = args.stride[d] = args.dilation[d] = 1;
  return check_product("binary_linear", input, packed, scale, bias, out, args);
}

BinaryCall check_binary_conv2d(const Tensor& input, const Tensor& packed, const Tensor& scale,
                               const OptionalTensor& bias, int64_t in_channels,
                               const std::vector<int64_t>& kernel_size,
                               const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation) {
  const char* op = "binary_conv2d";
  STD_TORCH_CHECK(input.dim() == 4, op, ": input must have shape [N, H, W, words], got ",
                  shape_text(input));
  for (const auto* values : {&kernel_size, &stride, &padding, &dilation}) {
    STD_TORCH_CHECK(values->size() == 2, op,
                    ": kernel_size, stride, padding and dilation must have 2 elements, got ",
                    values->size());
  }
  BinaryConvArgs args{};
  args.images = input.size(0);
  args.in_channels = in_channels;
  args.out_channels = scale.numel();
  for (int d = 0; d < 2; ++d) {
    constexpr int64_t kMost = int64_t{1} << 20;
    STD_TORCH_CHECK(kernel_size[d] >= 1 && stride[d] >= 1 && dilation[d] >= 1 && padding[d] >= 0 &&
                        kernel_size[d] <= kMost && stride[d] <= kMost && dilation[d] <= kMost &&
                        padding[d] <= kMost,
                    op,
                    ": kernel_size, stride and dilation must be at least 1 and padding at least 0, "
                    "all at most 2^20, got ",
                    kernel_size[d], ", ", stride[d], ", ", dilation[d], " and ", padding[d]);
    args.size[d] = input.size(1 + d);
    args.kernel[d] = kernel_size[d];
    args.stride[d] = stride[d];
    args.padding[d] = padding[d];
    args.dilation[d] = dilation[d];
    const int64_t reach = dilation[d] * (kernel_size[d] - 1) + 1;
    STD_TORCH_CHECK(args.size[d] + 2 * padding[d] >= reach, op,
                    ": the kernel must fit into the padded input, got ", reach, " over ",
                    args.size[d] + 2 * padding[d], " in spatial dimension ", d);
    args.out_size[d] = (args.size[d] + 2 * padding[d] - reach) / stride[d] + 1;
  }
  const int64_t segments = kernel_size[0] * (dilation[1] == 1 ? 1 : kernel_size[1]);
  STD_TORCH_CHECK(segments <= kBinarySegments, op, ": kernel_size must give at most ",
                  kBinarySegments, " runs of taps, got ", segments);
  const Tensor out = empty_channels_last(
      input, {args.images, args.out_channels, args.out_size[0], args.out_size[1]},
      ScalarType::Float);
  return check_product(op, input, packed, scale, bias, out, args);
}

namespace {

Tensor pack_signs(const Tensor& input, int64_t axis) {
  const PackSignsCall call = check_pack_signs(input, axis);
  if (call.out.numel() > 0) binary_pack(call.args, torch_threads());
  return call.out;
}

Tensor binary_weight_pack(const Tensor& weight) {
  check_binary_weight(weight);
  return pack_binary_weight(weight);
}

Tensor run(const BinaryCall& call) {
  if (call.out.numel() > 0) binary_conv(call.args, torch_threads());
  return call.out;
}

Tensor binary_linear(const Tensor& input, const Tensor& packed, const Tensor& scale,
                     const OptionalTensor& bias, int64_t in_features) {
  return run(check_binary_linear(input, packed, scale, bias, in_features));
}

Tensor binary_conv2d(const Tensor& input, const Tensor& packed, const Tensor& scale,
                     const OptionalTensor& bias, int64_t in_channels,
                     const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  return run(check_binary_conv2d(input, packed, scale, bias, in_channels, kernel_size, stride,
                                 padding, dilation));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("binary_sign", TORCH_BOX(&binary_sign));
  m.impl("binary_sign_backward", TORCH_BOX(&binary_sign_backward));
  m.impl("pack_signs", TORCH_BOX(&pack_signs));
  m.impl("binary_weight_pack", TORCH_BOX(&binary_weight_pack));
  m.impl("binary_linear", TORCH_BOX(&binary_linear));
  m.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
}

}  // namespace qk::seam
