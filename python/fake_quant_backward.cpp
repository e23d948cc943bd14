#include "python/fake_quant_backward.h"

#include <tuple>
#include <vector>

#include "csrc/fake_quant/fake_quant.h"
#include "csrc/fake_quant_mask/mask.h"

namespace qk::seam {
FloatType check_grad(const char* op, const Tensor& grad, const Tensor& x) {
  const FloatType type = check_float_type(op, "x", x);
  check_device(op, "grad", grad, x);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": grad must be ",
                  dtype_text(x.scalar_type()), ", as x is, got ", dtype_text(grad.scalar_type()));
  STD_TORCH_CHECK(sizes_of(grad) == sizes_of(x), op, ": grad must have shape ", shape_text(x),
                  ", got ", shape_text(grad));
  return type;
}

void check_grid_ends(const char* op, int64_t qmin, int64_t qmax) {
  STD_TORCH_CHECK(qmin >= -kFakeQuantLimit && qmax <= kFakeQuantLimit, op,
                  ": qmin and qmax must be in [-2^21, 2^21], got qmin ", qmin, " and qmax ", qmax);
}

void check_learned_zero_point(const char* op, const Tensor& x, const Tensor& scale,
                              const Tensor& zero_point, int64_t qmin, int64_t qmax) {
  check_grid_ends(op, qmin, qmax);
  check_device(op, "scale", scale, x);
  check_device(op, "zero_point", zero_point, x);
  STD_TORCH_CHECK(zero_point.scalar_type() == ScalarType::Float, op,
                  ": zero_point must be float32 (it is learned), got ",
                  dtype_text(zero_point.scalar_type()));
  STD_TORCH_CHECK(qmin < qmax, op, ": qmin must be below qmax, got qmin ", qmin, " and qmax ",
                  qmax);
}

GridView check_learned_grid(const char* op, const Tensor& x, const Tensor& scale,
                            const Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                            int64_t qmax) {
  check_learned_zero_point(op, x, scale, zero_point, qmin, qmax);
  const Tensor learned = torch::stable::contiguous(zero_point);
  const float* values = learned.const_data_ptr<float>();
  for (int64_t c = 0; c < learned.numel(); ++c) {
    STD_TORCH_CHECK(std::isfinite(values[c]), op, ": zero_point must be finite, got ", values[c],
                    " at channel ", c);
  }
  Tensor rounded = empty_on_cpu(sizes_of(learned), ScalarType::Int);
  round_zero_points(values, rounded.mutable_data_ptr<int32_t>(), learned.numel(),
                    static_cast<int32_t>(qmin), static_cast<int32_t>(qmax));
  return check_grid(op, x, scale, rounded, axis, qmin, qmax);
}

Limits check_mask_limits(const char* op, std::optional<int64_t> axis, std::optional<double> floor,
                         std::optional<double> ceiling) {
  STD_TORCH_CHECK(!axis.has_value() || (!floor.has_value() && !ceiling.has_value()), op,
                  ": floor and ceiling need one grid for the whole tensor, got axis ",
                  axis.value_or(0));
  return check_limits(op, floor, ceiling);
}

Pass::Pass(const Tensor& grad_in, const Tensor& x_in, FloatType type, std::optional<int64_t> axis,
           const GridView& grid, int64_t qmin, int64_t qmax, Tensor out)
    : grad(same_layout(grad_in, out) ? grad_in : copy_in_layout(grad_in, out)), x(x_in) {
  const GridLayout layout = plan_grid(out, &x, axis, grid);
  args = {.grad = grad.const_data_ptr(),
          .x = x.const_data_ptr(),
          .out = out.mutable_data_ptr(),
          .type = type,
          .qmin = static_cast<int32_t>(qmin),
          .qmax = static_cast<int32_t>(qmax),
          .grid = layout};
}

namespace {

void fake_quant_backward_out(const Tensor& grad, const Tensor& x, const Tensor& scale,
                             const Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                             int64_t qmax, Tensor out) {
  const char* op = "fake_quant_backward";
  const FloatType type = check_grad(op, grad, x);
  axis = check_axis(op, x, axis);
  check_grid_ends(op, qmin, qmax);
  const GridView grid = check_grid(op, x, scale, zero_point, axis, qmin, qmax);
  check_out(op, x, out, x.scalar_type(),
            {{"grad", grad, true}, {"x", x, true}, {"scale", scale}, {"zero_point", zero_point}});
  const Pass pass(grad, x, type, axis, grid, qmin, qmax, out);
  qk::fake_quant_backward(pass.args, torch_threads());
}

Tensor fake_quant_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                           const Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                           int64_t qmax) {
  Tensor out = empty_like(x, x.scalar_type());
  fake_quant_backward_out(grad, x, scale, zero_point, axis, qmin, qmax, out);
  return out;
}

void lsq_out(Tensor x, const Tensor& scale, const Tensor& zero_point, std::optional<int64_t> axis,
             int64_t qmin, int64_t qmax, Tensor out) {
  const FloatType type = check_float_type("lsq", "x", x);
  axis = check_axis("lsq", x, axis);
  const GridView grid = check_learned_grid("lsq", x, scale, zero_point, axis, qmin, qmax);
  check_out("lsq", x, out, x.scalar_type(),
            {{"x", x, true}, {"scale", scale}, {"zero_point", zero_point}});
  const GridLayout layout = plan_grid(out, &x, axis, grid);
  qk::fake_quant({.x = x.const_data_ptr(),
                  .y = out.mutable_data_ptr(),
                  .type = type,
                  .qmin = static_cast<int32_t>(qmin),
                  .qmax = static_cast<int32_t>(qmax),
                  .grid = layout},
                 torch_threads());
}

Tensor lsq(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
           std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double) {
  Tensor out = empty_like(x, x.scalar_type());
  lsq_out(x, scale, zero_point, axis, qmin, qmax, out);
  return out;
}

std::tuple<Tensor, Tensor> pact_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                         const Tensor& zero_point, std::optional<int64_t> axis,
                                         int64_t qmin, int64_t qmax) {
  const char* op = "pact_backward";
  const FloatType type = check_grad(op, grad, x);
  axis = check_axis(op, x, axis);
  check_grid_ends(op, qmin, qmax);
  const GridView grid = check_grid(op, x, scale, zero_point, axis, qmin, qmax);
  Tensor out = empty_like(x, x.scalar_type());
  Pass pass(grad, x, type, axis, grid, qmin, qmax, out);
  pass.args.clips = true;
  Tensor workspace = empty_on_cpu({lsq_workspace(pass.args.grid)}, ScalarType::Double);
  Tensor grad_scale = empty_on_cpu(sizes_of(scale), ScalarType::Float);
  Tensor unused = empty_on_cpu({grid.channels}, ScalarType::Float);
  qk::lsq_backward(pass.args,
                   {.channels = grid.channels,
                    .factor = 1.0,
                    .workspace = workspace.mutable_data_ptr<double>(),
                    .scale = grad_scale.mutable_data_ptr<float>(),
                    .zero_point = unused.mutable_data_ptr<float>()},
                   torch_threads());
  return {out, grad_scale};
}

Tensor pact(Tensor x, const Tensor& scale, const Tensor& zero_point, std::optional<int64_t> axis,
            int64_t qmin, int64_t qmax) {
  const char* op = "pact";
  const FloatType type = check_float_type(op, "x", x);
  axis = check_axis(op, x, axis);
  check_grid_ends(op, qmin, qmax);
  const GridView grid = check_grid(op, x, scale, zero_point, axis, qmin, qmax);
  Tensor out = empty_like(x, x.scalar_type());
  const GridLayout layout = plan_grid(out, &x, axis, grid);
  qk::fake_quant({.x = x.const_data_ptr(),
                  .y = out.mutable_data_ptr(),
                  .type = type,
                  .qmin = static_cast<int32_t>(qmin),
                  .qmax = static_cast<int32_t>(qmax),
                  .grid = layout},
                 torch_threads());
  return out;
}

// The walk of a mask: over a dense tensor in its own layout, so that shape, strides and axis
// decide.
std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quant_mask(
    const Tensor& input, const Tensor& scale, const Tensor& zero_point, std::optional<int64_t> axis,
    int64_t qmin, int64_t qmax, std::optional<ScalarType> code_dtype, std::optional<double> floor,
    std::optional<double> ceiling) {
  const char* op = "fake_quant_mask";
  const FloatType type = check_float_type(op, "x", input);
  axis = check_axis(op, input, axis);
  check_grid_ends(op, qmin, qmax);
  const GridView view = check_grid(op, input, scale, zero_point, axis, qmin, qmax);
  if (code_dtype.has_value()) {
    check_code_type(op, "code_dtype", *code_dtype);
    check_code_range(op, *code_dtype, qmin, qmax);
  }
  const Limits limits = check_mask_limits(op, axis, floor, ceiling);
  CodeEnds range{static_cast<int32_t>(qmin), static_cast<int32_t>(qmax)};
  if (!axis.has_value()) {
    range = clamped_ends(limits.floor, limits.ceiling, 1.0f / *view.scale, *view.zero_point,
                         range.qmin, range.qmax);
  }
  Tensor y = empty_like(input, input.scalar_type());
  Tensor codes =
      code_dtype.has_value() ? empty_like(input, *code_dtype) : empty_on_cpu({0}, ScalarType::Byte);
  Tensor x = same_layout(input, y) ? input : copy_in_layout(input, y);
  const GridLayout grid = plan_grid(y, &x, axis, view);
  Tensor mask = empty_on_cpu({mask_layout(grid).bytes}, ScalarType::Byte);
  Tensor clipped = empty_on_cpu({}, ScalarType::Bool);
  *clipped.mutable_data_ptr<bool>() = qk::fake_quant_mask(
      {.x = x.const_data_ptr(),
       .y = y.mutable_data_ptr(),
       .mask = mask.mutable_data_ptr<uint8_t>(),
       .codes = code_dtype.has_value() ? static_cast<uint8_t*>(codes.mutable_data_ptr()) : nullptr,
       .type = type,
       .qmin = range.qmin,
       .qmax = range.qmax,
       .grid = grid},
      torch_threads());
  return {y, mask, clipped, codes};
}

Tensor fake_quant_mask_backward(const Tensor& grad, const Tensor& mask,
                                std::optional<int64_t> axis) {
  const char* op = "fake_quant_mask_backward";
  const FloatType type = check_float_type(op, "grad", grad);
  axis = check_axis(op, grad, axis);
  check_device(op, "mask", mask, grad);
  STD_TORCH_CHECK(is_dense(grad), op,
                  ": grad must be dense, in the layout of the output that the mask is of, got "
                  "shape ",
                  shape_text(grad), " with other strides");
  Tensor out = empty_like(grad, grad.scalar_type());
  Tensor walked = grad;
  const GridLayout grid = plan_grid(out, &walked, axis, {});
  const int64_t bytes = mask_layout(grid).bytes;
  STD_TORCH_CHECK(
      mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && mask.numel() == bytes, op,
      ": mask must be a contiguous uint8 tensor of ", bytes, " elements, got ",
      dtype_text(mask.scalar_type()), " of shape ", shape_text(mask));
  qk::fake_quant_mask_backward({.grad = grad.const_data_ptr(),
                                .mask = mask.const_data_ptr<uint8_t>(),
                                .out = out.mutable_data_ptr(),
                                .type = type,
                                .grid = grid},
                               torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> lsq_backward_out(const Tensor& grad, const Tensor& x,
                                            const Tensor& scale, const Tensor& zero_point,
                                            std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                            double grad_factor, Tensor out) {
  const char* op = "lsq_backward";
  const FloatType type = check_grad(op, grad, x);
  axis = check_axis(op, x, axis);
  STD_TORCH_CHECK(std::isfinite(grad_factor), op, ": grad_factor must be finite, got ",
                  grad_factor);
  const GridView grid = check_learned_grid(op, x, scale, zero_point, axis, qmin, qmax);
  check_out(op, x, out, x.scalar_type(),
            {{"grad", grad, true}, {"x", x, true}, {"scale", scale}, {"zero_point", zero_point}});
  const Pass pass(grad, x, type, axis, grid, qmin, qmax, out);
  Tensor workspace = empty_on_cpu({lsq_workspace(pass.args.grid)}, ScalarType::Double);
  Tensor grad_scale = empty_on_cpu(sizes_of(scale), ScalarType::Float);
  Tensor grad_zero_point = empty_on_cpu(sizes_of(zero_point), ScalarType::Float);
  qk::lsq_backward(pass.args,
                   {.channels = grid.channels,
                    .factor = grad_factor,
                    .workspace = workspace.mutable_data_ptr<double>(),
                    .scale = grad_scale.mutable_data_ptr<float>(),
                    .zero_point = grad_zero_point.mutable_data_ptr<float>()},
                   torch_threads());
  return {grad_scale, grad_zero_point};
}

std::tuple<Tensor, Tensor, Tensor> lsq_backward(const Tensor& grad, const Tensor& x,
                                                const Tensor& scale, const Tensor& zero_point,
                                                std::optional<int64_t> axis, int64_t qmin,
                                                int64_t qmax, double grad_factor) {
  Tensor out = empty_like(x, x.scalar_type());
  const auto [grad_scale, grad_zero_point] =
      lsq_backward_out(grad, x, scale, zero_point, axis, qmin, qmax, grad_factor, out);
  return {out, grad_scale, grad_zero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CPU, m) {
  m.impl("fake_quant_backward", TORCH_BOX(&fake_quant_backward));
  m.impl("fake_quant_backward_out", TORCH_BOX(&fake_quant_backward_out));
  m.impl("fake_quant_mask", TORCH_BOX(&fake_quant_mask));
  m.impl("fake_quant_mask_backward", TORCH_BOX(&fake_quant_mask_backward));
  m.impl("lsq", TORCH_BOX(&lsq));
  m.impl("pact", TORCH_BOX(&pact));
  m.impl("pact_backward", TORCH_BOX(&pact_backward));
  m.impl("lsq_out", TORCH_BOX(&lsq_out));
  m.impl("lsq_backward", TORCH_BOX(&lsq_backward));
  m.impl("lsq_backward_out", TORCH_BOX(&lsq_backward_out));
}

}  // namespace qk::seam
