#include "csrc/fake_quant/cuda.h"

#include "csrc/fake_quant_backward/cuda.h"
#include "csrc/fake_quant_mask/cuda.h"
#include "csrc/foreach/cuda.h"
#include "csrc/observe/cuda.h"
#include "python/cuda/adapt.h"
#include "python/fake_quant_backward.h"
#include "python/foreach.h"
#include "python/observe.h"
#include "python/quantize.h"

namespace qk::seam {
namespace {

using torch::stable::accelerator::DeviceGuard;

// ---- gradients ----

void fake_quant_backward_out(const Tensor& grad, const Tensor& x, const Tensor& scale,
                             const Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                             int64_t qmax, Tensor out) {
  const char* op = "fake_quant_backward";
  const DeviceGuard guard(guarded_device(op, x));
  const FloatType type = check_grad(op, grad, x);
  axis = check_axis(op, x, axis);
  check_grid_ends(op, qmin, qmax);
  const GridView grid = check_grid(op, x, scale, zero_point, axis, qmin, qmax);
  check_out(op, x, out, x.scalar_type(),
            {{"grad", grad, true}, {"x", x, true}, {"scale", scale}, {"zero_point", zero_point}});
  const Tensor g = in_layout_of(out, grad), input = in_layout_of(out, x);
  check_launch(op, fake_quant_backward_cuda({.grad = g.const_data_ptr(),
                                             .x = input.const_data_ptr(),
                                             .out = out.mutable_data_ptr(),
                                             .type = type,
                                             .qmin = static_cast<int32_t>(qmin),
                                             .qmax = static_cast<int32_t>(qmax),
                                             .grid = dense_grid(out, axis, grid)},
                                            current_stream(x)));
}

Tensor fake_quant_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                           const Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                           int64_t qmax) {
  Tensor out = empty_like(x, x.scalar_type());
  fake_quant_backward_out(grad, x, scale, zero_point, axis, qmin, qmax, out);
  return out;
}

GridView learned_grid(const char* op, const Tensor& x, const Tensor& scale,
                      const Tensor& zero_point, std::optional<int64_t> axis, int64_t qmin,
                      int64_t qmax) {
  check_learned_zero_point(op, x, scale, zero_point, qmin, qmax);
  const Tensor learned = torch::stable::contiguous(zero_point);
  Tensor rounded = empty(x, sizes_of(learned), ScalarType::Int);
  check_launch(op, round_zero_points_cuda(learned.const_data_ptr<float>(),
                                          rounded.mutable_data_ptr<int32_t>(), learned.numel(),
                                          static_cast<int32_t>(qmin), static_cast<int32_t>(qmax),
                                          current_stream(x)));
  return check_grid(op, x, scale, rounded, axis, qmin, qmax);
}

void lsq_out(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
             std::optional<int64_t> axis, int64_t qmin, int64_t qmax, Tensor out) {
  const DeviceGuard guard(guarded_device("lsq", x));
  const FloatType type = check_float_type("lsq", "x", x);
  axis = check_axis("lsq", x, axis);
  const GridView grid = learned_grid("lsq", x, scale, zero_point, axis, qmin, qmax);
  check_out("lsq", x, out, x.scalar_type(),
            {{"x", x, true}, {"scale", scale}, {"zero_point", zero_point}});
  const Tensor input = in_layout_of(out, x);
  check_launch("lsq", fake_quant_cuda({.x = input.const_data_ptr(),
                                       .y = out.mutable_data_ptr(),
                                       .type = type,
                                       .qmin = static_cast<int32_t>(qmin),
                                       .qmax = static_cast<int32_t>(qmax),
                                       .grid = dense_grid(out, axis, grid)},
                                      current_stream(x)));
}

Tensor lsq(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
           std::optional<int64_t> axis, int64_t qmin, int64_t qmax, double) {
  Tensor out = empty_like(x, x.scalar_type());
  lsq_out(x, scale, zero_point, axis, qmin, qmax, out);
  return out;
}

// The gradients of a grid: by its scale, and by its zero point.
std::tuple<Tensor, Tensor> grid_gradients(const char* op, const Tensor& grad, const Tensor& x,
                                          const Tensor& scale, const GridView& grid,
                                          std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                          bool clips, double factor, Tensor out) {
  const Tensor g = in_layout_of(out, grad), input = in_layout_of(out, x);
  const DenseGrid dense = dense_grid(out, axis, grid);
  Tensor workspace = empty(x, {lsq_cuda_workspace(dense)}, ScalarType::Double);
  Tensor grad_scale = empty(x, sizes_of(scale), ScalarType::Float);
  Tensor grad_zero_point = empty(x, sizes_of(scale), ScalarType::Float);
  check_launch(op, lsq_backward_cuda({.grad = g.const_data_ptr(),
                                      .x = input.const_data_ptr(),
                                      .out = out.mutable_data_ptr(),
                                      .type = check_float_type(op, "x", x),
                                      .qmin = static_cast<int32_t>(qmin),
                                      .qmax = static_cast<int32_t>(qmax),
                                      .clips = clips,
                                      .grid = dense,
                                      .factor = factor,
                                      .workspace = workspace.mutable_data_ptr<double>(),
                                      .scale_grad = grad_scale.mutable_data_ptr<float>(),
                                      .zero_point_grad = grad_zero_point.mutable_data_ptr<float>()},
                                     current_stream(x)));
  return {grad_scale, grad_zero_point};
}

std::tuple<Tensor, Tensor> lsq_backward_out(const Tensor& grad, const Tensor& x,
                                            const Tensor& scale, const Tensor& zero_point,
                                            std::optional<int64_t> axis, int64_t qmin, int64_t qmax,
                                            double grad_factor, Tensor out) {
  const char* op = "lsq_backward";
  const DeviceGuard guard(guarded_device(op, x));
  check_grad(op, grad, x);
  axis = check_axis(op, x, axis);
  STD_TORCH_CHECK(std::isfinite(grad_factor), op, ": grad_factor must be finite, got ",
                  grad_factor);
  const GridView grid = learned_grid(op, x, scale, zero_point, axis, qmin, qmax);
  check_out(op, x, out, x.scalar_type(),
            {{"grad", grad, true}, {"x", x, true}, {"scale", scale}, {"zero_point", zero_point}});
  return grid_gradients(op, grad, x, scale, grid, axis, qmin, qmax, false, grad_factor, out);
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

Tensor pact(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
            std::optional<int64_t> axis, int64_t qmin, int64_t qmax) {
  const DeviceGuard guard(guarded_device("pact", x));
  const FloatType type = check_float_type("pact", "x", x);
  axis = check_axis("pact", x, axis);
  check_grid_ends("pact", qmin, qmax);
  const GridView grid = check_grid("pact", x, scale, zero_point, axis, qmin, qmax);
  Tensor out = empty_like(x, x.scalar_type());
  const Tensor input = in_layout_of(out, x);
  check_launch("pact", fake_quant_cuda({.x = input.const_data_ptr(),
                                        .y = out.mutable_data_ptr(),
                                        .type = type,
                                        .qmin = static_cast<int32_t>(qmin),
                                        .qmax = static_cast<int32_t>(qmax),
                                        .grid = dense_grid(out, axis, grid)},
                                       current_stream(x)));
  return out;
}

std::tuple<Tensor, Tensor> pact_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                         const Tensor& zero_point, std::optional<int64_t> axis,
                                         int64_t qmin, int64_t qmax) {
  const char* op = "pact_backward";
  const DeviceGuard guard(guarded_device(op, x));
  check_grad(op, grad, x);
  axis = check_axis(op, x, axis);
  check_grid_ends(op, qmin, qmax);
  const GridView grid = check_grid(op, x, scale, zero_point, axis, qmin, qmax);
  Tensor out = empty_like(x, x.scalar_type());
  const auto [grad_scale, unused] =
      grid_gradients(op, grad, x, scale, grid, axis, qmin, qmax, true, 1.0, out);
  return {out, grad_scale};
}

// ---- bit masks ----

std::tuple<Tensor, Tensor, Tensor, Tensor> fake_quant_mask(
    const Tensor& input, const Tensor& scale, const Tensor& zero_point, std::optional<int64_t> axis,
    int64_t qmin, int64_t qmax, std::optional<ScalarType> code_dtype, std::optional<double> floor,
    std::optional<double> ceiling) {
  const char* op = "fake_quant_mask";
  const DeviceGuard guard(guarded_device(op, input));
  const FloatType type = check_float_type(op, "x", input);
  axis = check_axis(op, input, axis);
  check_grid_ends(op, qmin, qmax);
  if (code_dtype.has_value()) {
    check_code_type(op, "code_dtype", *code_dtype);
    check_code_range(op, *code_dtype, qmin, qmax);
  }
  const Limits limits = check_mask_limits(op, axis, floor, ceiling);
  const GridView view = check_grid(op, input, scale, zero_point, axis, qmin, qmax);
  Tensor y = empty_like(input, input.scalar_type());
  Tensor x = in_layout_of(y, input);
  const MaskLayout layout = mask_layout(plan_grid(y, &x, axis, view));
  Tensor mask = empty(input, {layout.bytes}, ScalarType::Byte);
  Tensor clipped = empty(input, {}, ScalarType::Bool);
  Tensor codes =
      code_dtype.has_value() ? empty_like(input, *code_dtype) : empty(input, {0}, ScalarType::Byte);
  check_launch(
      op, fake_quant_mask_cuda(
              {.x = x.const_data_ptr(),
               .y = y.mutable_data_ptr(),
               .mask = mask.mutable_data_ptr<uint8_t>(),
               .codes = code_dtype.has_value() ? static_cast<uint8_t*>(codes.mutable_data_ptr())
                                               : nullptr,
               .clipped = clipped.mutable_data_ptr<bool>(),
               .type = type,
               .qmin = static_cast<int32_t>(qmin),
               .qmax = static_cast<int32_t>(qmax),
               .grid = dense_grid(y, axis, view),
               .layout = layout,
               .floor = limits.floor,
               .ceiling = limits.ceiling},
              current_stream(input)));
  return {y, mask, clipped, codes};
}

Tensor fake_quant_mask_backward(const Tensor& grad, const Tensor& mask,
                                std::optional<int64_t> axis) {
  const char* op = "fake_quant_mask_backward";
  const DeviceGuard guard(guarded_device(op, grad));
  const FloatType type = check_float_type(op, "grad", grad);
  axis = check_axis(op, grad, axis);
  check_device(op, "mask", mask, grad);
  STD_TORCH_CHECK(is_dense(grad), op,
                  ": grad must be dense, in the layout of the output that the mask is of, got "
                  "shape ",
                  shape_text(grad), " with other strides");
  Tensor out = empty_like(grad, grad.scalar_type());
  Tensor walked = grad;
  const MaskLayout layout = mask_layout(plan_grid(out, &walked, axis, {}));
  STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() &&
                      mask.numel() == layout.bytes,
                  op, ": mask must be a contiguous uint8 tensor of ", layout.bytes,
                  " elements, got ", dtype_text(mask.scalar_type()), " of shape ",
                  shape_text(mask));
  check_launch(op, mask_backward_cuda({.grad = walked.const_data_ptr(),
                                       .mask = mask.const_data_ptr<uint8_t>(),
                                       .out = out.mutable_data_ptr(),
                                       .type = type,
                                       .size = grad.numel(),
                                       .layout = layout},
                                      current_stream(grad)));
  return out;
}

// ---- observers ----

std::tuple<Tensor, Tensor, Tensor> observe_minmax(const Tensor& input,
                                                  std::optional<int64_t> axis) {
  const char* op = "observe_minmax";
  const DeviceGuard guard(guarded_device(op, input));
  const FloatType type = check_float_type(op, "x", input);
  axis = check_axis(op, input, axis);
  const Tensor x = dense(input);
  const int64_t channels = axis.has_value() ? x.size(*axis) : 1;
  Tensor low = empty(x, {channels}, ScalarType::Float);
  Tensor high = empty(x, {channels}, ScalarType::Float);
  Tensor non_finite = empty(x, {2}, ScalarType::Long);
  const DenseGrid grid = dense_grid(x, axis, {});
  Tensor workspace = empty(x, {minmax_cuda_workspace(grid)}, ScalarType::Byte);
  check_launch(op, minmax_cuda({.x = x.const_data_ptr(),
                                .type = type,
                                .grid = grid,
                                .low = low.mutable_data_ptr<float>(),
                                .high = high.mutable_data_ptr<float>(),
                                .non_finite = non_finite.mutable_data_ptr<int64_t>(),
                                .workspace = workspace.mutable_data_ptr()},
                               current_stream(x)));
  return {low, high, non_finite};
}

void run_observer(const char* op, const ObserverCall& call, bool* clipped) {
  const DenseGrid grid = dense_grid(call.x, call.axis, {});
  Tensor workspace = empty(call.x, {observe_cuda_workspace(grid)}, ScalarType::Byte);
  check_launch(op, observe_cuda({.x = call.x.const_data_ptr(),
                                 .type = call.type,
                                 .grid = grid,
                                 .rule = call.rule,
                                 .state = call.state,
                                 .non_finite = call.counts,
                                 .clipped = clipped,
                                 .workspace = workspace.mutable_data_ptr()},
                                current_stream(call.x)));
}

void observe(const Tensor& x, const Tensor& low, const Tensor& high, const Tensor& scale,
             const Tensor& zero_point, const std::optional<Tensor>& non_finite,
             std::optional<int64_t> axis, int64_t qmin, int64_t qmax, bool symmetric,
             double min_scale, std::optional<double> momentum, std::string,
             std::optional<double> floor, std::optional<double> ceiling) {
  const DeviceGuard guard(guarded_device("observe", x));
  const Observer observer{low,        high,      scale,    zero_point,
                          non_finite, axis,      qmin,     qmax,
                          symmetric,  min_scale, momentum, check_limits("observe", floor, ceiling)};
  run_observer("observe", check_observer("observe", x, observer, nullptr), nullptr);
}

Tensor observe_fake_quant_out(const Tensor& x, const Tensor& low, const Tensor& high,
                              const Tensor& scale, const Tensor& zero_point,
                              const std::optional<Tensor>& non_finite, std::optional<int64_t> axis,
                              int64_t qmin, int64_t qmax, bool symmetric, double min_scale,
                              std::optional<double> momentum, std::string, Tensor out) {
  const char* op = "observe_fake_quant";
  const DeviceGuard guard(guarded_device(op, x));
  ObserverCall call = check_observer(
      op, x,
      {low, high, scale, zero_point, non_finite, axis, qmin, qmax, symmetric, min_scale, momentum},
      &out);
  call.x = in_layout_of(out, call.x);
  Tensor clipped = empty(x, {}, ScalarType::Bool);
  run_observer(op, call, clipped.mutable_data_ptr<bool>());
  DenseGrid grid = dense_grid(out, call.axis, {});
  grid.scale = call.state.scale;
  grid.zero_point = call.state.zero_point;
  check_launch(op, fake_quant_cuda({.x = call.x.const_data_ptr(),
                                    .y = out.mutable_data_ptr(),
                                    .type = call.type,
                                    .qmin = static_cast<int32_t>(qmin),
                                    .qmax = static_cast<int32_t>(qmax),
                                    .grid = grid},
                                   current_stream(x)));
  return clipped;
}

// ---- lists ----

void quantize_on_cuda(const char* op, const Tensor& like, const ForeachQuantArgs& args,
                      Tensor* clipped) {
  const DeviceGuard guard(guarded_device(op, like));
  Tensor workspace = empty(like, {foreach_cuda_workspace(args)}, ScalarType::Byte);
  check_launch(op, foreach_fake_quant_cuda(
                       args, clipped == nullptr ? nullptr : clipped->mutable_data_ptr<bool>(),
                       workspace.mutable_data_ptr(), current_stream(like)));
}

void backward_on_cuda(const char* op, const Tensor& like, const ForeachBackwardArgs& args) {
  const DeviceGuard guard(guarded_device(op, like));
  check_launch(op, foreach_fake_quant_backward_cuda(args, current_stream(like)));
}

constexpr ForeachDevice kCuda{quantize_on_cuda, backward_on_cuda};

Tensors foreach_fake_quant(const Tensors& xs, const Tensors& scales, const Tensors& zero_points,
                           const std::vector<int64_t>& axes, int64_t qmin, int64_t qmax) {
  return foreach_fake_quant_on(kCuda, xs, scales, zero_points, axes, qmin, qmax);
}

Tensors foreach_fake_quant_backward(const Tensors& grads, const Tensors& xs, const Tensors& scales,
                                    const Tensors& zero_points, const std::vector<int64_t>& axes,
                                    int64_t qmin, int64_t qmax) {
  return foreach_fake_quant_backward_on(kCuda, grads, xs, scales, zero_points, axes, qmin, qmax);
}

std::tuple<Tensors, Tensors, Tensors, Tensors, Tensor> foreach_observe_fake_quant(
    const Tensors& xs, const std::vector<int64_t>& axes, int64_t qmin, int64_t qmax, bool symmetric,
    double min_scale, std::optional<ScalarType> code_dtype) {
  return foreach_observe_fake_quant_on(kCuda, xs, axes, qmin, qmax, symmetric, min_scale,
                                       code_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(qkernels, CUDA, m) {
  m.impl("fake_quant_backward", TORCH_BOX(&fake_quant_backward));
  m.impl("fake_quant_backward_out", TORCH_BOX(&fake_quant_backward_out));
  m.impl("fake_quant_mask", TORCH_BOX(&fake_quant_mask));
  m.impl("fake_quant_mask_backward", TORCH_BOX(&fake_quant_mask_backward));
  m.impl("lsq", TORCH_BOX(&lsq));
  m.impl("lsq_out", TORCH_BOX(&lsq_out));
  m.impl("lsq_backward", TORCH_BOX(&lsq_backward));
  m.impl("lsq_backward_out", TORCH_BOX(&lsq_backward_out));
  m.impl("pact", TORCH_BOX(&pact));
  m.impl("pact_backward", TORCH_BOX(&pact_backward));
  m.impl("observe_minmax", TORCH_BOX(&observe_minmax));
  m.impl("observe", TORCH_BOX(&observe));
  m.impl("observe_fake_quant_out", TORCH_BOX(&observe_fake_quant_out));
  m.impl("foreach_fake_quant", TORCH_BOX(&foreach_fake_quant));
  m.impl("foreach_fake_quant_backward", TORCH_BOX(&foreach_fake_quant_backward));
  m.impl("foreach_observe_fake_quant", TORCH_BOX(&foreach_observe_fake_quant));
}

}  // namespace qk::seam
