#include "csrc/binary/cuda.h"
#include "csrc/dorefa/cuda.h"
#include "csrc/fake_quant/fake_quant.h"
#include "python/cuda/adapt.h"
#include "python/fake_quant_backward.h"

namespace qk::seam {
namespace {

using torch::stable::accelerator::DeviceGuard;

// ---- signs ----

Tensor binary_sign(const Tensor& input, bool) {
  const char* op = "binary_sign";
  const DeviceGuard guard(guarded_device(op, input));
  const FloatType type = check_float_type(op, "x", input);
  Tensor out = empty_like(input, input.scalar_type());
  const Tensor x = in_layout_of(out, input);
  check_launch(
      op,
      binary_sign_cuda(
          {.x = x.const_data_ptr(), .y = out.mutable_data_ptr(), .type = type, .n = out.numel()},
          current_stream(input)));
  return out;
}

Tensor binary_sign_backward(const Tensor& grad_in, const Tensor& input, bool is_weight) {
  const char* op = "binary_sign_backward";
  const DeviceGuard guard(guarded_device(op, input));
  const FloatType type = check_grad(op, grad_in, input);
  Tensor out = empty_like(input, input.scalar_type());
  const Tensor x = in_layout_of(out, input), grad = in_layout_of(out, grad_in);
  check_launch(op, binary_sign_backward_cuda({.grad = grad.const_data_ptr(),
                                              .x = x.const_data_ptr(),
                                              .out = out.mutable_data_ptr(),
                                              .type = type,
                                              .n = out.numel(),
                                              .is_weight = is_weight},
                                             current_stream(input)));
  return out;
}

// ---- DoReFa ----

// The arguments that both directions of a weight share. `x`: the input in the layout of `out`.
DorefaWeightCudaArgs weight_args(const char* op, const Tensor& x, const Tensor& scale,
                                 const Tensor& zero_point, int64_t qmin, int64_t qmax,
                                 const Tensor& workspace, Tensor out) {
  STD_TORCH_CHECK(qmin >= -kFakeQuantLimit && qmax <= kFakeQuantLimit, op,
                  ": qmin and qmax must be in [-2^21, 2^21], got qmin ", qmin, " and qmax ", qmax);
  const GridView grid = check_grid(op, x, scale, zero_point, std::nullopt, qmin, qmax);
  return {.grad = nullptr,
          .x = x.const_data_ptr(),
          .out = out.mutable_data_ptr(),
          .type = check_float_type(op, "x", x),
          .n = out.numel(),
          .scale = grid.scale,
          .zero_point = grid.zero_point,
          .qmin = static_cast<int32_t>(qmin),
          .qmax = static_cast<int32_t>(qmax),
          .workspace = workspace.mutable_data_ptr()};
}

Tensor weight_workspace(const Tensor& x) {
  return empty(x, {dorefa_cuda_workspace(x.numel())}, ScalarType::Byte);
}

Tensor dorefa_weight(const Tensor& input, const Tensor& scale_in, const Tensor& zero_point_in,
                     int64_t qmin, int64_t qmax) {
  const char* op = "dorefa_weight";
  const DeviceGuard guard(guarded_device(op, input));
  check_float_type(op, "x", input);
  const Tensor scale = torch::stable::contiguous(scale_in);
  const Tensor zero_point = torch::stable::contiguous(zero_point_in);
  Tensor out = empty_like(input, input.scalar_type());
  const Tensor x = in_layout_of(out, input), workspace = weight_workspace(input);
  check_launch(op,
               dorefa_weight_cuda(weight_args(op, x, scale, zero_point, qmin, qmax, workspace, out),
                                  current_stream(input)));
  return out;
}

Tensor dorefa_weight_backward(const Tensor& grad_in, const Tensor& input, const Tensor& scale_in,
                              const Tensor& zero_point_in, int64_t qmin, int64_t qmax) {
  const char* op = "dorefa_weight_backward";
  const DeviceGuard guard(guarded_device(op, input));
  check_grad(op, grad_in, input);
  const Tensor scale = torch::stable::contiguous(scale_in);
  const Tensor zero_point = torch::stable::contiguous(zero_point_in);
  Tensor out = empty_like(input, input.scalar_type());
  const Tensor x = in_layout_of(out, input), grad = in_layout_of(out, grad_in);
  const Tensor workspace = weight_workspace(input);
  DorefaWeightCudaArgs args = weight_args(op, x, scale, zero_point, qmin, qmax, workspace, out);
  args.grad = grad.const_data_ptr();
  check_launch(op, dorefa_weight_backward_cuda(args, current_stream(input)));
  return out;
}

// A seed on the CPU is a number, as the launch is prepared; one on the device is read there.
Tensor dorefa_gradient(const Tensor& input, const Tensor& seed, int64_t bits) {
  const char* op = "dorefa_gradient";
  const DeviceGuard guard(guarded_device(op, input));
  const FloatType type = check_float_type(op, "grad", input);
  STD_TORCH_CHECK(seed.is_cpu() || seed.get_device_index() == input.get_device_index(), op,
                  ": seed must be on the CPU or where grad is, got one on ", device_text(seed));
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op,
                  ": seed must be an int64 tensor of 1 element, got ",
                  dtype_text(seed.scalar_type()), " of shape ", shape_text(seed));
  STD_TORCH_CHECK(bits >= 1 && bits <= 16, op, ": bits must be in [1, 16], got ", bits);
  const int64_t rows = input.dim() == 0 ? 1 : input.size(0);
  // Samples one after the other in memory.
  const bool rowwise = is_dense(input) && (input.dim() == 0 || input.numel() == 0 || rows == 1 ||
                                           input.stride(0) * rows == input.numel());
  const Tensor grad = rowwise ? input : torch::stable::contiguous(input);
  Tensor out = empty_like(grad, grad.scalar_type());
  const auto* number = static_cast<const int64_t*>(seed.const_data_ptr());
  check_launch(op, dorefa_gradient_cuda({.grad = grad.const_data_ptr(),
                                         .out = out.mutable_data_ptr(),
                                         .type = type,
                                         .rows = rows,
                                         .inner = rows == 0 ? 0 : grad.numel() / rows,
                                         .steps = static_cast<int32_t>((int64_t{1} << bits) - 1),
                                         .seed = seed.is_cpu() ? nullptr : number,
                                         .seed_value = seed.is_cpu() ? *number : 0},
                                        current_stream(input)));
  return rowwise ? out : copy_in_layout(out, input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("binary_sign", TORCH_BOX(&binary_sign));
  m.impl("binary_sign_backward", TORCH_BOX(&binary_sign_backward));
  m.impl("dorefa_weight", TORCH_BOX(&dorefa_weight));
  m.impl("dorefa_weight_backward", TORCH_BOX(&dorefa_weight_backward));
  m.impl("dorefa_gradient", TORCH_BOX(&dorefa_gradient));
}

}  // namespace qk::seam
