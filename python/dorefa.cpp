#include "csrc/dorefa/dorefa.h"

#include "csrc/fake_quant/fake_quant.h"
#include "csrc/observe/observe.h"
#include "python/layout.h"

namespace qk::seam {
namespace {

DorefaGrid check_dorefa_grid(const char* op, const Tensor& x, const Tensor& scale,
                             const Tensor& zero_point, int64_t qmin, int64_t qmax) {
  STD_TORCH_CHECK(x.is_cpu() && scale.is_cpu() && zero_point.is_cpu(), op,
                  ": x, scale and zero_point must be on the CPU");
  STD_TORCH_CHECK(qmin >= -kFakeQuantLimit && qmax <= kFakeQuantLimit, op,
                  ": qmin and qmax must be in [-2^21, 2^21], got qmin ", qmin, " and qmax ", qmax);
  const GridView grid = check_grid(op, x, scale, zero_point, std::nullopt, qmin, qmax);
  return {grid.scale[0], grid.zero_point[0], static_cast<int32_t>(qmin),
          static_cast<int32_t>(qmax)};
}

// max |x|; NaN and infinities are an error.
float largest_of(const char* op, const Tensor& x, FloatType type) {
  Tensor walked = x;
  const GridLayout grid = plan_grid(x, &walked, std::nullopt, {});
  Tensor workspace = empty_on_cpu({minmax_workspace(grid)}, ScalarType::Float);
  float low, high;
  const bool finite = minmax({.x = x.const_data_ptr(),
                              .type = type,
                              .grid = grid,
                              .channels = 1,
                              .low = &low,
                              .high = &high,
                              .workspace = workspace.mutable_data_ptr<float>()},
                             torch_threads());
  STD_TORCH_CHECK(finite, op, ": x must be finite, got NaN or infinite values");
  if (x.numel() == 0) return 0;
  return -low > high ? -low : high;
}

Tensor dorefa_weight(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                     int64_t qmin, int64_t qmax) {
  const char* op = "dorefa_weight";
  const FloatType type = check_float_type(op, "x", input);
  const DorefaGrid grid = check_dorefa_grid(op, input, scale, zero_point, qmin, qmax);
  Tensor out = empty_like(input, input.scalar_type());
  const Tensor x = is_dense(input) ? input : copy_in_layout(input, out);
  qk::dorefa_weight({.x = x.const_data_ptr(),
                     .y = out.mutable_data_ptr(),
                     .type = type,
                     .n = x.numel(),
                     .largest = largest_of(op, x, type),
                     .grid = grid},
                    torch_threads());
  return out;
}

Tensor dorefa_weight_backward(const Tensor& grad_in, const Tensor& input, const Tensor& scale,
                              const Tensor& zero_point, int64_t qmin, int64_t qmax) {
  const char* op = "dorefa_weight_backward";
  const FloatType type = check_float_type(op, "x", input);
  STD_TORCH_CHECK(grad_in.is_cpu() && grad_in.scalar_type() == input.scalar_type() &&
                      sizes_of(grad_in) == sizes_of(input),
                  op, ": grad must have the dtype and shape of x, ",
                  dtype_text(input.scalar_type()), " ", shape_text(input), ", got ",
                  dtype_text(grad_in.scalar_type()), " ", shape_text(grad_in));
  const DorefaGrid grid = check_dorefa_grid(op, input, scale, zero_point, qmin, qmax);
  Tensor out = empty_like(input, input.scalar_type());
  const Tensor x = is_dense(input) ? input : copy_in_layout(input, out);
  const Tensor grad =
      strides_of(grad_in) == strides_of(out) ? grad_in : copy_in_layout(grad_in, out);
  Tensor workspace = empty_on_cpu({dorefa_workspace(x.numel())}, ScalarType::Double);
  qk::dorefa_weight_backward({.grad = grad.const_data_ptr(),
                              .x = x.const_data_ptr(),
                              .out = out.mutable_data_ptr(),
                              .type = type,
                              .n = x.numel(),
                              .largest = largest_of(op, x, type),
                              .grid = grid,
                              .workspace = workspace.mutable_data_ptr<double>()},
                             torch_threads());
  return out;
}

Tensor dorefa_gradient(const Tensor& input, const Tensor& seed, int64_t bits) {
  const char* op = "dorefa_gradient";
  const FloatType type = check_float_type(op, "grad", input);
  STD_TORCH_CHECK(input.is_cpu() && seed.is_cpu(), op, ": grad and seed must be on the CPU");
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
  qk::dorefa_gradient({.grad = grad.const_data_ptr(),
                       .out = out.mutable_data_ptr(),
                       .type = type,
                       .rows = rows,
                       .inner = rows == 0 ? 0 : grad.numel() / rows,
                       .steps = static_cast<int32_t>((int64_t{1} << bits) - 1),
                       .seed = static_cast<uint64_t>(seed.const_data_ptr<int64_t>()[0])},
                      torch_threads());
  return rowwise ? out : copy_in_layout(out, input);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("dorefa_weight", TORCH_BOX(&dorefa_weight));
  m.impl("dorefa_weight_backward", TORCH_BOX(&dorefa_weight_backward));
  m.impl("dorefa_gradient", TORCH_BOX(&dorefa_gradient));
}

}  // namespace qk::seam
