#include "python/batch_norm.h"

#include "python/fake_quant_backward.h"

namespace qk::seam {
namespace {

Matrix check_matrix(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, op, ": x must be float32, got ",
                  dtype_text(x.scalar_type()));
  STD_TORCH_CHECK(is_channels_last(x), op,
                  ": x must be [N, C, ...] in channels_last memory, got shape ", shape_text(x),
                  " with other strides");
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(x.numel() > 0 && x.numel() / channels >= 2, op,
                  ": x must have at least 2 values a channel, got shape ", shape_text(x));
  return {x.numel() / channels, channels};
}

void check_vector(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_device(op, name, t, x);
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.numel() == channels, op,
                  ": ", name, " must be float32 [", channels, "], got ",
                  dtype_text(t.scalar_type()), " of shape ", shape_text(t));
}

Tensor check_channels(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_vector(op, name, t, x);
  return torch::stable::contiguous(t);
}

std::optional<Tensor> check_parameter(const char* op, const char* name,
                                      const std::optional<Tensor>& t, const Tensor& x) {
  if (!t.has_value()) return t;
  return check_channels(op, name, *t, x);
}

// What is written in place.
Tensor check_running(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_vector(op, name, t, x);
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
  return t;
}

Tensor check_gradient(const char* op, const Tensor& grad, const Tensor& x) {
  check_device(op, "grad", grad, x);
  STD_TORCH_CHECK(sizes_of(grad) == sizes_of(x), op, ": grad must have shape ", shape_text(x),
                  ", got ", shape_text(grad));
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float, op, ": grad must be float32, got ",
                  dtype_text(grad.scalar_type()));
  return as_channels_last(grad);
}

Tensor floats_like(const Tensor& x, int64_t size) { return empty(x, {size}, ScalarType::Float); }

Tensor matrix_like(const Tensor& x, ScalarType dtype) {
  return empty_strided(x, sizes_of(x), strides_of(x), dtype);
}

const float* values(const std::optional<Tensor>& t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

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

FiveTensors batch_norm_statistics(const Tensor& x, const std::optional<Tensor>& weight,
                                  const std::optional<Tensor>& bias, const Tensor& running_mean,
                                  const Tensor& running_var, double momentum, double eps) {
  StatisticsCall call = check_statistics(x, weight, bias, running_mean, running_var, momentum, eps);
  Tensor workspace = empty_on_cpu(
      {batch_statistics_workspace(call.matrix.rows, call.matrix.channels)}, ScalarType::Double);
  const Extremes extremes = batch_statistics(call.args(workspace), torch_threads());
  call.extremes.mutable_data_ptr<float>()[0] = extremes.low;
  call.extremes.mutable_data_ptr<float>()[1] = extremes.high;
  return call.results();
}

std::tuple<Tensor, Tensor> norm_fake_quant(const Tensor& x, const Tensor& factor,
                                           const Tensor& shift, const Tensor& scale,
                                           const Tensor& zero_point, int64_t qmin, int64_t qmax,
                                           std::optional<double> floor,
                                           std::optional<double> ceiling,
                                           std::optional<ScalarType> code_dtype) {
  NormForwardCall call = check_norm_forward(x, factor, shift, qmin, qmax, code_dtype);
  const NormGrid grid =
      check_norm_grid("norm_fake_quant", x, scale, zero_point, qmin, qmax, floor, ceiling);
  qk::norm_fake_quant(call.args<NormFakeQuantArgs>(grid), torch_threads());
  return {call.y, call.codes};
}

FiveTensors norm_fake_quant_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                     const Tensor& inv_std, const Tensor& factor,
                                     const Tensor& shift, const Tensor& scale,
                                     const Tensor& zero_point, int64_t qmin, int64_t qmax,
                                     std::optional<double> floor, std::optional<double> ceiling,
                                     std::optional<double> grad_factor) {
  NormBackwardCall call = check_norm_backward(grad, x, mean, inv_std, factor, shift, grad_factor);
  const NormGrid grid =
      check_norm_grid("norm_fake_quant_backward", x, scale, zero_point, qmin, qmax, floor, ceiling);
  Tensor workspace = empty_on_cpu({norm_backward_workspace(call.matrix.rows, call.matrix.channels)},
                                  ScalarType::Double);
  norm_backward(call.args<NormBackwardArgs>(grid, workspace), torch_threads());
  return call.results();
}

}  // namespace

StatisticsCall check_statistics(const Tensor& x, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& bias, const Tensor& running_mean,
                                const Tensor& running_var, double momentum, double eps) {
  const char* op = "batch_norm_statistics";
  const Matrix matrix = check_matrix(op, x);
  STD_TORCH_CHECK(momentum >= 0 && momentum <= 1, op, ": momentum must be in [0, 1], got ",
                  momentum);
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), op, ": eps must not be negative, got ", eps);
  return {.matrix = matrix,
          .x = x,
          .weight = check_parameter(op, "weight", weight, x),
          .bias = check_parameter(op, "bias", bias, x),
          .running_mean = check_running(op, "running_mean", running_mean, x),
          .running_var = check_running(op, "running_var", running_var, x),
          .momentum = momentum,
          .eps = eps,
          .mean = floats_like(x, matrix.channels),
          .inv_std = floats_like(x, matrix.channels),
          .factor = floats_like(x, matrix.channels),
          .shift = floats_like(x, matrix.channels),
          .extremes = floats_like(x, 2)};
}

BatchStatisticsArgs StatisticsCall::args(Tensor& workspace) {
  return {.x = x.const_data_ptr<float>(),
          .rows = matrix.rows,
          .channels = matrix.channels,
          .weight = values(weight),
          .bias = values(bias),
          .running_mean = running_mean.mutable_data_ptr<float>(),
          .running_var = running_var.mutable_data_ptr<float>(),
          .momentum = momentum,
          .eps = eps,
          .mean = mean.mutable_data_ptr<float>(),
          .inv_std = inv_std.mutable_data_ptr<float>(),
          .factor = factor.mutable_data_ptr<float>(),
          .shift = shift.mutable_data_ptr<float>(),
          .workspace = workspace.mutable_data_ptr<double>()};
}

NormForwardCall check_norm_forward(const Tensor& x, const Tensor& factor, const Tensor& shift,
                                   int64_t qmin, int64_t qmax,
                                   std::optional<ScalarType> code_dtype) {
  const char* op = "norm_fake_quant";
  const Matrix matrix = check_matrix(op, x);
  if (code_dtype.has_value()) {
    check_code_type(op, "code_dtype", *code_dtype);
    check_code_range(op, *code_dtype, qmin, qmax);
  }
  return {.matrix = matrix,
          .x = x,
          .factor = check_channels(op, "factor", factor, x),
          .shift = check_channels(op, "shift", shift, x),
          .coded = code_dtype.has_value(),
          .y = matrix_like(x, ScalarType::Float),
          .codes = code_dtype.has_value() ? matrix_like(x, *code_dtype)
                                          : empty(x, {0}, ScalarType::Byte)};
}

NormBackwardCall check_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                     const Tensor& inv_std, const Tensor& factor,
                                     const Tensor& shift, std::optional<double> grad_factor) {
  const char* op = "norm_fake_quant_backward";
  const Matrix matrix = check_matrix(op, x);
  STD_TORCH_CHECK(!grad_factor.has_value() || std::isfinite(*grad_factor), op,
                  ": grad_factor must be finite, got ", grad_factor.value_or(0.0));
  const int64_t grids = grad_factor.has_value() ? 1 : 0;
  return {.matrix = matrix,
          .grad = check_gradient(op, grad, x),
          .x = x,
          .mean = check_channels(op, "mean", mean, x),
          .inv_std = check_channels(op, "inv_std", inv_std, x),
          .factor = check_channels(op, "factor", factor, x),
          .shift = check_channels(op, "shift", shift, x),
          .grad_factor = grad_factor,
          .out = matrix_like(x, ScalarType::Float),
          .weight = floats_like(x, matrix.channels),
          .bias = floats_like(x, matrix.channels),
          .scale = floats_like(x, grids),
          .zero_point = floats_like(x, grids)};
}

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("norm_fake_quant", TORCH_BOX(&norm_fake_quant));
  m.impl("norm_fake_quant_backward", TORCH_BOX(&norm_fake_quant_backward));
}

}  // namespace qk::seam
