// The arguments of batch normalization with the grid behind it, checked, and what the ops return:
// what their CPU and CUDA halves share.
#pragma once

#include <tuple>

#include "csrc/batch_norm/batch_norm.h"
#include "python/layout.h"

namespace qk::seam {

// A channels_last tensor, the channel innermost.
struct Matrix {
  int64_t rows, channels;
};

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct StatisticsCall {
  Matrix matrix;
  Tensor x;
  std::optional<Tensor> weight, bias;
  Tensor running_mean, running_var;
  double momentum, eps;
  Tensor mean, inv_std, factor, shift, extremes;  // made

  BatchStatisticsArgs args(Tensor& workspace);
  FiveTensors results() const { return {mean, inv_std, factor, shift, extremes}; }
};
StatisticsCall check_statistics(const Tensor& x, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& bias, const Tensor& running_mean,
                                const Tensor& running_var, double momentum, double eps);

struct NormForwardCall {
  Matrix matrix;
  Tensor x, factor, shift;
  bool coded;
  Tensor y, codes;  // made

  // NormFakeQuantArgs, or those of CUDA.
  template <class Args, class Grid>
  Args args(const Grid& grid) {
    return {.x = x.const_data_ptr<float>(),
            .y = y.mutable_data_ptr<float>(),
            .codes = coded ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr,
            .rows = matrix.rows,
            .channels = matrix.channels,
            .factor = factor.const_data_ptr<float>(),
            .shift = shift.const_data_ptr<float>(),
            .grid = grid};
  }
};
NormForwardCall check_norm_forward(const Tensor& x, const Tensor& factor, const Tensor& shift,
                                   int64_t qmin, int64_t qmax,
                                   std::optional<ScalarType> code_dtype);

struct NormBackwardCall {
  Matrix matrix;
  Tensor grad, x, mean, inv_std, factor, shift;
  std::optional<double> grad_factor;
  Tensor out, weight, bias;  // made
  Tensor scale, zero_point;  // and these, empty if the grid is not learned

  // NormBackwardArgs, or those of CUDA.
  template <class Args, class Grid>
  Args args(const Grid& grid, Tensor& workspace) {
    return {.grad = grad.const_data_ptr<float>(),
            .x = x.const_data_ptr<float>(),
            .out = out.mutable_data_ptr<float>(),
            .rows = matrix.rows,
            .channels = matrix.channels,
            .mean = mean.const_data_ptr<float>(),
            .inv_std = inv_std.const_data_ptr<float>(),
            .factor = factor.const_data_ptr<float>(),
            .shift = shift.const_data_ptr<float>(),
            .grid = grid,
            .learned = grad_factor.has_value(),
            .grad_factor = grad_factor.value_or(1.0),
            .weight = weight.mutable_data_ptr<float>(),
            .bias = bias.mutable_data_ptr<float>(),
            .scale = scale.mutable_data_ptr<float>(),
            .zero_point = zero_point.mutable_data_ptr<float>(),
            .workspace = workspace.mutable_data_ptr<double>()};
  }
  FiveTensors results() const { return {out, weight, bias, scale, zero_point}; }
};
NormBackwardCall check_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& mean,
                                     const Tensor& inv_std, const Tensor& factor,
                                     const Tensor& shift, std::optional<double> grad_factor);

}  // namespace qk::seam
