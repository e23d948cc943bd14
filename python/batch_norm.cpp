#include "csrc/batch_norm/batch_norm.h"

#include <tuple>
#include <vector>

#include "csrc/fake_quant/fake_quant.h"
#include "python/fake_quant_backward.h"

namespace qk::seam {
namespace {

struct Matrix {
  int64_t rows, channels;
};

Matrix check_matrix(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), op, ": ", name, " must be on the CPU, got ", device_text(x));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
                  dtype_text(x.scalar_type()));
  STD_TORCH_CHECK(is_channels_last(x), op, ": ", name,
                  " must be [N, C, ...] in channels_last memory, got shape ", shape_text(x),
                  " with other strides");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(x.numel() > 0 && x.numel() / channels >= 2, op, ": ", name,
                  " must have at least 2 values a channel, got shape ", shape_text(x));
  return {x.numel() / channels, channels};
}

Tensor check_channels(const char* op, const char* name, const Tensor& t, int64_t channels) {
  STD_TORCH_CHECK(
      t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.numel() == channels,
      op, ": ", name, " must be float32 [", channels, "] on the CPU, got ",
      dtype_text(t.scalar_type()), " of shape ", shape_text(t));
  return torch::stable::contiguous(t);
}

const float* values(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

float* running(const char* op, const char* name, Tensor& t, int64_t channels) {
  check_channels(op, name, t, channels);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  return t.mutable_data_ptr<float>();
}

Tensor vector_of(int64_t channels) { return empty_on_cpu({channels}, ScalarType::Float); }

// A zero point in float32 is learned, and rounded here.
NormGrid check_norm_grid(const char* op, const Tensor& x, const Tensor& scale,
                         const Tensor& zero_point, int64_t qmin, int64_t qmax,
                         std::optional<double> floor, std::optional<double> ceiling) {
  check_grid_ends(op, qmin, qmax);
  const bool learned = zero_point.scalar_type() == ScalarType::Float;
  const GridView view = learned
                            ? check_learned_grid(op, x, scale, zero_point, std::nullopt, qmin, qmax)
                            : check_grid(op, x, scale, zero_point, std::nullopt, qmin, qmax);
  const Limits limits = check_limits(op, floor, ceiling);
  return {.scale = *view.scale,
          .zero_point = *view.zero_point,
          .qmin = static_cast<int32_t>(qmin),
          .qmax = static_cast<int32_t>(qmax),
          .floor = limits.floor,
          .ceiling = limits.ceiling};
}

// Straight through a clamp: it leaves fewer codes.
NormGrid without_clamp(const NormGrid& grid) {
  const CodeEnds range = clamped_ends(grid.floor, grid.ceiling, 1.0f / grid.scale, grid.zero_point,
                                      grid.qmin, grid.qmax);
  return {
      .scale = grid.scale, .zero_point = grid.zero_point, .qmin = range.qmin, .qmax = range.qmax};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_statistics(
    const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias, Tensor running_mean,
    Tensor running_var, double momentum, double eps) {
  const char* op = "batch_norm_statistics";
  const auto [rows, channels] = check_matrix(op, "x", x);
  if (weight.has_value()) weight = check_channels(op, "weight", *weight, channels);
  if (bias.has_value()) bias = check_channels(op, "bias", *bias, channels);
  STD_TORCH_CHECK(momentum >= 0 && momentum <= 1, op, ": momentum must be in [0, 1], got ",
                  momentum);
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), op, ": eps must not be negative, got ", eps);
  float* means = running(op, "running_mean", running_mean, channels);
  float* variances = running(op, "running_var", running_var, channels);
  Tensor mean = vector_of(channels), inv_std = vector_of(channels);
  Tensor factor = vector_of(channels), shift = vector_of(channels), ends = vector_of(2);
  const Tensor workspace =
      empty_on_cpu({batch_statistics_workspace(rows, channels)}, ScalarType::Double);
  const Extremes extremes = batch_statistics({.x = x.const_data_ptr<float>(),
                                              .rows = rows,
                                              .channels = channels,
                                              .weight = values(weight),
                                              .bias = values(bias),
                                              .running_mean = means,
                                              .running_var = variances,
                                              .momentum = momentum,
                                              .eps = eps,
                                              .mean = mean.mutable_data_ptr<float>(),
                                              .inv_std = inv_std.mutable_data_ptr<float>(),
                                              .factor = factor.mutable_data_ptr<float>(),
                                              .shift = shift.mutable_data_ptr<float>(),
                                              .workspace = workspace.mutable_data_ptr<double>()},
                                             torch_threads());
  ends.mutable_data_ptr<float>()[0] = extremes.low;
  ends.mutable_data_ptr<float>()[1] = extremes.high;
  return {mean, inv_std, factor, shift, ends};
}

std::tuple<Tensor, Tensor> norm_fake_quant(const Tensor& x, const Tensor& factor,
                                           const Tensor& shift, const Tensor& scale,
                                           const Tensor& zero_point, int64_t qmin, int64_t qmax,
                                           std::optional<double> floor,
                                           std::optional<double> ceiling,
                                           std::optional<ScalarType> code_dtype) {
  const char* op = "norm_fake_quant";
  const auto [rows, channels] = check_matrix(op, "x", x);
  const NormGrid grid = check_norm_grid(op, x, scale, zero_point, qmin, qmax, floor, ceiling);
  if (code_dtype.has_value()) {
    check_code_type(op, "code_dtype", *code_dtype);
    check_code_range(op, *code_dtype, qmin, qmax);
  }
  const Tensor factors = check_channels(op, "factor", factor, channels);
  const Tensor shifts = check_channels(op, "shift", shift, channels);
  Tensor y = empty_strided(x, sizes_of(x), strides_of(x), ScalarType::Float);
  Tensor codes = code_dtype.has_value() ? empty_strided(x, sizes_of(x), strides_of(x), *code_dtype)
                                        : empty_on_cpu({0}, ScalarType::Byte);
  qk::norm_fake_quant(
      {.x = x.const_data_ptr<float>(),
       .y = y.mutable_data_ptr<float>(),
       .codes = code_dtype.has_value() ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr,
       .rows = rows,
       .channels = channels,
       .factor = factors.const_data_ptr<float>(),
       .shift = shifts.const_data_ptr<float>(),
       .grid = grid},
      torch_threads());
  return {y, codes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_fake_quant_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& inv_std,
    const Tensor& factor, const Tensor& shift, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax, std::optional<double> floor, std::optional<double> ceiling,
    std::optional<double> grad_factor) {
  const char* op = "norm_fake_quant_backward";
  const auto [rows, channels] = check_matrix(op, "x", x);
  STD_TORCH_CHECK(sizes_of(grad) == sizes_of(x), op, ": grad must have shape ", shape_text(x),
                  ", got ", shape_text(grad));
  STD_TORCH_CHECK(grad.is_cpu() && grad.scalar_type() == ScalarType::Float, op,
                  ": grad must be float32 on the CPU, got ", dtype_text(grad.scalar_type()));
  const bool learned = grad_factor.has_value();
  STD_TORCH_CHECK(!learned || std::isfinite(*grad_factor), op, ": grad_factor must be finite, got ",
                  *grad_factor);
  const NormGrid grid = check_norm_grid(op, x, scale, zero_point, qmin, qmax, floor, ceiling);
  const Tensor means = check_channels(op, "mean", mean, channels);
  const Tensor inverses = check_channels(op, "inv_std", inv_std, channels);
  const Tensor factors = check_channels(op, "factor", factor, channels);
  const Tensor shifts = check_channels(op, "shift", shift, channels);
  const Tensor dense_grad = is_channels_last(grad) ? grad : as_channels_last(grad);
  Tensor out = empty_strided(x, sizes_of(x), strides_of(x), ScalarType::Float);
  Tensor grad_weight = vector_of(channels), grad_bias = vector_of(channels);
  Tensor grad_scale = vector_of(learned ? 1 : 0), grad_zero_point = vector_of(learned ? 1 : 0);
  const Tensor workspace =
      empty_on_cpu({norm_backward_workspace(rows, channels)}, ScalarType::Double);
  norm_backward({.grad = dense_grad.const_data_ptr<float>(),
                 .x = x.const_data_ptr<float>(),
                 .out = out.mutable_data_ptr<float>(),
                 .rows = rows,
                 .channels = channels,
                 .mean = means.const_data_ptr<float>(),
                 .inv_std = inverses.const_data_ptr<float>(),
                 .factor = factors.const_data_ptr<float>(),
                 .shift = shifts.const_data_ptr<float>(),
                 .grid = learned ? grid : without_clamp(grid),
                 .learned = learned,
                 .grad_factor = grad_factor.value_or(1.0),
                 .weight = grad_weight.mutable_data_ptr<float>(),
                 .bias = grad_bias.mutable_data_ptr<float>(),
                 .scale = grad_scale.mutable_data_ptr<float>(),
                 .zero_point = grad_zero_point.mutable_data_ptr<float>(),
                 .workspace = workspace.mutable_data_ptr<double>()},
                torch_threads());
  return {out, grad_weight, grad_bias, grad_scale, grad_zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("norm_fake_quant", TORCH_BOX(&norm_fake_quant));
  m.impl("norm_fake_quant_backward", TORCH_BOX(&norm_fake_quant_backward));
}

}  // namespace qk::seam
