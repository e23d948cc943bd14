#include "python/batch_norm.h"

#include "csrc/batch_norm/cuda.h"
#include "python/cuda/adapt.h"
#include "python/fake_quant_backward.h"

namespace qk::seam {
namespace {

using torch::stable::accelerator::DeviceGuard;

// A grid whose values stay on the device; one element needs no copy, whatever its strides. A zero
// point in float32 is learned.
NormCudaGrid check_norm_grid(const char* op, const Tensor& x, const Tensor& scale,
                             const Tensor& zero_point, int64_t qmin, int64_t qmax,
                             std::optional<double> floor, std::optional<double> ceiling) {
  check_grid_ends(op, qmin, qmax);
  const Limits limits = check_limits(op, floor, ceiling);
  const bool learned = zero_point.scalar_type() == ScalarType::Float;
  if (learned) {
    check_learned_zero_point(op, x, scale, zero_point, qmin, qmax);
    STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, op,
                    ": scale must be torch.float32, got ", dtype_text(scale.scalar_type()));
    STD_TORCH_CHECK(scale.numel() == 1, op, ": scale must have 1 element (per tensor), got shape ",
                    shape_text(scale));
    STD_TORCH_CHECK(zero_point.numel() == 1, op,
                    ": zero_point must have 1 element (per tensor), got shape ",
                    shape_text(zero_point));
  } else {
    check_grid(op, x, scale, zero_point, std::nullopt, qmin, qmax);
  }
  return {.scale = scale.const_data_ptr<float>(),
          .zero_point = learned ? nullptr : zero_point.const_data_ptr<int32_t>(),
          .learned_zero_point = learned ? zero_point.const_data_ptr<float>() : nullptr,
          .qmin = static_cast<int32_t>(qmin),
          .qmax = static_cast<int32_t>(qmax),
          .floor = limits.floor,
          .ceiling = limits.ceiling};
}

FiveTensors batch_norm_statistics(const Tensor& x, const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& bias, const Tensor& running_mean,
                                  const Tensor& running_var, double momentum, double eps) {
  const char* op = "batch_norm_statistics";
  const DeviceGuard guard(guarded_device(op, x));
  StatisticsCall call = check_statistics(x, weight, bias, running_mean, running_var, momentum, eps);
  Tensor workspace =
      empty(x, {batch_statistics_cuda_workspace(call.matrix.rows, call.matrix.channels)},
            ScalarType::Double);
  check_launch(op,
               batch_statistics_cuda(call.args(workspace), call.extremes.mutable_data_ptr<float>(),
                                     current_stream(x)));
  return call.results();
}

std::tuple<Tensor, Tensor> norm_fake_quant(const Tensor& x, const Tensor& factor,
                                           const Tensor& shift, const Tensor& scale,
                                           const Tensor& zero_point, int64_t qmin, int64_t qmax,
                                           std::optional<double> floor,
                                           std::optional<double> ceiling,
                                           std::optional<ScalarType> code_dtype) {
  const char* op = "norm_fake_quant";
  const DeviceGuard guard(guarded_device(op, x));
  NormForwardCall call = check_norm_forward(x, factor, shift, qmin, qmax, code_dtype);
  const NormCudaGrid grid = check_norm_grid(op, x, scale, zero_point, qmin, qmax, floor, ceiling);
  check_launch(op, norm_fake_quant_cuda(call.args<NormFakeQuantCudaArgs>(grid), current_stream(x)));
  return {call.y, call.codes};
}

FiveTensors norm_fake_quant_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                     const Tensor& inv_std, const Tensor& factor,
                                     const Tensor& shift, const Tensor& scale,
                                     const Tensor& zero_point, int64_t qmin, int64_t qmax,
                                     std::optional<double> floor, std::optional<double> ceiling,
                                     std::optional<double> grad_factor) {
  const char* op = "norm_fake_quant_backward";
  const DeviceGuard guard(guarded_device(op, x));
  NormBackwardCall call = check_norm_backward(grad, x, mean, inv_std, factor, shift, grad_factor);
  const NormCudaGrid grid = check_norm_grid(op, x, scale, zero_point, qmin, qmax, floor, ceiling);
  Tensor workspace =
      empty(x, {norm_backward_cuda_workspace(call.matrix.rows, call.matrix.channels)},
            ScalarType::Double);
  check_launch(
      op, norm_backward_cuda(call.args<NormBackwardCudaArgs>(grid, workspace), current_stream(x)));
  return call.results();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("norm_fake_quant", TORCH_BOX(&norm_fake_quant));
  m.impl("norm_fake_quant_backward", TORCH_BOX(&norm_fake_quant_backward));
}

}  // namespace qk::seam
