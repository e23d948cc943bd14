#include "python/binary.h"

#include "csrc/binary/cuda.h"
#include "python/cuda/adapt.h"

namespace qk::seam {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor pack_signs(const Tensor& input, int64_t axis) {
  constexpr const char* op = "pack_signs";
  const DeviceGuard guard(guarded_device(op, input));
  const PackSignsCall call = check_pack_signs(input, axis);
  check_launch(op, binary_pack_cuda(call.args, current_stream(input)));
  return call.out;
}

// On the host, as every packing of weights.
Tensor binary_weight_pack(const Tensor& weight) {
  check_binary_weight(weight);
  return to_device_of(weight, pack_binary_weight(to_cpu(weight)));
}

Tensor run(const char* op, const BinaryCall& call) {
  const BinaryConvArgs& args = call.args;
  STD_TORCH_CHECK(args.images * args.out_size[0] * args.out_size[1] < INT32_MAX &&
                      args.out_channels <= 65535 * kBinaryBlock,
                  op, ": input must have fewer output pixels for one launch (2^31), got ",
                  args.images * args.out_size[0] * args.out_size[1], " of ", args.out_channels,
                  " channels; split the batch");
  check_launch(op, binary_conv_cuda(args, current_stream(call.x)));
  return call.out;
}

Tensor binary_linear(const Tensor& input, const Tensor& packed, const Tensor& scale,
                     const OptionalTensor& bias, int64_t in_features) {
  constexpr const char* op = "binary_linear";
  const DeviceGuard guard(guarded_device(op, input));
  return run(op, check_binary_linear(input, packed, scale, bias, in_features));
}

Tensor binary_conv2d(const Tensor& input, const Tensor& packed, const Tensor& scale,
                     const OptionalTensor& bias, int64_t in_channels,
                     const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  constexpr const char* op = "binary_conv2d";
  const DeviceGuard guard(guarded_device(op, input));
  return run(op, check_binary_conv2d(input, packed, scale, bias, in_channels, kernel_size, stride,
                                     padding, dilation));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("pack_signs", TORCH_BOX(&pack_signs));
  m.impl("binary_weight_pack", TORCH_BOX(&binary_weight_pack));
  m.impl("binary_linear", TORCH_BOX(&binary_linear));
  m.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
}

}  // namespace qk::seam
